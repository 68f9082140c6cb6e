"""Weights that a checkpoint stores in few bits, in one of the formats that are published.

Each of these formats is registered under the names of the tensors that it stores a weight as. So the format of a weight follows
from its tensors. The weight format "plain" keeps these weights as they are stored. Other weight formats get them dequantised.
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
    """Decorator of a class: `stored_format_of` finds it by its `stored_as` from now on."""
    _STORED[format.stored_as] = format
    return format


def stored_format_of(parameters: Mapping[str, Tensor]) -> StoredFormat | None:
    """The format that a projection is stored in; None if its weight is not quantised."""
    return _STORED.get(frozenset(parameters) - {"bias"})


def dense(parameters: Parameters) -> Parameters:
    """Remove the tensors of a projection and return them. A quantised weight is dequantised."""
    found = stored_format_of(parameters)
    taken = dict(parameters)
    parameters.clear()
    if found is None:
        return taken
    return {"weight": found.dequantise(taken)} | {k: v for k, v in taken.items() if k == "bias"}


def float_type(scales: Tensor) -> torch.dtype:
    """The dtype to which a weight with these scales is dequantised: at least float32, since 16 bits would round it."""
    return torch.promote_types(scales.dtype, torch.float32)
