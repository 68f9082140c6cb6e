"""Linear layers in plain PyTorch, for any device and dtype."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from orthrus.kernels.linear.types import GATE_BLOCK, DenseLayer
from orthrus.kernels.linear.weight import Weight, apply_views
from orthrus.kernels.rounding import Rounding, rounded
from orthrus.kernels.rows.activation import silu_mul

_ROW_TILE = 16
"""Every product has this number of rows, because a library may choose the order of its sums by the number of rows."""


@dataclass(frozen=True)
class DenseWeight(DenseLayer, Weight):
    """Weights as plain tensors, multiplied by PyTorch: the reference of `TritonWeight`."""

    @property
    def nbytes(self) -> int:
        return self.tensor_bytes

    def linear(self, x: Tensor, num_ar: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        result = apply_views([partial(self._one_view, view) for view in range(len(self.weights))], x, num_ar)
        return result if out is None else out.copy_(result)

    def _one_view(self, view: int, x: Tensor) -> Tensor:
        out = product(x, self.weights[view])
        return out if self.bias is None else out.add_(self.bias[view])

    def linear_silu_mul(
        self, x: Tensor, num_ar: Tensor | None = None, rounding: Rounding | None = None
    ) -> Tensor:
        gate_up = self.linear(x, num_ar)
        if self.interleaved:
            gate_up = gate_up.unflatten(1, (-1, 2, GATE_BLOCK)).transpose(1, 2).flatten(1)
        return rounded(silu_mul(gate_up), rounding)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [rows, in_features] @ weight.T -> [rows, out_features]; a row's bits do not depend on the other rows."""
    tiles = pad_rows(x, _ROW_TILE).split(_ROW_TILE)
    return torch.cat([F.linear(tile, weight) for tile in tiles])[: x.shape[0]]


def pad_rows(x: Tensor, multiple: int) -> Tensor:
    """x [rows, in_features] with zero rows added, up to a multiple of `multiple` rows."""
    missing = -x.shape[0] % multiple
    return F.pad(x, (0, 0, 0, missing)) if missing else x
