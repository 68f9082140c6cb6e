"""Inputs of fine-grained FP8 layers on a GPU: e4m3 numbers with a scale for each 128 inputs, those of `fp8_block`."""

from typing import Self

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from orthrus.kernels.device import chaining
from orthrus.kernels.workspace import empty

_GROUPS = 16
"""Groups of 128 inputs that a program rounds."""


@triton.jit
def round_groups(value):
    """Groups [groups, 128] as e4m3 numbers, and the scale of each group. A value is about its number times the scale."""
    largest = tl.max(tl.abs(value), 1)
    full = tl.maximum(tl.where(largest > 0, largest, 448.0), 2.0**-100)  # Its inverse is finite.
    return (value * tl.div_rn(448.0, full)[:, None]).to(tl.float8e4nv), full * (1.0 / 448.0)


@triton.jit
def _quantise_kernel(
    x, numbers, scales, ins, groups, x_stride, stride, GROUPS: tl.constexpr, CHAINED: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    number, scale = round_groups(
        tl.load(x + row * x_stride + column, mask=column < ins, other=0.0).to(tl.float32)
    )
    tl.store(numbers + row * ins + column, number, mask=column < ins)
    tl.store(scales + group * stride + row, scale, mask=group < groups)


class RoundedGroups(Tensor):
    """Rows [rows, ins], and the same rows in FP8 as `quantise_inputs` returns them, which the same kernel has made.

    To other operations they are plain rows.
    """

    numbers: Tensor
    """e4m3 [rows, ins]."""
    scales: Tensor
    """float32 [ins / 128, at least rows]."""

    # Results of operations on such rows are plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, rows: Tensor, numbers: Tensor, scales: Tensor) -> Self:
        result = rows.as_subclass(cls)
        result.numbers, result.scales = numbers, scales
        return result


def empty_groups(rows: int, ins: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for the numbers and scales of rows: see `quantise_inputs`."""
    groups, stride = triton.cdiv(ins, 128), triton.cdiv(rows, 4) * 4
    return empty((rows, ins), torch.float8_e4m3fn, device), empty((groups, stride), torch.float32, device)


def quantise_inputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """x as e4m3 numbers [rows, ins], and their scales as float32 [ins / 128, at least rows]: see `fp8_block.quantise_inputs`.

    The scales of a group are contiguous, and begin at multiples of 16 bytes. `RoundedGroups` have both already.
    """
    if isinstance(x, RoundedGroups):
        return x.numbers, x.scales
    rows, ins = x.shape
    numbers, scales = empty_groups(rows, ins, x.device)
    groups, stride = scales.shape
    _quantise_kernel[(rows, triton.cdiv(groups, _GROUPS))](
        x, numbers, scales, ins, groups, x.stride(0), stride, GROUPS=_GROUPS, num_warps=4, **chaining()
    )
    return numbers, scales
