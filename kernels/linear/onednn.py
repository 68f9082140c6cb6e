"""float32 weights on a CPU, laid out by oneDNN."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from orthrus.kernels.linear.reference import pad_rows
from orthrus.kernels.linear.weight import OneViewWeight, Parameters, join_projections

_ROW_TILE = 4
"""Rows are padded to a multiple of this. With fewer rows oneDNN may use matrix-vector code, which rounds differently."""
_PACK_ROWS = 8
"""The layout is made for this number of rows. Decode passes, which the memory bandwidth limits, have few rows."""


class OneDnnWeight(OneViewWeight):
    """A float32 weight in oneDNN's own layout. oneDNN adds in one order for any number of rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.bias = bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACK_ROWS)
        self._nbytes = weight.nbytes + (0 if bias is None else bias.nbytes)

    @classmethod
    def pack_view(cls, projections: Sequence[Parameters]) -> Self:
        return cls(*join_projections(projections))

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def product(self, x: Tensor) -> Tensor:
        tiled = pad_rows(x, _ROW_TILE)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(tiled, self._packed, None, "none", [], "")
        return out[: x.shape[0]]
