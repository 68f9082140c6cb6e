"""Layers of integer weights. On a GPU they stay integers. On a CPU they are dequantised when they are packed."""

from collections.abc import Callable

import torch

from orthrus.kernels.device import runs_triton
from orthrus.kernels.linear.dequantised import pack_dequantised
from orthrus.kernels.linear.integers import Integers
from orthrus.kernels.linear.weight import Parameters, SplitViews, Views, Weight

Reader = Callable[[Parameters], Integers]
"""A function from the tensors of a projection, as a format stores them, to its weight."""


def pack_integers(views: Views, read: Reader, *, gated: bool, head: bool) -> Weight:
    """Lay out the weights of a layer; see `WeightFormat`."""
    first = views[0][0]["scales"]
    if runs_triton(first):
        return _integer_weight(views, read, gated)
    return pack_dequantised(views, first, gated=gated, head=head)


def _integer_weight(views: Views, read: Reader, gated: bool) -> Weight:
    """The layer for the kernels on a GPU."""
    from orthrus.kernels.linear.grouped import integer_layer

    layers: list[Weight] = []
    for view in views:
        projections = [read(parameters) for parameters in view]
        biases = [parameters["bias"] for parameters in view if "bias" in parameters]
        for parameters in view:
            parameters.clear()
        layers.append(integer_layer(projections, torch.cat(biases) if biases else None, gated))
    return SplitViews.join(layers)
