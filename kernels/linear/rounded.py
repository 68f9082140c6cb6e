"""Layers of formats that round weights and inputs, for devices without their kernels: the reference of these formats."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from orthrus.kernels.linear.plain import PlainFormat
from orthrus.kernels.linear.split import Split
from orthrus.kernels.linear.weight import Parameters, Views, Weight
from orthrus.kernels.rounding import Rounding, rounded

Round = Callable[[Tensor], Tensor]
"""Rounds weights [out_features, in_features], or inputs [rows, in_features]."""


def pack_rounded(
    views: Views,
    round_weight: Round,
    inputs: Round | Rounding,
    split: Split | None,
    *,
    gated: bool,
    head: bool,
) -> Weight:
    """Round the weights of a layer, and lay them out as the format "plain" does; see `pack_weight`. Biases are not rounded.

    inputs: see `RoundedWeight`. split: which part of the layer `views` hold; None for a whole layer.
    """

    def with_rounded_weight(parameters: Parameters) -> Parameters:
        weight = round_weight(parameters.pop("weight"))
        return {"weight": weight} | ({"bias": parameters.pop("bias")} if "bias" in parameters else {})

    dtype = views[0][0]["weight"].dtype
    projections = [[with_rounded_weight(parameters) for parameters in view] for view in views]
    if split is None:
        return RoundedWeight(PlainFormat.pack(projections, gated=gated, head=head), inputs, dtype)
    return RoundedWeight(PlainFormat.pack_split(projections, split, gated=gated, head=head), inputs, dtype)


class RoundedWeight(Weight):
    """Rounded weights and inputs, multiplied in the model's dtype.

    It computes what the format's kernels compute, but needs the memory of the unrounded weights.
    """

    def __init__(self, weight: Weight, inputs: Round | Rounding, dtype: torch.dtype) -> None:
        """weight: the layer with its weights rounded. inputs: how inputs are rounded. dtype: the model's."""
        self._weight, self._inputs, self._dtype = weight, inputs, dtype

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes

    @property
    def rounding(self) -> Rounding | None:
        return self._inputs if isinstance(self._inputs, Rounding) else None

    def with_factor(self, factor: float) -> Weight:
        if self.rounding is None:
            return self
        return RoundedWeight(self._weight, replace(self.rounding, factor=factor), self._dtype)

    def linear(self, x: Tensor, num_ar: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        return self._weight.linear(self._round(x), num_ar, out)

    def linear_silu_mul(
        self, x: Tensor, num_ar: Tensor | None = None, rounding: Rounding | None = None
    ) -> Tensor:
        return self._weight.linear_silu_mul(self._round(x), num_ar, rounding)

    def _round(self, x: Tensor) -> Tensor:
        """x rounded, in the model's dtype."""
        if isinstance(self._inputs, Rounding):
            assert self._inputs.factor is not None
            return rounded(x, self._inputs).to(self._dtype) / self._inputs.factor
        return self._inputs(x).to(x.dtype)
