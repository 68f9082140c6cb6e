"""Layers of formats that round weights and inputs, for devices without their kernels: the reference of these formats."""

from collections.abc import Callable

from torch import Tensor

from orthrus.kernels.linear.plain import PlainFormat
from orthrus.kernels.linear.split import Split
from orthrus.kernels.linear.weight import Parameters, Views, Weight

Round = Callable[[Tensor], Tensor]
"""Rounds weights [out_features, in_features], or inputs [rows, in_features]."""


def pack_rounded(
    views: Views, round_weight: Round, round_inputs: Round, split: Split | None, *, gated: bool, head: bool
) -> Weight:
    """Round the weights of a layer, and lay them out as the format "plain" does; see `pack_weight`. Biases are not rounded.

    round_inputs: see `RoundedWeight`. split: which part of the layer `views` hold; None for a whole layer.
    """

    def rounded(parameters: Parameters) -> Parameters:
        weight = round_weight(parameters.pop("weight"))
        return {"weight": weight} | ({"bias": parameters.pop("bias")} if "bias" in parameters else {})

    projections = [[rounded(parameters) for parameters in view] for view in views]
    if split is None:
        return RoundedWeight(PlainFormat.pack(projections, gated=gated, head=head), round_inputs)
    return RoundedWeight(PlainFormat.pack_split(projections, split, gated=gated, head=head), round_inputs)


class RoundedWeight(Weight):
    """Rounded weights and inputs, multiplied in the model's dtype.

    It computes what the format's kernels compute, but needs the memory of the unrounded weights.
    """

    def __init__(self, weight: Weight, round_inputs: Round) -> None:
        """weight: the layer with its weights rounded. round_inputs: its result is converted to the inputs' dtype."""
        self._weight, self._round = weight, round_inputs

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes

    def linear(self, x: Tensor, num_ar: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        return self._weight.linear(self._round(x).to(x.dtype), num_ar, out)

    def linear_silu_mul(self, x: Tensor, num_ar: Tensor | None = None) -> Tensor:
        return self._weight.linear_silu_mul(self._round(x).to(x.dtype), num_ar)
