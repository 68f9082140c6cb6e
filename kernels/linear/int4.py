"""The format "int4": weights as 4-bit codes with a table of magnitudes for each output and 128 inputs (`codes`), inputs in FP8.

It takes a little more than a quarter of the memory of bfloat16. It rounds without calibration data. So only drafts use it, which
another pass verifies. The inputs of a layer have a fixed factor, as in the format "fp8".

Only the layers of an MLP have this format, and the model's other layers are in FP8 (`OUTSIDE_MLP`). MLPs have most of the weights
of a model, and drafts lose more by codes in attention.
"""

from torch import Tensor

from orthrus.kernels.device import has_warpgroup_mma, runs_triton
from orthrus.kernels.linear.codes import round_to_codes
from orthrus.kernels.linear.fp8 import UNSCALED
from orthrus.kernels.linear.rounded import pack_rounded
from orthrus.kernels.linear.split import Split
from orthrus.kernels.linear.weight import Views, Weight, join_projections, weight_format


@weight_format("int4")
class Int4Format:
    """Rounds a layer's weights to 4 bits. Biases are kept as they are."""

    @staticmethod
    def pack(views: Views, *, gated: bool, head: bool) -> Weight:
        """See `WeightFormat`. Raises ValueError for an LM head, and for layers whose inputs are not a multiple of 128."""
        return _pack(views, None, gated, head)

    @staticmethod
    def pack_split(views: Views, split: Split, *, gated: bool, head: bool) -> Weight:
        """See `SplitFormat`. A rank scales outputs by its own part of a row, and not by the whole row.

        So drafts may differ with the number of ranks, as in the format "fp8". The text does not differ. Raises ValueError as
        `pack` does.
        """
        return _pack(views, split, gated, head)


def _pack(views: Views, split: Split | None, gated: bool, head: bool) -> Weight:
    if head:
        raise ValueError("an LM head can't be kept in 4 bits: keep it in the format that OUTSIDE_MLP names")
    if runs_triton(views[0][0]["weight"]) and has_warpgroup_mma():
        from orthrus.kernels.linear.codes_gpu import code_layer

        [projections] = views  # An MLP has one view.
        weight, bias = join_projections(projections)
        return code_layer(round_to_codes(weight), bias, gated, split, weight.dtype)
    return pack_rounded(views, _round_weight, UNSCALED, split, gated=gated, head=False)


def _round_weight(weight: Tensor) -> Tensor:
    return round_to_codes(weight).dequantised().to(weight.dtype)
