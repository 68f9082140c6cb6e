"""Products with a weight on a CPU, packed once by a library that sums over the inputs in one order for any number of rows."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""x [rows, in_features] to x @ weight.T [rows, out_features]: a row's bits do not depend on the others."""

_ROW_TILE = 4
"""Rows are padded to a multiple of this where fewer would reach matrix-vector code with its own rounding."""

_PACK_ROWS = 8
"""Row count that oneDNN lays the packed weights out for: decode passes are the ones that are short of bandwidth."""

SEGMENT = 512
"""Most inputs that FBGEMM adds up in a row: a float32 sum loses more, the longer it is. Segments are added up afterwards."""

_HALF_EXPONENT = 15
"""Weights below 2 to this power are finite in float16."""


def pack_weight(weight: Tensor, segment: int = SEGMENT) -> Product:
    """The product with a float32 weight [out_features, in_features]. segment: as `SEGMENT`.

    A decode pass takes as long as its weights take to read. Where float16 holds all of them exactly, as it does those of most
    bfloat16 checkpoints, they are kept in it: half the bytes, the same float32 arithmetic.
    """
    halves = _as_halves(weight)
    if halves is not None:
        return _HalfProduct.of(*halves, segment)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACK_ROWS)
    return partial(_onednn_product, packed=packed)


def _as_halves(weight: Tensor) -> tuple[Tensor, float] | None:
    """A weight as float16 times a power of two, which puts the largest just below 2**15; None if bits would be lost.

    None, too, where the build lacks FBGEMM, which multiplies float32 rows by float16 weights.
    """
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return None
    exponent = int(torch.frexp(weight.abs().max()).exponent)
    scale = 2.0 ** (exponent - _HALF_EXPONENT)
    halves = (weight / scale).half()
    return (halves, scale) if torch.equal(halves.float() * scale, weight) else None


@dataclass(frozen=True)
class _HalfProduct:
    """The product with float16 weights times `scale`. segments: first input, inputs and FBGEMM's weight of each."""

    segments: tuple[tuple[int, int, Any], ...]
    scale: Tensor

    @staticmethod
    def of(halves: Tensor, scale: float, segment: int) -> "_HalfProduct":
        width = halves.shape[1]
        parts = halves.float().split(-(-width // -(-width // segment)), 1)
        starts = itertools.accumulate((part.shape[1] for part in parts), initial=0)
        pack = torch.ops.quantized.linear_prepack_fp16
        segments = tuple(
            (start, part.shape[1], pack(part.contiguous(), None))
            for start, part in zip(starts, parts, strict=False)
        )
        return _HalfProduct(segments, torch.tensor(scale))

    def __call__(self, x: Tensor) -> Tensor:
        sums = (
            torch.ops.quantized.linear_dynamic_fp16(x.narrow(1, start, size), packed)
            for start, size, packed in self.segments
        )
        total: Tensor = next(sums)
        for more in sums:
            total.add_(more)
        return total.mul_(self.scale)


def _onednn_product(x: Tensor, packed: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(_tiled(x), packed, None, "none", [], "")
    return out[: x.shape[0]]


def plain_product(x: Tensor, weight: Tensor) -> Tensor:
    """The product with a weight as it is."""
    return F.linear(_tiled(x), weight)[: x.shape[0]]


def _tiled(x: Tensor) -> Tensor:
    """x [rows, in_features] padded to a multiple of `_ROW_TILE` rows."""
    missing = -x.shape[0] % _ROW_TILE
    return F.pad(x, (0, 0, 0, missing)) if missing else x
