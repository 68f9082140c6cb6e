"""The format "int4": weights as 4-bit codes with a scale for each output and 128 inputs (`codes`), and inputs in FP8.

It takes a little more than a quarter of the memory of bfloat16. It rounds to the nearest value and uses no calibration data. So
only drafts use it, which another pass verifies. Inputs are rounded to e4m3, with a scale for each 128 of a row. On a GPU it runs
in the kernels of fine-grained FP8 checkpoints. These can't pick tokens, so an LM head is kept in the format "fp8".
"""

import torch
from torch import Tensor

from orthrus.kernels.device import has_fp8_mma, runs_triton
from orthrus.kernels.linear.codes import round_to_codes
from orthrus.kernels.linear.dequantised import DequantisedWeight
from orthrus.kernels.linear.fp8 import Fp8Format
from orthrus.kernels.linear.fp8_block import round_blocks
from orthrus.kernels.linear.plain import PlainFormat
from orthrus.kernels.linear.split import Split
from orthrus.kernels.linear.weight import Parameters, SplitViews, Views, Weight, weight_format


@weight_format("int4")
class Int4Format:
    """Rounds a layer's weights to 4 bits. Biases are kept as they are."""

    @staticmethod
    def pack(views: Views, *, gated: bool, head: bool) -> Weight:
        """See `WeightFormat`. Raises ValueError for layers whose inputs are not a multiple of 128."""
        if head:
            return Fp8Format.pack(views, gated=gated, head=head)
        if _has_kernel(views):
            return _pack_for_gpu(views, gated, None)
        dtype = views[0][0]["weight"].dtype
        layer = PlainFormat.pack(_rounded(views), gated=gated, head=head)
        return DequantisedWeight(layer, dtype, round_blocks)

    @staticmethod
    def pack_split(views: Views, split: Split, *, gated: bool, head: bool) -> Weight:
        """See `SplitFormat`. Each rank rounds its own part of a layer. Raises ValueError as `pack` does."""
        if head:
            return Fp8Format.pack_split(views, split, gated=gated, head=head)
        if _has_kernel(views):
            return _pack_for_gpu(views, gated, split)
        dtype = views[0][0]["weight"].dtype
        layer = PlainFormat.pack_split(_rounded(views), split, gated=gated, head=head)
        return DequantisedWeight(layer, dtype, round_blocks)


def _has_kernel(views: Views) -> bool:
    return runs_triton(views[0][0]["weight"]) and has_fp8_mma()


def _pack_for_gpu(views: Views, gated: bool, split: Split | None) -> Weight:
    from orthrus.kernels.linear.grouped import code_layer

    layers: list[Weight] = []
    for view in views:
        projections = [round_to_codes(parameters.pop("weight")) for parameters in view]
        biases = [parameters.pop("bias") for parameters in view if "bias" in parameters]
        layers.append(code_layer(projections, torch.cat(biases) if biases else None, gated, split))
    return SplitViews.join(layers)


def _rounded(views: Views) -> list[list[Parameters]]:
    """Remove the tensors of the projections from `views`, and return them with the weights rounded as the format does."""
    return [[_rounded_projection(parameters) for parameters in view] for view in views]


def _rounded_projection(parameters: Parameters) -> Parameters:
    weight = parameters.pop("weight")
    rounded: Tensor = round_to_codes(weight).dequantised().to(weight.dtype)
    return {"weight": rounded} | ({"bias": parameters.pop("bias")} if "bias" in parameters else {})
