"""Layers on a GPU whose weights have scales for groups of inputs, in the kernels of `grouped_triton` and `grouped_hopper`.

The weights are those of quantised checkpoints (fine-grained FP8, GPTQ and AWQ).

A layer has one view. The two views of a model are two layers (see `SplitViews`), and one of them may have another format.
"""

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from orthrus.kernels.linear import grouped_hopper, grouped_triton
from orthrus.kernels.linear.add_rms_norm import add_rms_norm
from orthrus.kernels.linear.blocks_triton import quantise_inputs
from orthrus.kernels.linear.integers import Integers, pack_words
from orthrus.kernels.linear.kernel_weight import KernelWeight
from orthrus.kernels.linear.plain import alternate
from orthrus.kernels.linear.tiles import num_parts
from orthrus.kernels.linear.types import GroupedLayer, LinearTiles
from orthrus.kernels.rounding import Rounding
from orthrus.kernels.workspace import empty

_CHUNK = 1024
"""Outputs of a weight that are packed at once."""
_DEEPEST = 128
_SHALLOWEST = 32
"""The most and the fewest inputs of a step. 32 inputs in 16 bits are two instructions of the tensor cores. 32 weights in 4 bits
are 16 bytes, the least that TMA loads."""


@dataclass(frozen=True)
class GroupedWeight(GroupedLayer, KernelWeight):
    """Weights with scales for groups of inputs. They are those of one GPU, which has the whole layer."""

    @property
    def rounding(self) -> Rounding | None:
        return Rounding(None) if self.rounds_inputs else None

    def linear_add_rms_norm(
        self,
        x: Tensor,
        residual: Tensor,
        norm_weight: Tensor,
        eps: float,
        num_ar: Tensor | None = None,
        rounding: Rounding | None = None,
        *,
        tiles: LinearTiles | None = None,
    ) -> tuple[Tensor, Tensor]:
        rows, outs = residual.shape
        parts = num_parts(outs, x.shape[1], grouped_hopper.STEP)
        if parts > 1:
            out = empty((parts, rows, outs), torch.float32, x.device)
        else:
            out = empty((rows, outs), x.dtype, x.device)
        self._run(x, out, num_ar, tiles, parts)
        bias = self.bias[None] if self.bias is not None and out.dim() == 3 else None
        return add_rms_norm(out, residual, norm_weight, eps, bias, rounding=rounding)

    def _run(
        self, x: Tensor, out: Tensor, num_ar: Tensor | None, tiles: LinearTiles | None, parts: int = 1
    ) -> None:
        """Write the layer's result to out: [rows, outs], or the sums of the parts [parts, rows, outs] without the bias."""
        if self.order is not None:
            x = x.index_select(1, self.order)
        x_scales = None
        if self.rounds_inputs:
            x, x_scales = quantise_inputs(x)
        if x.shape[1] * x.itemsize % 16:
            raise ValueError(
                f"a linear layer with {x.shape[1]} inputs of {x.dtype} can't run on a GPU: "
                "its rows must be multiples of 16 bytes"
            )
        if tiles is None and grouped_hopper.streams(x, self, parts):
            grouped_hopper.launch(x, self, out, parts, x_scales)
        else:
            grouped_triton.launch(x, self, out, parts, tiles, x_scales)


def fp8_layer(numbers: Tensor, scales: Tensor, bias: Tensor | None, gated: bool) -> GroupedWeight:
    """A layer of FP8 weights.

    numbers: e4m3 [outs, ins]. scales: [ins / 128, outs], rounded up. bias: [outs]. gated: whether the outputs are all of a gate
    and then all of up.
    """
    if gated:
        numbers = alternate(numbers.view(torch.uint8)).view(torch.float8_e4m3fn)
        scales = alternate(scales.T).T
        bias = None if bias is None else alternate(bias)
    return GroupedWeight(numbers.contiguous(), scales.contiguous(), None, bias, 128, 128, 0, gated)


def integer_layer(projections: list[Integers], bias: Tensor | None, gated: bool) -> GroupedWeight:
    """A layer of the projections' integers, concatenated along the outputs. bias: [outs].

    Raises ValueError for groups that the kernels can't run.
    """
    ins, groups, bits = projections[0].numbers.shape[1], projections[0].scales.shape[0], projections[0].bits
    size = ins // groups
    depth = gcd(size, _DEEPEST)
    if depth < _SHALLOWEST:
        raise ValueError(
            f"integer weights with groups of {size} inputs can't run on a GPU: quantise with a group_size that "
            f"{_SHALLOWEST} divides"
        )
    order = _order(projections)
    numbers = torch.cat([p.numbers for p in projections])
    scales, zeros = (torch.cat([getattr(p, name) for p in projections], 1) for name in ("scales", "zeros"))
    if order is not None:
        numbers = numbers.index_select(1, order)
    if gated:
        numbers, scales, zeros = alternate(numbers), alternate(scales.T).T, alternate(zeros.T).T
        bias = None if bias is None else alternate(bias)
    if bits == 4:
        # Packing makes 64-bit copies, which would need much memory for all outputs at once.
        numbers = torch.cat([pack_words(part) for part in numbers.split(_CHUNK)])
        zeros = zeros.to(torch.uint8)
    return GroupedWeight(
        numbers.contiguous(),
        scales.contiguous(),
        zeros.contiguous(),
        bias,
        size,
        depth,
        bits,
        gated,
        order,
    )


def _order(projections: list[Integers]) -> Tensor | None:
    """The inputs sorted by their groups; None if they are in order. Raises ValueError if the projections' orders differ."""
    first = projections[0].group_of
    if not all(torch.equal(p.group_of, first) for p in projections):
        raise ValueError(
            "the projections of a layer have different g_idx, which can't run on a GPU: quantise with desc_act false"
        )
    counts = torch.bincount(first, minlength=projections[0].scales.shape[0])
    if not bool((counts == counts[0]).all()):
        raise ValueError(
            "the groups of g_idx differ in size, which can't run on a GPU: quantise with desc_act false"
        )
    if bool((first[1:] >= first[:-1]).all()):
        return None
    return first.argsort(stable=True)
