"""float32 weights on a CPU that float16 holds exactly: half the bytes, the same float32 arithmetic.

A decode pass takes as long as reading its weights takes. float16 holds most weights of a bfloat16 checkpoint exactly once they
are scaled by a power of two. FBGEMM multiplies float32 rows by float16 weights and adds in float32.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from orthrus.kernels.linear.reference import pad_rows
from orthrus.kernels.linear.weight import OneViewWeight, Parameters, join_projections

_CHECKED_ROWS = 4096
"""Rows of a weight that are converted at once, so that the conversion needs little memory besides the result."""

_LONGEST_SUM, _LONGEST_HEAD_SUM = 512, 192
"""The most products that are added to one float32 sum, before it is added to the others. A longer sum rounds more. The LM head
has shorter ones, because no norm follows it."""

_HALF_EXPONENT = 15
"""Numbers below 2 to this power are finite in float16."""


class HalfWeight(OneViewWeight):
    """A weight as float16 numbers times one power of two."""

    def __init__(self, halves: Tensor, scale: float, bias: Tensor | None, *, head: bool = False) -> None:
        """halves, scale: from `as_halves`. The weight is halves [out_features, in_features] * scale. head: see `pack_weight`."""
        row_tile = _row_tile()
        assert row_tile is not None, "as_halves() has checked it"
        self.bias = bias
        self._row_tile = row_tile
        # A tensor, so that multiplying by it makes no new one in every pass.
        self._scale = torch.tensor(scale)
        self._nbytes = halves.nbytes + (0 if bias is None else bias.nbytes)
        # First input, number of inputs, and FBGEMM's weight, of each segment of the inputs. FBGEMM adds a segment's products
        # one after the other.
        self._segments = _pack_segments(halves, _LONGEST_HEAD_SUM if head else _LONGEST_SUM)

    @classmethod
    def pack_view(cls, projections: Sequence[Parameters]) -> "HalfWeight":
        """Raises ValueError if float16 does not hold the weight exactly, or if FBGEMM is not available."""
        weight, bias = join_projections(projections)
        halves = as_halves(weight)
        if halves is None:
            raise ValueError(
                "float16 does not hold this weight exactly, or this build of PyTorch has no FBGEMM"
            )
        return cls(*halves, bias)

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def product(self, x: Tensor) -> Tensor:
        tiled = pad_rows(x, self._row_tile)
        sums = (
            torch.ops.quantized.linear_dynamic_fp16(tiled.narrow(1, start, size), packed)
            for start, size, packed in self._segments
        )
        total: Tensor = next(sums)
        for more in sums:
            total.add_(more)
        return total.mul_(self._scale)[: x.shape[0]]


def _pack_segments(halves: Tensor, longest_sum: int) -> list[tuple[int, int, Any]]:
    """Segments of equal length, none longer than `longest_sum`; see `HalfWeight._segments`."""
    width = halves.shape[1]
    length = -(-width // -(-width // longest_sum))
    pack = torch.ops.quantized.linear_prepack_fp16
    return [
        (start, part.shape[1], pack(part.float().contiguous(), None))
        for start, part in zip(range(0, width, length), halves.split(length, 1), strict=True)
    ]


def as_halves(weight: Tensor) -> tuple[Tensor, float] | None:
    """A float32 weight as float16 and the power of two to multiply it by, which puts the largest number just below 2**15.

    None if bits would be lost, if FBGEMM is not available, or if its results depend on the number of rows.
    """
    if _row_tile() is None:
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
def _row_tile() -> int | None:
    """Rows must be padded to a multiple of this, so that FBGEMM gives a row the same bits for any number of rows.

    It is 1 with AVX-512 and 6 with AVX2. FBGEMM chooses its instructions by itself, so both are tried. None if both fail, or if
    FBGEMM is not available.
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
