"""Weights that a checkpoint stores in few bits, in one of the formats that are published.

Such a format is registered by the tensors that it stores a weight as, so the tensors themselves tell how they are to be read.
The format "plain" keeps these weights as they are stored. Other formats are given them dequantised.
"""

from collections.abc import Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from orthrus.kernels.linear.weight import Parameters, Views, Weight


class StoredFormat(Protocol):
    """What `stored_format` registers."""

    stored_as: frozenset[str]
    """The last parts of the names of the tensors that a weight is stored as."""

    def pack(self, views: Views, *, gated: bool, head: bool) -> Weight:
        """See `WeightFormat`."""

    def dequantise(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The weight [out_features, in_features] that a projection's tensors stand for, in float32 or wider."""


_STORED: dict[frozenset[str], StoredFormat] = {}
_Format = TypeVar("_Format", bound=StoredFormat)


def stored_format(format: _Format) -> _Format:
    """Decorator of a class: weights that are stored in its way are found from now on."""
    _STORED[format.stored_as] = format
    return format


def stored_format_of(parameters: Mapping[str, Tensor]) -> StoredFormat | None:
    """The format that a projection is stored in; None if its weight is stored in full."""
    return _STORED.get(frozenset(parameters) - {"bias"})


def dense(parameters: Parameters) -> Parameters:
    """The tensors of a projection, taken out of it, with the weight in full."""
    found = stored_format_of(parameters)
    taken = dict(parameters)
    parameters.clear()
    if found is None:
        return taken
    return {"weight": found.dequantise(taken)} | {k: v for k, v in taken.items() if k == "bias"}


def float_type(scales: Tensor) -> torch.dtype:
    """What a weight with these scales is dequantised to: 16 bits would not hold it."""
    return torch.promote_types(scales.dtype, torch.float32)
