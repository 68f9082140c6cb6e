"""The stored format "fp8" of checkpoints: e4m3 numbers with a scale for each block of 128 x 128 weights (fine-grained FP8).

The inputs of a layer are rounded to e4m3 too, with a scale for each 128 inputs of a row. FP8 products are summed over 128 inputs.
This sum is multiplied by both scales, and then added to the total.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from orthrus.kernels.device import has_fp8_mma, runs_triton
from orthrus.kernels.linear.dequantised import pack_dequantised
from orthrus.kernels.linear.fp8 import quantise_rows
from orthrus.kernels.linear.stored import float_type, stored_format
from orthrus.kernels.linear.weight import Parameters, SplitViews, Views, Weight, join_projections
from orthrus.kernels.rounding import LARGEST

BLOCK = 128
"""Outputs and inputs of a block."""


@stored_format
class Fp8BlockFormat:
    """Weights as a checkpoint with `quant_method: fp8` stores them: `weight` and `weight_scale_inv`."""

    stored_as: ClassVar[frozenset[str]] = frozenset({"weight", "weight_scale_inv"})

    @staticmethod
    def pack(views: Views, *, gated: bool, head: bool) -> Weight:
        """See `WeightFormat`."""
        first = views[0][0]["weight_scale_inv"]
        if runs_triton(first):
            return _pack_for_gpu(views, gated)
        return pack_dequantised(views, first, round_blocks, gated=gated, head=head)

    @staticmethod
    def dequantise(parameters: Mapping[str, Tensor]) -> Tensor:
        """`weight` e4m3 [outs, ins] times `weight_scale_inv` [outs / 128, ins / 128], both rounded up."""
        numbers, scales = parameters["weight"], parameters["weight_scale_inv"]
        dtype = float_type(scales)
        outs, ins = numbers.shape
        return numbers.to(dtype).mul_(_spread(scales.to(dtype), outs, ins))


def _pack_for_gpu(views: Views, gated: bool) -> Weight:
    """Raises ValueError on a GPU that does not multiply FP8."""
    from orthrus.kernels.linear.grouped import fp8_layer

    if not has_fp8_mma():
        raise ValueError(
            "an FP8 checkpoint needs a GPU of compute capability 8.9 or later: take one that is not quantised"
        )

    def one_view(view: Sequence[Parameters]) -> Weight:
        scales = [p.pop("weight_scale_inv").repeat_interleave(BLOCK, 0)[: len(p["weight"])] for p in view]
        # As bytes, because some operations do not take FP8 tensors.
        numbers, bias = join_projections([p | {"weight": p["weight"].view(torch.uint8)} for p in view])
        for parameters in view:
            parameters.clear()
        return fp8_layer(numbers.view(torch.float8_e4m3fn), torch.cat(scales).T, bias, gated)

    return SplitViews.join([one_view(view) for view in views])


def quantise_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [outs, ins] as e4m3 numbers [outs, ins] and float32 scales [outs / 128, ins / 128], both rounded up.

    The largest number of a block, in magnitude, is 448. A block of zeros has scale 1.
    """
    outs, ins = weight.shape
    padded = F.pad(weight.float(), (0, -ins % BLOCK, 0, -outs % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    largest = blocks.abs().amax((1, 3))
    scales = torch.where(largest > 0, largest, LARGEST) / LARGEST
    numbers = (padded / _spread(scales, *padded.shape)).clamp_(-LARGEST, LARGEST)
    return numbers[:outs, :ins].to(torch.float8_e4m3fn).contiguous(), scales


def quantise_inputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, ins] as e4m3 numbers [rows, ins] and float32 scales [rows, ins / 128], rounded up."""
    rows, ins = x.shape
    padded = F.pad(x, (0, -ins % BLOCK)).reshape(-1, BLOCK)
    numbers, scales = quantise_rows(padded)
    return numbers.view(rows, -1)[:, :ins], scales.view(rows, -1)


def round_blocks(x: Tensor) -> Tensor:
    """x [rows, ins] with each number rounded as `quantise_inputs` does, in float32."""
    numbers, scales = quantise_inputs(x)
    return numbers.float() * scales.repeat_interleave(BLOCK, 1)[:, : x.shape[1]]


def _spread(scales: Tensor, outs: int, ins: int) -> Tensor:
    """The scale of each weight: [outs, ins]."""
    return scales.repeat_interleave(BLOCK, 0)[:outs].repeat_interleave(BLOCK, 1)[:, :ins]
