"""The kernel of weights with scales for groups of inputs in Triton's interpreter: near float64, and a row against its company."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from orthrus.kernels.linear.awq import read_awq
from orthrus.kernels.linear.gptq import read_gptq
from orthrus.kernels.linear.grouped import integer_layer
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
    for seed in (1, 1):  # One seed: with `desc_act`, the projections of a layer have one order.
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
