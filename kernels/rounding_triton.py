"""Rounding rows to FP8 on a GPU: e4m3 numbers, and a scale for each row. The numbers are those of `fp8`."""

from typing import Self

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from orthrus.kernels.device import chaining
from orthrus.kernels.workspace import empty


@triton.jit
def round_row(x):
    """A row x as e4m3 numbers, and their scale. A value is about its number times the scale."""
    largest = tl.max(tl.abs(x), 0)
    full = tl.maximum(tl.where(largest > 0, largest, 448.0), 2.0**-100)  # Its inverse is finite.
    return (x * tl.div_rn(448.0, full)).to(tl.float8e4nv), full * (1.0 / 448.0)


@triton.jit
def _quantise_kernel(
    x, numbers, scales, width, stride, WIDTH: tl.constexpr, IN_WORDS: tl.constexpr, CHAINED: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    source = column
    if IN_WORDS:
        # Of each 16 inputs, word q has the inputs 8 + 2q, 2q, 9 + 2q and 2q + 1.
        source = column // 16 * 16 + 8 * (1 - column % 2) + column % 16 // 4 * 2 + column % 4 // 2
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    number, scale = round_row(tl.load(x + row * stride + source, mask=inside, other=0.0).to(tl.float32))
    tl.store(numbers + row * width + column, number, mask=inside)
    tl.store(scales + row, scale)


class RoundedRows(Tensor):
    """Rows [rows, width], and the same rows in FP8, which the same kernel has made. To other operations they are plain rows."""

    numbers: Tensor
    """e4m3 [rows, width]."""
    scales: Tensor
    """float32 [rows]."""

    # Results of operations on such rows are plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, rows: Tensor, numbers: Tensor, scales: Tensor) -> Self:
        result = rows.as_subclass(cls)
        result.numbers, result.scales = numbers, scales
        return result


def empty_rounded(rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Empty tensors for the numbers [rows, width] and the scales [rows]."""
    return empty((rows, width), torch.float8_e4m3fn, device), empty((rows,), torch.float32, device)


def quantise_rows(x: Tensor, *, in_words: bool = False) -> tuple[Tensor, Tensor]:
    """See `fp8.quantise_rows`. `RoundedRows` have both already, unless they are to be in the order of words.

    in_words: put the numbers into the order of the first plane of `LosslessLayer`. The row's width is a multiple of 16 then.
    """
    if isinstance(x, RoundedRows) and not in_words:
        return x.numbers, x.scales
    rows, width = x.shape
    numbers, scales = empty_rounded(rows, width, x.device)
    size = triton.next_power_of_2(width)
    _quantise_kernel[(rows,)](
        x,
        numbers,
        scales,
        width,
        x.stride(0),
        WIDTH=size,
        IN_WORDS=in_words,
        num_warps=min(32, max(1, size // 512)),
        **chaining(),
    )
    return numbers, scales
