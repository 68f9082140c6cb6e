"""Cases of the stream kernel for weights with scales of groups (kernels/linear/grouped_hopper.py)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from orthrus.kernels.linear import grouped_hopper
from orthrus.kernels.linear.integers import pack_words
from orthrus.kernels.linear.types import GroupedLayer
from tests.ptx.launches import Edit, emulating
from tests.ptx.machine import Way
from tests.ptx.tensors import check, gated, randn, unset

Made = tuple[GroupedLayer, Tensor]
"""A layer, and its weight in float64."""


def integers(outs: int, ins: int, group: int, gated: bool, bias: Tensor | None) -> Made:
    """4-bit integers with zero points, as GPTQ has them."""
    generator = torch.Generator().manual_seed(4)
    numbers = torch.randint(0, 16, (outs, ins), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (ins // group, outs), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(ins // group, outs, generator=generator) * 0.1).half()
    wide_zeros, wide_scales = (t.double().T.repeat_interleave(group, 1) for t in (zeros, scales))
    layer = GroupedLayer(pack_words(numbers), scales, zeros, bias, group, 128, 4, gated)
    return layer, (numbers.double() - wide_zeros) * wide_scales


def fp8(outs: int, ins: int, group: int, gated: bool, bias: Tensor | None) -> Made:
    numbers = randn(outs, ins, seed=3).to(torch.float8_e4m3fn)
    scales = torch.rand(ins // group, outs, generator=torch.Generator().manual_seed(4)) * 0.1
    layer = GroupedLayer(numbers, scales, None, bias, group, 128, 0, gated)
    return layer, numbers.double() * scales.double().T.repeat_interleave(group, 1)


FORMATS: dict[str, Callable[[int, int, int, bool, Tensor | None], Made]] = {
    "integers": integers,
    "fp8": fp8,
}


def make_inputs(layer: GroupedLayer, rows: int, ins: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Inputs, their scales if the layer's format rounds them, and the same in float64."""
    if not layer.rounds_inputs:
        x = randn(rows, ins, seed=1)
        return x, None, x.double()
    numbers = randn(rows, ins, seed=7).to(torch.float8_e4m3fn)
    # The rows of scales are padded to 16 bytes.
    stride = -(-rows // 4) * 4
    scales = torch.rand(ins // 128, stride, generator=torch.Generator().manual_seed(5)) + 0.1
    return numbers, scales, numbers.double() * scales[:, :rows].double().T.repeat_interleave(128, 1)


def launch(
    way: Way, x: Tensor, layer: GroupedLayer, out: Tensor, *args: Any, programs: int, edit: Edit | None
) -> None:
    """`grouped_hopper.launch`. Nothing may touch inputs and outputs before griddepcontrol.wait."""
    with emulating(grouped_hopper, way, programs=programs, chained=(x, out, *args), edit=edit):
        grouped_hopper.launch(x, layer, out, *args)


def check_layer(
    way: Way, kind: str, rows: int, outs: int, ins: int, group: int = 128, *,
    programs: int = 2, edit: Edit | None = None,
) -> None:  # fmt: skip
    bias = randn(outs, seed=8)
    layer, exact = FORMATS[kind](outs, ins, group, False, bias)
    x, scales, wide = make_inputs(layer, rows, ins)
    out = unset(rows, outs)
    launch(way, x, layer, out, 1, scales, programs=programs, edit=edit)
    check(out, wide @ exact.T + bias.double())


def check_gated(way: Way, kind: str) -> None:
    rows, outs, ins = 12, 192, 2048
    layer, exact = FORMATS[kind](outs, ins, 128, True, None)
    x, scales, wide = make_inputs(layer, rows, ins)
    out = unset(rows, outs // 2)
    launch(way, x, layer, out, 1, scales, programs=3, edit=None)
    check(out, gated(wide @ exact.T))


def check_parts(way: Way, kind: str, parts: int) -> None:
    """The inputs are divided among programs, and each part of the sum goes to a tensor of its own."""
    rows, outs, ins = 12, 192, 2048
    layer, exact = FORMATS[kind](outs, ins, 128, False, None)
    x, scales, wide = make_inputs(layer, rows, ins)
    out = unset(parts, rows, outs, dtype=torch.float32)
    launch(way, x, layer, out, parts, scales, programs=3, edit=None)
    for own, inputs, weights in zip(out, wide.chunk(parts, 1), exact.chunk(parts, 1), strict=True):
        check(own, inputs @ weights.T, 1e-5)
