"""The FP8 format: what it rounds to, how near a layer comes to the unrounded one, and a row against its company."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from orthrus.kernels.linear import Parameters, pack_weight
from orthrus.kernels.linear.fp8 import dequantise_weight, quantise_rows, quantise_weight, round_rows
from tests.kernels.interpreted import randn


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def test_every_block_has_a_scale_that_brings_its_largest_weight_to_448() -> None:
    """Edges that are no multiple of 128, blocks of very different sizes, and a block of zeros."""
    weight = randn(200, 300) * torch.tensor([1e-4, 1.0, 1e4]).repeat_interleave(128)[:300]
    weight[:128, 128:256] = 0
    numbers, scales = quantise_weight(weight)
    assert numbers.dtype == torch.float8_e4m3fn and numbers.shape == weight.shape and scales.shape == (2, 3)
    assert scales[0, 1] == 1
    torch.testing.assert_close(scales[1, 2] * 448, weight[128:, 256:].abs().max())
    # 3 bits of mantissa: half a unit of the last place is 1/16 of the number or less.
    rounded = dequantise_weight(numbers, scales)
    smallest = 2**-6 * scales.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    assert ((rounded - weight).abs() <= torch.maximum(weight.abs(), smallest) / 16 * 1.001).all()


def test_rows_have_a_scale_for_each_128_inputs() -> None:
    x = randn(5, 300) * torch.tensor([1e-4, 1.0, 1e4]).repeat_interleave(128)[:300]
    x[2, :128] = 0
    numbers, scales = quantise_rows(x)
    assert numbers.shape == x.shape and scales.shape == (5, 3) and scales[2, 0] == 1
    torch.testing.assert_close(scales[:, 1] * 448, x[:, 128:256].abs().amax(1))
    assert relative_error(round_rows(x)[:, :128], x[:, :128]) < 0.04
    assert torch.equal(round_rows(x[1:2]), round_rows(x)[1:2])


def projection(outs: int, ins: int, seed: int) -> Parameters:
    return {"weight": randn(outs, ins, seed=seed), "bias": randn(outs, seed=seed + 100)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_near_the_unrounded_one(dtype: torch.dtype) -> None:
    """Several projections with biases. Packing leaves the tensors themselves as they are."""
    projections = [projection(outs, 300, seed) for seed, outs in enumerate((200, 72))]
    projections = [{key: value.to(dtype) for key, value in p.items()} for p in projections]
    copies = [{key: value.clone() for key, value in p.items()} for p in projections]
    layer = pack_weight([[dict(p) for p in projections]], "fp8")
    assert all(torch.equal(p[key], c[key]) for p, c in zip(projections, copies, strict=True) for key in p)
    x = randn(20, 300, seed=7, dtype=dtype)
    exact = torch.cat([x.double() @ p["weight"].double().T + p["bias"].double() for p in projections], 1)
    got = layer.linear(x)
    assert got.dtype == dtype
    assert 0.01 < relative_error(got, exact) < 0.05
    for rows in (slice(0, 1), slice(3, 19)):
        assert torch.equal(layer.linear(x[rows]), got[rows])


def test_gate_and_up_meet_after_rounding() -> None:
    gate, up = (projection(72, 300, seed) for seed in (1, 2))
    x = randn(20, 300, seed=7) / 8
    gates, ups = (x @ p["weight"].T + p["bias"] for p in (gate, up))
    layer = pack_weight([[dict(gate), dict(up)]], "fp8", gated=True)
    assert relative_error(layer.linear_silu_mul(x), silu(gates) * ups) < 0.06
