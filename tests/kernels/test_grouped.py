"""The kernel for weights with scales for groups of inputs, in Triton's interpreter: against float64, and a row alone."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from orthrus.kernels.linear import fp8_block
from orthrus.kernels.linear.awq import read_awq
from orthrus.kernels.linear.blocks_triton import quantise_inputs
from orthrus.kernels.linear.fp8_block import quantise_blocks
from orthrus.kernels.linear.gptq import read_gptq
from orthrus.kernels.linear.grouped import fp8_layer, integer_layer
from orthrus.kernels.linear.types import LinearTiles
from tests.kernels.interpreted import DTYPES, assert_near, interpreted, randn
from tests.quantised import AWQ, GPTQ, GPTQ8, quantised_weight

pytestmark = interpreted


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize(
    "settings", [GPTQ, GPTQ8, AWQ, GPTQ | {"desc_act": True}], ids=["4", "8", "awq", "act_order"]
)
def test_layers_are_near_float64_on_the_same_numbers(
    settings: dict[str, Any], group_size: int, gated: bool, dtype: torch.dtype
) -> None:
    settings = settings | {"group_size": group_size}
    read = read_awq if settings["quant_method"] == "awq" else read_gptq
    parts = []
    for seed in (1, 1):  # The same seed: with `desc_act`, the projections of a layer must have one order.
        stored = quantised_weight("weight", randn(72, 256, seed=seed) * 0.1, settings)
        parts.append(read({name.rpartition(".")[2]: tensor for name, tensor in stored.items()}))
    weight = torch.cat([part.dequantised() for part in parts]).double()
    bias = randn(144, seed=5).to(dtype)
    layer = integer_layer(parts, bias, gated)
    x = randn(20, 256, seed=7, dtype=dtype)
    tiles = LinearTiles(64, 16, layer.depth, warps=4, stages=2)
    exact = x.double() @ weight.T + bias.double()
    if gated:
        gate, up = exact.chunk(2, 1)
        exact = torch.nn.functional.silu(gate) * up
    run = layer.linear_silu_mul if gated else layer.linear
    got = run(x, tiles=tiles)
    assert got.dtype == dtype
    assert_near(got, exact)
    assert torch.equal(run(x[3:4], tiles=tiles), got[3:4])


@pytest.mark.parametrize("gated", [False, True])
def test_fp8_layers_multiply_by_the_scales_of_blocks(gated: bool) -> None:
    parts = [quantise_blocks(randn(72, 272, seed=seed) * torch.linspace(1, 9, 272)) for seed in (1, 2)]
    spread = [scales.repeat_interleave(128, 0)[:72] for _, scales in parts]
    exact = torch.cat(
        [
            numbers.double() * scales.double().repeat_interleave(128, 1)[:, :272]
            for (numbers, _), scales in zip(parts, spread, strict=True)
        ]
    )
    numbers = torch.cat([part.view(torch.uint8) for part, _ in parts]).view(torch.float8_e4m3fn)
    bias = randn(144, seed=5)
    layer = fp8_layer(numbers, torch.cat(spread).T, bias, gated)
    x = randn(20, 272, seed=7) * torch.linspace(1, 9, 272)
    rounded, scales = quantise_inputs(x)
    scales = scales[:, :20].T
    assert torch.equal(scales, fp8_block.quantise_inputs(x)[1])
    inputs = rounded.double() * scales.double().repeat_interleave(128, 1)[:, :272]
    expected = inputs @ exact.T + bias.double()
    if gated:
        gate, up = expected.chunk(2, 1)
        expected = torch.nn.functional.silu(gate) * up
    got = layer.linear_silu_mul(x) if gated else layer.linear(x)
    assert float((got - expected).norm() / expected.norm()) < 1e-5


@interpreted
def test_a_norm_rounds_groups_as_the_next_layer_would() -> None:
    """Only scales are compared to the bit: the interpreter loses carries when it rounds numbers. tests/gpu compares numbers."""
    from orthrus.kernels.linear.add_rms_norm import add_rms_norm
    from orthrus.kernels.linear.blocks_triton import RoundedGroups, quantise_inputs
    from orthrus.kernels.rounding import Rounding

    draw = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(5, 304, generator=draw) for _ in range(2))
    _, normed = add_rms_norm(x, residual, torch.randn(304, generator=draw), 1e-6, rounding=Rounding(None))
    assert isinstance(normed, RoundedGroups)
    made = quantise_inputs(normed)
    assert made == (normed.numbers, normed.scales), "nothing is left to do"
    alone = quantise_inputs(normed[:])
    assert torch.equal(made[1][:, :5], alone[1][:, :5])
    assert torch.allclose(made[0].float(), alone[0].float(), rtol=0.07)
