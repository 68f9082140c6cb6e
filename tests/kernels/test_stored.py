"""Weights in the formats of published checkpoints: their dequantised values, and layers of them against float64 arithmetic."""

from typing import Any

import pytest
import torch
from torch import Tensor

from orthrus.kernels.linear import dense, pack_weight
from orthrus.kernels.linear.fp8_block import quantise_blocks, quantise_inputs
from orthrus.kernels.linear.gptq import quantise_gptq
from orthrus.kernels.linear.weight import Parameters
from tests.quantised import AWQ, FP8, GPTQ, SETTINGS, integers, quantised_weight


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def projection(settings: dict[str, Any], outs: int, ins: int, seed: int = 0) -> Parameters:
    found = quantised_weight("weight", random(outs, ins, seed=seed) * 0.1, settings)
    return {name.rpartition(".")[2]: tensor for name, tensor in found.items()}


def in_full(settings: dict[str, Any], outs: int, ins: int, seed: int = 0) -> Tensor:
    """The weight that `projection` stores, dequantised in float64 by the definition of its format."""
    weight = random(outs, ins, seed=seed) * 0.1
    if settings["quant_method"] == "fp8":
        stored = projection(settings, outs, ins, seed)
        scales = stored["weight_scale_inv"].double()
        rows, columns = (torch.arange(size) // 128 for size in (outs, ins))
        return stored["weight"].double() * scales[rows][:, columns]
    group_of = torch.arange(ins) // settings["group_size"]
    if settings.get("desc_act"):
        group_of = projection(settings, outs, ins, seed)["g_idx"].long()
    numbers, zeros, scales = integers(weight, group_of, settings["bits"])
    return (numbers.double() - zeros.double()[group_of].T) * scales.double()[group_of].T


@pytest.mark.parametrize("name", SETTINGS)
def test_dequantised_weights_match_the_definition_of_their_format(name: str) -> None:
    settings = SETTINGS[name]
    exact = in_full(settings, 192, 256)
    found = dense(projection(settings, 192, 256) | {"bias": torch.ones(192)})
    assert set(found) == {"weight", "bias"}
    torch.testing.assert_close(found["weight"].double(), exact, rtol=1e-6, atol=0)
    original = random(192, 256) * 0.1
    worst = (found["weight"] - original).abs().max() / original.abs().max()
    assert 0 < worst < (0.1 if settings.get("bits") == 4 else 0.04)


@pytest.mark.parametrize("name", SETTINGS)
def test_layers_match_float64_arithmetic_on_the_same_numbers(name: str) -> None:
    settings = SETTINGS[name]
    outs, ins = (64, 128, 64), 256
    exact = torch.cat([in_full(settings, n, ins, seed) for seed, n in enumerate(outs)])
    layer = pack_weight([[projection(settings, n, ins, seed) for seed, n in enumerate(outs)]])
    x = random(9, ins, seed=7)
    inputs = x.double()
    if name == "fp8":
        numbers, scales = quantise_inputs(x)
        inputs = numbers.double() * scales.double().repeat_interleave(128, 1)
    expected = inputs @ exact.T
    full = layer.linear(x)
    assert float((full - expected).norm() / expected.norm()) < 1e-6
    # A row alone has the same bits. With bfloat16 inputs, the result is rounded.
    for row in range(9):
        assert torch.equal(layer.linear(x[row : row + 1]), full[row : row + 1])
    halves = layer.linear(x.bfloat16())
    assert halves.dtype == torch.bfloat16
    assert float((halves - expected).norm() / expected.norm()) < 0.06


@pytest.mark.parametrize("name", SETTINGS)
def test_a_gated_layer_has_gate_and_up(name: str) -> None:
    settings, x = SETTINGS[name], random(5, 128, seed=3)
    layer = pack_weight([[projection(settings, 64, 128, seed) for seed in (1, 2)]], gated=True)
    gate, up = pack_weight([[projection(settings, 64, 128, seed) for seed in (1, 2)]]).linear(x).chunk(2, 1)
    torch.testing.assert_close(layer.linear_silu_mul(x), torch.nn.functional.silu(gate) * up)


def test_each_view_may_be_stored_in_its_own_way() -> None:
    x, num_ar = random(5, 128), torch.tensor([2])
    full = {"weight": random(64, 128, seed=4)}
    both = pack_weight([[projection(AWQ, 64, 128)], [dict(full)]])
    quantised, plain = pack_weight([[projection(AWQ, 64, 128)]]), pack_weight([[dict(full)]])
    assert torch.equal(both.linear(x, num_ar), torch.cat([quantised.linear(x[:2]), plain.linear(x[2:])]))
    assert both.nbytes == quantised.nbytes + plain.nbytes


def test_projections_of_a_layer_must_have_one_format() -> None:
    mixed = [projection(GPTQ, 64, 128), {"weight": random(64, 128)}]
    with pytest.raises(ValueError, match="stored in different formats: quantise all of q, k and v"):
        pack_weight([mixed])


def test_inputs_are_rounded_in_groups_of_128() -> None:
    x = random(3, 300)
    x[1, :128] = 0
    x[2, 128:256] *= 1000
    numbers, scales = quantise_inputs(x)
    assert numbers.shape == (3, 300) and scales.shape == (3, 3)
    largest = torch.stack([part.abs().amax(1) for part in x.split(128, 1)], 1)
    expected = torch.where(largest > 0, largest / 448, 1.0)
    torch.testing.assert_close(scales, expected)
    back = numbers.float() * scales.repeat_interleave(128, 1)[:, :300]
    assert bool(((back - x).abs() <= x.abs() / 16 + scales.repeat_interleave(128, 1)[:, :300] / 512).all())


def test_fp8_weights_are_quantised_as_transformers_does() -> None:
    weight = random(256, 384) * 0.1
    weight[:128, :128] = 0
    numbers, scales = quantise_blocks(weight)
    theirs = quantised_weight("weight", weight, FP8)
    torch.testing.assert_close(scales[1:], theirs["weight_scale_inv"][1:], rtol=1e-6, atol=0)
    differing = numbers.view(torch.uint8) != theirs["weight"].view(torch.uint8)
    assert differing.float().mean() < 1e-3, "both round to the nearest, but scales differ in their last bit"


@pytest.mark.parametrize(("bits", "worst"), [(4, 0.08), (8, 0.005)])
def test_gptq_weights_are_the_nearest_integers(bits: int, worst: float) -> None:
    weight = random(64, 256) * 0.1
    stored = quantise_gptq(weight, bits, 64)
    assert stored["qweight"].shape == (256 * bits // 32, 64) and stored["scales"].dtype == torch.float16
    found = dense(stored)["weight"]
    step = weight.unflatten(1, (4, 64)).abs().amax(2) / ((1 << (bits - 1)) - 1)
    assert bool(((found - weight).abs() <= 0.51 * step.repeat_interleave(64, 1)).all())
    assert float((found - weight).abs().max() / weight.abs().max()) < worst
