"""Cases of the linear kernel for 4-bit codes (kernels/linear/codes_hopper.py)."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from orthrus.kernels.linear import codes_hopper
from orthrus.kernels.linear.codes import Codes
from orthrus.kernels.linear.codes_gpu import CodeWeight, code_layer
from orthrus.kernels.rounding import Rounding
from tests.ptx.launches import Edit, emulating
from tests.ptx.machine import Way
from tests.ptx.tensors import check, check_stored, randn, unset


def codes(outs: int, ins: int, seed: int) -> Codes:
    """Random codes, with tables that differ much."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 16, (outs, ins), generator=generator, dtype=torch.uint8)
    sizes = (
        torch.rand(outs, ins // 128, 8, generator=generator)
        * torch.rand(outs, ins // 128, 1, generator=generator)
        * 8
    )
    return Codes(
        numbers, sizes.sort(2).values.to(torch.float8_e4m3fn), torch.rand(outs, generator=generator) + 0.1
    )


def made(weight: Codes, bias: Tensor | None, gated: bool = False) -> tuple[CodeWeight, Tensor]:
    """A layer, and its weight in float64."""
    return code_layer(weight, bias, gated, None, torch.bfloat16), weight.dequantised().double()


def launch(
    way: Way, x: Tensor, layer: CodeWeight, out: Tensor, parts: int = 1, *,
    programs: int, edit: Edit | None = None, rounding: Rounding | None = None, consumers: int | None = None,
) -> None:  # fmt: skip
    """`codes_hopper.launch`. Nothing may touch inputs and outputs before griddepcontrol.wait."""
    with emulating(codes_hopper, way, programs=programs, chained=(x, out), edit=edit):
        codes_hopper.launch(x, layer, out, parts, rounding=rounding, consumers=consumers)


def check_layer(
    way: Way, rows: int, outs: int, ins: int, consumers: int | None = None, *, programs: int = 2, edit: Edit | None = None
) -> None:  # fmt: skip
    bias = randn(outs, seed=8)
    layer, exact = made(codes(outs, ins, 3), bias)
    x = randn(rows, ins, seed=7).to(torch.float8_e4m3fn)
    out = unset(rows, outs)
    launch(way, x, layer, out, programs=programs, edit=edit, consumers=consumers)
    check(out, x.double() @ exact.T + bias.double())


def check_gated(way: Way, consumers: int) -> None:
    rows, outs, ins = 12, 104, 2048
    layer, exact = made(codes(2 * outs, ins, 3), None, gated=True)
    x = randn(rows, ins, seed=7).to(torch.float8_e4m3fn)
    gate, up = (x.double() @ exact.T).chunk(2, 1)
    rounding = Rounding(2.0**-12)
    out = unset(rows, outs).to(torch.float8_e4m3fn)
    launch(way, x, layer, out, programs=2, rounding=rounding, consumers=consumers)
    check_stored(out, silu(gate) * up, rounding)


def check_parts(way: Way, consumers: int) -> None:
    """The inputs are divided among programs, and each part of the sum goes to a tensor of its own. The parts differ in length."""
    rows, outs, ins, parts = 12, 192, 1280, 2
    layer, exact = made(codes(outs, ins, 3), None)
    x = randn(rows, ins, seed=7).to(torch.float8_e4m3fn)
    out = unset(parts, rows, outs, dtype=torch.float32)
    launch(way, x, layer, out, parts, programs=3, consumers=consumers)
    for own, where in zip(out, (slice(0, 512), slice(512, 1280)), strict=True):
        check(own, x[:, where].double() @ exact[:, where].T, 1e-5)
