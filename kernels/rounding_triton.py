"""How kernels store numbers as `Rounding` says, and a kernel for inputs that come from one which has not done so."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from orthrus.kernels.device import chaining
from orthrus.kernels.rounding import Rounding, stored_as
from orthrus.kernels.workspace import empty

_COLUMNS = 1024
"""Numbers that a program rounds."""


@triton.jit
def stored_place(index, IN_WORDS: tl.constexpr):
    """Where a row stores its number `index`: in the order of words (the opposite of `rounding.word_order`), or there."""
    place = index
    if IN_WORDS:
        place = index // 16 * 16 + index % 8 // 2 * 4 + index % 2 * 2 + 1 - index % 16 // 8
    return place


@triton.jit
def stored_value(value, factor, dtype: tl.constexpr):
    """A value as a tensor of this dtype stores it: times the factor if it is e4m3. Too large numbers become the largest."""
    if dtype == tl.float8e4nv:
        value = value.to(tl.float32) * factor
    return value.to(dtype)


@triton.jit
def _round_kernel(
    x, numbers, factor, width, stride, COLUMNS: tl.constexpr, IN_WORDS: tl.constexpr, CHAINED: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    value = tl.load(x + row * stride + column, mask=inside, other=0.0)
    goal = numbers + row * width + stored_place(column, IN_WORDS)
    tl.store(goal, stored_value(value, factor, numbers.dtype.element_ty), mask=inside)


def rounded(x: Tensor, rounding: Rounding) -> Tensor:
    """`rounded` (kernels/rounding.py) with a fixed factor. In the order of words, the width is a multiple of 16."""
    if x.dtype == torch.float8_e4m3fn:
        return x
    rows, width = x.shape
    numbers = empty((rows, width), torch.float8_e4m3fn, x.device)
    factor, in_words = stored_as(rounding)
    _round_kernel[(rows, triton.cdiv(width, _COLUMNS))](
        x,
        numbers,
        factor,
        width,
        x.stride(0),
        COLUMNS=_COLUMNS,
        IN_WORDS=in_words,
        num_warps=4,
        **chaining(),
    )
    return numbers
