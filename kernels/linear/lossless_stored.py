"""Weights in 12 bits as a checkpoint with `quant_method: lossless12` stores them: what `LosslessLayer` has of one projection.

A weight [outs, ins] is stored as weight_high [outs, ins / 4], weight_low [outs, ins / 8], weight_exceptions
[outs / 64, ins / 128, 32] and weight_scales [outs]. These tensors are checked when they are read, because a kernel would write
wherever a wrong list of exceptions tells it to.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from orthrus.kernels.linear.dequantised import pack_dequantised
from orthrus.kernels.linear.lossless import (
    EXPONENT,
    LEAST_BASE,
    MOST_BASE,
    Exceptions,
    exceptions_in,
    lists_of,
    pack_lossless,
    unpack_lossless,
)
from orthrus.kernels.linear.plain import alternate
from orthrus.kernels.linear.stored import float_type, stored_format
from orthrus.kernels.linear.types import DenseLayer, LosslessLayer
from orthrus.kernels.linear.weight import Views, Weight

PARTS = ("weight_high", "weight_low", "weight_exceptions", "weight_scales")


@stored_format
class StoredLossless:
    """Runs these weights where there is no kernel for them: dequantised, in float32."""

    stored_as: ClassVar[frozenset[str]] = frozenset(PARTS)

    @staticmethod
    def pack(views: Views, *, gated: bool, head: bool) -> Weight:
        """See `WeightFormat`."""
        return pack_dequantised(views, views[0][0]["weight_scales"], gated=gated, head=head)

    @staticmethod
    def dequantise(parameters: Mapping[str, Tensor]) -> Tensor:
        """See `StoredFormat`."""
        scales = parameters["weight_scales"]
        return unpack_lossless(_layer([[dict(parameters)]])).weights[0].to(float_type(scales))


def store(weight: Tensor) -> dict[str, Tensor]:
    """What a bfloat16 weight [outs, ins] is stored as. Raises NotPacked if it can't be packed."""
    layer = pack_lossless(DenseLayer((weight,)))
    return dict(zip(PARTS, (layer.high, layer.low, layer.exceptions, layer.scales[0]), strict=True))


def is_stored(parameters: Mapping[str, Tensor]) -> bool:
    """Whether a projection is stored in 12 bits."""
    return StoredLossless.stored_as <= set(parameters)


def join_stored(views: Views, gated: bool) -> LosslessLayer:
    """Concatenate the projections of a layer. Their tensors stay in `views`.

    Raises ValueError for tensors that can't be used, and NotPacked if the weights of a gated layer can't be packed side by side.
    """
    layer = _layer(views)
    biases = [torch.cat([p["bias"] for p in view]) for view in views if "bias" in view[0]]
    bias = torch.stack(biases) if biases else None
    if not gated:
        return LosslessLayer(layer.high, layer.low, layer.exceptions, layer.scales, bias)
    order = alternate(torch.arange(layer.outs, device=layer.high.device))
    found = exceptions_in(layer.exceptions)
    moved = Exceptions(order.argsort()[found.row], found.column, found.bits)
    lists = lists_of(moved, layer.outs, layer.high.shape[1] * 4)
    bias = None if bias is None else bias[:, order]
    return LosslessLayer(layer.high[order], layer.low[order], lists, layer.scales[:, order], bias, True)


def _layer(views: Views) -> LosslessLayer:
    """The projections of each view, and then the views, concatenated along the outputs, without biases."""
    high, low, lists, scales = (torch.cat([p[part] for view in views for p in view]) for part in PARTS)
    scales = scales.float()
    exponents = (scales.view(torch.int32) >> 23) - 127
    powers = (scales.view(torch.int32) & 0x7FFFFF == 0) & (exponents.abs() <= MOST_BASE - EXPONENT)
    if not bool(powers.all()):
        raise ValueError(
            f"weight_scales must be powers of two from 2**{LEAST_BASE - EXPONENT} to 2**{MOST_BASE - EXPONENT}: "
            "download or save the checkpoint again"
        )
    # The lists are made anew, so that no entry points outside its tile.
    lists = lists_of(exceptions_in(lists), high.shape[0], high.shape[1] * 4)
    return LosslessLayer(high, low, lists, scales.view(len(views), -1))
