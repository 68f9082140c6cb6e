"""Layers whose stored weights are dequantised once, when they are packed: the reference of all stored formats. CPUs run it."""

from collections.abc import Callable

import torch
from torch import Tensor

from orthrus.kernels.linear.plain import PlainFormat
from orthrus.kernels.linear.stored import dense, float_type
from orthrus.kernels.linear.weight import Views, Weight
from orthrus.kernels.rounding import Rounding, rounded

Prepare = Callable[[Tensor], Tensor]
"""What a format does to the inputs [rows, in_features] of a layer first, such as rounding them."""


def pack_dequantised(
    views: Views, scales: Tensor, prepare: Prepare = lambda x: x, *, gated: bool, head: bool
) -> Weight:
    """Dequantise and lay out the weights of a layer; see `WeightFormat`. scales: those of one weight, which give the dtype."""
    dtype = float_type(scales)
    layer = PlainFormat.pack([[dense(p) for p in view] for view in views], gated=gated, head=head)
    return DequantisedWeight(layer, dtype, prepare)


class DequantisedWeight(Weight):
    """A layer of dequantised weights, multiplied in float32 or wider. It needs the memory of weights that are not quantised."""

    def __init__(self, weight: Weight, dtype: torch.dtype, prepare: Prepare) -> None:
        """weight: the layer dequantised, in `dtype`."""
        self._weight, self._dtype, self._prepare = weight, dtype, prepare

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes

    def linear(self, x: Tensor, num_ar: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        result = self._weight.linear(self._inputs(x), num_ar).to(x.dtype)
        return result if out is None else out.copy_(result)

    def linear_silu_mul(
        self, x: Tensor, num_ar: Tensor | None = None, rounding: Rounding | None = None
    ) -> Tensor:
        return rounded(self._weight.linear_silu_mul(self._inputs(x), num_ar).to(x.dtype), rounding)

    def _inputs(self, x: Tensor) -> Tensor:
        return self._prepare(x).to(self._dtype)
