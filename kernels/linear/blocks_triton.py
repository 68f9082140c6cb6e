"""Inputs of fine-grained FP8 layers on a GPU: e4m3 numbers with a scale for each 128 inputs, those of `fp8_block`."""

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
def _quantise_kernel(
    x, numbers, scales, ins, groups, x_stride, stride, GROUPS: tl.constexpr, CHAINED: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    place = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    value = tl.load(x + row * x_stride + place, mask=place < ins, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(value), 1)
    full = tl.maximum(tl.where(largest > 0, largest, 448.0), 2.0**-100)  # Its inverse is finite.
    number = (value * tl.div_rn(448.0, full)[:, None]).to(tl.float8e4nv)
    tl.store(numbers + row * ins + place, number, mask=place < ins)
    tl.store(scales + group * stride + row, full * (1.0 / 448.0), mask=group < groups)


def quantise_inputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """x as e4m3 numbers [rows, ins], and their scales as float32 [ins / 128, at least rows]: see `fp8_block.quantise_inputs`.

    The scales of a group lie side by side, and begin at multiples of 16 bytes.
    """
    rows, ins = x.shape
    groups = triton.cdiv(ins, 128)
    numbers = empty((rows, ins), torch.float8_e4m3fn, x.device)
    stride = triton.cdiv(rows, 4) * 4
    scales = empty((groups, stride), torch.float32, x.device)
    _quantise_kernel[(rows, triton.cdiv(groups, _GROUPS))](
        x, numbers, scales, ins, groups, x.stride(0), stride, GROUPS=_GROUPS, num_warps=4, **chaining()
    )
    return numbers, scales
