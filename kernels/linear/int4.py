"""The format "int4": weights as 4-bit codes with a scale for each output and 128 inputs (`codes`), and inputs in FP8.

It takes a little more than a quarter of the memory of bfloat16. It rounds to the nearest value and uses no calibration data. So
only drafts use it, which another pass verifies. Inputs are rounded to e4m3, with a scale for each 128 of a row. On a GPU it runs
in the kernels of fine-grained FP8 checkpoints. These can't pick tokens, so an LM head is kept in the format "fp8".
"""

import torch
from torch import Tensor

from orthrus.kernels.device import has_fp8_mma, runs_triton
from orthrus.kernels.linear.codes import round_to_codes
from orthrus.kernels.linear.fp8 import Fp8Format
from orthrus.kernels.linear.fp8_block import round_blocks
from orthrus.kernels.linear.rounded import pack_rounded
from orthrus.kernels.linear.split import Split
from orthrus.kernels.linear.weight import SplitViews, Views, Weight, weight_format


@weight_format("int4")
class Int4Format:
    """Rounds a layer's weights to 4 bits. Biases are kept as they are."""

    @staticmethod
    def pack(views: Views, *, gated: bool, head: bool) -> Weight:
        """See `WeightFormat`. Raises ValueError for layers whose inputs are not a multiple of 128."""
        return Fp8Format.pack(views, gated=gated, head=head) if head else _pack(views, None, gated)

    @staticmethod
    def pack_split(views: Views, split: Split, *, gated: bool, head: bool) -> Weight:
        """See `SplitFormat`. Each rank rounds its own part of a layer. Raises ValueError as `pack` does."""
        return (
            Fp8Format.pack_split(views, split, gated=gated, head=head) if head else _pack(views, split, gated)
        )


def _pack(views: Views, split: Split | None, gated: bool) -> Weight:
    if runs_triton(views[0][0]["weight"]) and has_fp8_mma():
        return _pack_for_gpu(views, gated, split)
    return pack_rounded(views, _round_weight, round_blocks, split, gated=gated, head=False)


def _pack_for_gpu(views: Views, gated: bool, split: Split | None) -> Weight:
    from orthrus.kernels.linear.grouped import code_layer

    layers: list[Weight] = []
    for view in views:
        projections = [round_to_codes(parameters.pop("weight")) for parameters in view]
        biases = [parameters.pop("bias") for parameters in view if "bias" in parameters]
        layers.append(code_layer(projections, torch.cat(biases) if biases else None, gated, split))
    return SplitViews.join(layers)


def _round_weight(weight: Tensor) -> Tensor:
    return round_to_codes(weight).dequantised().to(weight.dtype)
