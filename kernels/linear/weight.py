"""Row-invariant linear layers, plain and with what follows them in a transformer layer.

A matrix product's library picks its blocking from the number of rows, and a single row often takes another code path than
many. What runs on a CPU sums K in one order for any number of rows (`kernels/linear/library.py`): `tests/test_kernels.py` holds
it to that, bit for bit. On a GPU, `kernels/linear/triton.py` runs.

A layer may hold the weights of both views; rows below `num_ar` then use the AR view's, the others the diffusion view's.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.device import runs_triton
from kernels.linear.library import SEGMENT, Product, pack_weight, plain_product
from kernels.rows.activation import silu_mul
from kernels.rows.rms_norm import rms_norm
from kernels.rows.sampling import gumbel_argmax

GATE_BLOCK = 8
"""Outputs of the gate, then as many of up, in an interleaved layer: the step between a thread's rows in the matrix unit."""


@dataclass(frozen=True)
class PackedLinear:
    """A weight [out_features, in_features] for each view, laid out for `linear`.

    weights: one behind the other in memory; none where a CPU library has packed them. products: x @ weight.T of the packed
    ones. bias [views, out_features], optional. interleaved: for `linear_silu_mul`, see `pack_gated_linear`.
    """

    weights: tuple[Tensor, ...]
    bias: Tensor | None = None
    products: tuple[Product, ...] = ()
    interleaved: bool = False

    @property
    def views(self) -> int:
        return len(self.weights) or len(self.products)


def pack_linear(
    weights: list[Tensor], biases: list[Tensor] | None = None, segment: int = SEGMENT
) -> PackedLinear:
    """Lay weights out for `linear`, one for each view; float32 on a CPU is packed by a library where the build has one.

    The list is emptied, so that no more than one view is in memory twice. segment: most inputs in one sum, see `pack_weight`.
    """
    first, bias = weights[0], torch.stack(biases) if biases else None
    if first.device.type == "cpu" and first.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        products = []
        while weights:
            products.append(pack_weight(weights.pop(0), segment))
        return PackedLinear((), bias, tuple(products))
    stacked = torch.stack(weights) if len(weights) > 1 else first.contiguous().unsqueeze(0)
    weights.clear()
    return PackedLinear(stacked.unbind(), bias)


def pack_gated_linear(gate: Tensor, up: Tensor) -> PackedLinear:
    """Lay two weights [width, in_features] out for `linear_silu_mul`, as one layer.

    On a GPU, outputs alternate in blocks of `GATE_BLOCK`, so that one tile of the layer holds what belongs together.
    """
    if gate.is_cuda:
        blocks = [weight.unflatten(0, (-1, 1, GATE_BLOCK)) for weight in (gate, up)]
        return replace(pack_linear([torch.cat(blocks, 1).flatten(0, 2)]), interleaved=True)
    return pack_linear([torch.cat([gate, up])])


def linear(x: Tensor, layer: PackedLinear, num_ar: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x [rows, in_features] times the layer's weight, plus its bias: [rows, out_features], in `out` and its dtype if given.

    num_ar: int32 [1], needed for a layer of two views.
    """
    if runs_triton(x):
        from kernels.linear import triton as linear_triton

        return linear_triton.linear(x, layer, num_ar, out)
    if layer.views == 1:
        result = _one_view(x, layer, 0)
    else:
        assert num_ar is not None, "a layer of two views needs num_ar"
        split = int(num_ar)
        if split in (0, x.shape[0]):
            result = _one_view(x, layer, int(split == 0))
        else:
            result = torch.cat([_one_view(x[:split], layer, 0), _one_view(x[split:], layer, 1)])
    return result if out is None else out.copy_(result)


def _one_view(x: Tensor, layer: PackedLinear, view: int) -> Tensor:
    out = layer.products[view](x) if layer.products else plain_product(x, layer.weights[view])
    return out if layer.bias is None else out.add_(layer.bias[view])


def linear_silu_mul(x: Tensor, layer: PackedLinear) -> Tensor:
    """silu(gate) * up of a layer from `pack_gated_linear`: x [rows, in_features] -> [rows, width]."""
    if runs_triton(x):
        from kernels.linear import triton as linear_triton

        return linear_triton.linear_silu_mul(x, layer)
    gate_up = linear(x, layer)
    if layer.interleaved:
        gate_up = gate_up.unflatten(1, (-1, 2, GATE_BLOCK)).transpose(1, 2).flatten(1)
    return silu_mul(gate_up)


def linear_add_rms_norm(
    x: Tensor,
    layer: PackedLinear,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    num_ar: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """hidden = residual + linear(x, layer), and its RMS norm: both [rows, out_features]."""
    if runs_triton(x):
        from kernels.linear import triton as linear_triton

        return linear_triton.linear_add_rms_norm(x, layer, residual, norm_weight, eps, num_ar)
    hidden = residual + linear(x, layer, num_ar)
    return hidden, rms_norm(hidden, norm_weight, eps)


def linear_gumbel_argmax(
    x: Tensor,
    layer: PackedLinear,
    logits: Tensor,
    wanted: Tensor,
    temperatures: Tensor,
    keys: Tensor,
    picks: Tensor,
    first_pick: Tensor,
) -> None:
    """Pick a token for every row from the layer's outputs, as `gumbel_argmax` does from logits.

    logits: the outputs, float32 or wider [rows, out_features], where `wanted` (int32 [1]) is not 0; else anything, since
    writing them takes a GPU longer than picking from them.
    """
    if runs_triton(x):
        from kernels.linear import triton as linear_triton

        linear_triton.linear_gumbel_argmax(x, layer, logits, wanted, temperatures, keys, picks, first_pick)
        return
    linear(x, layer, out=logits)
    gumbel_argmax(logits, temperatures, keys, picks, first_pick)
