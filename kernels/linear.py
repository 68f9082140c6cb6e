"""Row-invariant linear layer.

A matrix product's library picks its blocking from the number of rows, and a single row often takes another code path than
many. With row counts padded to `ROW_TILE`, the CPU library (oneDNN over weights packed once) sums K in one order
for any number of rows: `tests/test_kernels.py` holds it to that, bit for bit. On a GPU, `kernels/linear_triton.py` runs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.device import runs_triton

ROW_TILE = 4
"""Row counts of a pass are padded to a multiple of this; fewer rows would reach matrix-vector code with its own rounding."""

_PACK_ROWS = 8
"""Row count that oneDNN lays the packed weights out for: decode passes are the ones that are short of bandwidth."""


@dataclass(frozen=True)
class PackedLinear:
    """A weight [out_features, in_features] and its optional bias [out_features], laid out for `linear`."""

    weight: Tensor
    bias: Tensor | None
    packed: bool

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """Lay `weight` out for `linear`. float32 on CPU is repacked by oneDNN where the build has it; others stay as they are."""
    packed = (
        weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    )
    if packed:
        weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACK_ROWS)
    return PackedLinear(weight, bias, packed)


def linear(x: Tensor, layer: PackedLinear) -> Tensor:
    """x [rows, in_features] times the layer's weight, plus its bias: [rows, out_features], in x's dtype.

    rows must be a multiple of `ROW_TILE`.
    """
    if runs_triton(x):
        from kernels import linear_triton

        return linear_triton.linear(x, layer)
    if layer.packed:
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")
    return F.linear(x, layer.weight, layer.bias)
