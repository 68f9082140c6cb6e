"""Layers of weights that are stored as integers: on a CPU dequantised, on a GPU as they are."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from orthrus.kernels.device import runs_triton
from orthrus.kernels.linear.dequantised import pack_dequantised
from orthrus.kernels.linear.integers import Integers
from orthrus.kernels.linear.weight import SplitViews, Views, Weight

Reader = Callable[[Mapping[str, Tensor]], Integers]
"""Reads a projection's tensors as a format stores them."""


def pack_integers(views: Views, read: Reader, *, gated: bool, head: bool) -> Weight:
    """Lay out the weights of a layer; see `WeightFormat`."""
    first = views[0][0]["scales"]
    if runs_triton(first):
        from orthrus.kernels.linear.grouped import integer_layer

        layers: list[Weight] = []
        for view in views:
            parts = [read(parameters) for parameters in view]
            biases = [parameters["bias"] for parameters in view if "bias" in parameters]
            for parameters in view:
                parameters.clear()
            layers.append(integer_layer(parts, torch.cat(biases) if biases else None, gated))
        return SplitViews.join(layers)
    return pack_dequantised(views, first, gated=gated, head=head)
