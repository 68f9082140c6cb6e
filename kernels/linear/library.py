"""Products with a weight on a CPU, packed once by a library that sums over the inputs in one order for any number of rows."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""x [rows, in_features] to x @ weight.T [rows, out_features]: a row's bits do not depend on the others."""

_ROW_TILE = 4
"""Rows are padded to a multiple of this where fewer would reach matrix-vector code with its own rounding."""

_PLAIN_ROW_TILE = 16
"""Rows of every product with a weight that no library has packed."""

_PACK_ROWS = 8
"""Row count that oneDNN lays the packed weights out for: decode passes are the ones that are short of bandwidth."""

SEGMENT = 512
"""Most inputs that FBGEMM adds up in a row: a float32 sum loses more, the longer it is. Segments are added up afterwards."""

_CHECKED_ROWS = 4096
"""Rows of a weight that are looked at together: what is needed for it beside the weight stays small."""

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

    None, too, where FBGEMM, which multiplies float32 rows by float16 weights, is not there or would not do.
    """
    if _half_row_tile() is None:
        return None
    lowest, highest = weight.aminmax()
    largest = torch.maximum(-lowest, highest)
    if not largest.isfinite():
        return None
    scale = 2.0 ** (int(torch.frexp(largest).exponent) - _HALF_EXPONENT)
    halves = torch.empty_like(weight, dtype=torch.float16)
    for part, half in zip(weight.split(_CHECKED_ROWS), halves.split(_CHECKED_ROWS), strict=True):
        half.copy_(part / scale)
        if not torch.equal(half.float().mul_(scale), part):
            return None
    return halves, scale


@cache
def _half_row_tile() -> int | None:
    """Row counts are padded to multiples of this, so that FBGEMM gives a row the same bits among any number of others.

    With AVX-512 one row is as good as many. With AVX2 it is so in blocks of six. Tried, since that is FBGEMM's own choice.
    """
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return None
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(132, 96, generator=generator), torch.randn(80, 96, generator=generator)
    packed = torch.ops.quantized.linear_prepack_fp16(weight, None)
    full = torch.ops.quantized.linear_dynamic_fp16(x, packed)

    def same(rows: int) -> bool:
        return torch.equal(torch.ops.quantized.linear_dynamic_fp16(x[:rows], packed), full[:rows])

    return next((tile for tile in (1, 6) if all(same(rows) for rows in range(tile, 132, tile))), None)


@dataclass(frozen=True)
class _HalfProduct:
    """The product with float16 weights times `scale`. segments: first input, inputs and FBGEMM's weight of each."""

    segments: tuple[tuple[int, int, Any], ...]
    scale: Tensor
    row_tile: int

    @staticmethod
    def of(halves: Tensor, scale: float, segment: int) -> "_HalfProduct":
        width = halves.shape[1]
        each = -(-width // -(-width // segment))
        pack, row_tile = torch.ops.quantized.linear_prepack_fp16, _half_row_tile()
        assert row_tile is not None, "asked before"
        segments = tuple(
            (start, part.shape[1], pack(part.float().contiguous(), None))
            for start, part in zip(range(0, width, each), halves.split(each, 1), strict=True)
        )
        return _HalfProduct(segments, torch.tensor(scale), row_tile)

    def __call__(self, x: Tensor) -> Tensor:
        tiled = _tiled(x, self.row_tile)
        sums = (
            torch.ops.quantized.linear_dynamic_fp16(tiled.narrow(1, start, size), packed)
            for start, size, packed in self.segments
        )
        total: Tensor = next(sums)
        for more in sums:
            total.add_(more)
        return total.mul_(self.scale)[: x.shape[0]]


def _onednn_product(x: Tensor, packed: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(_tiled(x, _ROW_TILE), packed, None, "none", [], "")
    return out[: x.shape[0]]


def plain_product(x: Tensor, weight: Tensor) -> Tensor:
    """The product with a weight as it is. A BLAS library may choose the order of its sums by the number of rows: all tiles
    have the same."""
    tiles = _tiled(x, _PLAIN_ROW_TILE).split(_PLAIN_ROW_TILE)
    return torch.cat([F.linear(tile, weight) for tile in tiles])[: x.shape[0]]


def _tiled(x: Tensor, row_tile: int) -> Tensor:
    """x [rows, in_features] padded to a multiple of `row_tile` rows."""
    missing = -x.shape[0] % row_tile
    return F.pad(x, (0, 0, 0, missing)) if missing else x
