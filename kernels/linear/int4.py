"""The format "int4": weights as 4-bit integers, with a scale and a zero point for each output of 128 inputs.

It takes a little more than a quarter of the memory of bfloat16. It rounds to the nearest integer and uses no calibration data. So
only passes whose results may be rough run in it: drafts, which another pass verifies. Inputs are not rounded. On a GPU it runs in
the kernels of GPTQ and AWQ checkpoints. These do not pick tokens, so an LM head is kept in the format "fp8".
"""

from torch import Tensor

from orthrus.kernels.device import runs_triton
from orthrus.kernels.int4_sizes import GROUP
from orthrus.kernels.linear.fp8 import Fp8Format
from orthrus.kernels.linear.integer_layers import integer_weight
from orthrus.kernels.linear.integers import Integers, round_to_integers
from orthrus.kernels.linear.plain import PlainFormat
from orthrus.kernels.linear.split import Split
from orthrus.kernels.linear.weight import Parameters, Views, Weight, weight_format


@weight_format("int4")
class Int4Format:
    """Rounds a layer's weights to 4 bits. Biases are kept as they are."""

    @staticmethod
    def pack(views: Views, *, gated: bool, head: bool) -> Weight:
        """See `WeightFormat`. Raises ValueError for layers whose inputs can't be cut into groups."""
        if head:
            return Fp8Format.pack(views, gated=gated, head=head)
        if runs_triton(views[0][0]["weight"]):
            return integer_weight(views, _integers, gated=gated)
        return PlainFormat.pack(_rounded(views), gated=gated, head=head)

    @staticmethod
    def pack_split(views: Views, split: Split, *, gated: bool, head: bool) -> Weight:
        """See `SplitFormat`. Each rank rounds the part that it has. Raises ValueError as `pack` does."""
        if head:
            return Fp8Format.pack_split(views, split, gated=gated, head=head)
        if runs_triton(views[0][0]["weight"]):
            return integer_weight(views, _integers, gated=gated, split=split)
        return PlainFormat.pack_split(_rounded(views), split, gated=gated, head=head)


def _integers(parameters: Parameters) -> Integers:
    return round_to_integers(parameters["weight"], 4, GROUP)


def _rounded(views: Views) -> list[list[Parameters]]:
    """The tensors of the projections, taken out of `views`, with the weights rounded to what the format holds."""
    return [[_rounded_projection(parameters) for parameters in view] for view in views]


def _rounded_projection(parameters: Parameters) -> Parameters:
    rounded: Tensor = _integers(parameters).dequantised().to(parameters.pop("weight").dtype)
    return {"weight": rounded} | ({"bias": parameters.pop("bias")} if "bias" in parameters else {})
