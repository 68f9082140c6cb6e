"""Layers with scales for groups of inputs on a GPU, at Qwen3-8B's shapes: near float64, and batch-invariant.

Their formats are those of published checkpoints.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from torch import Tensor

from orthrus.kernels.device import has_fp8_mma
from orthrus.kernels.linear import Weight, dense, fp8_block, pack_weight
from orthrus.kernels.linear.blocks_triton import RoundedGroups, quantise_inputs
from orthrus.kernels.linear.fp8_block import quantise_blocks
from orthrus.kernels.linear.gptq import quantise_gptq
from orthrus.kernels.linear.grouped import GroupedWeight
from orthrus.kernels.linear.weight import Parameters
from orthrus.measure.random_model import shape_config, shape_engine
from orthrus.models.quantization import read_quantization
from orthrus.requests.request import SamplingParams
from tests.gpu.test_kernels import DEVICE, ROWS, error, randn
from tests.quantised import AWQ, FP8, GPTQ, GPTQ8

FORMATS = ("fp8", "int8", "int4")
pytestmark = pytest.mark.skipif(not has_fp8_mma(), reason="this GPU does not multiply FP8")


def projection(format: str, outs: int, ins: int, seed: int, bias: bool = False) -> Parameters:
    weight = randn(outs, ins, seed=seed) * ins**-0.5
    extra = {"bias": randn(outs, seed=seed + 50)} if bias else {}
    if format == "fp8":
        numbers, scales = quantise_blocks(weight)
        return {"weight": numbers, "weight_scale_inv": scales.bfloat16()} | extra
    bits = 8 if format == "int8" else 4
    stored = quantise_gptq(weight, bits, 128)
    if format == "int4":  # Random zero points.
        stored["qzeros"] = torch.randint_like(stored["qzeros"], -(1 << 31), 1 << 31)
    return stored | extra


def layer_of(
    format: str, *outs: int, ins: int, bias: bool = False, gated: bool = False
) -> tuple[Weight, Tensor, Tensor]:
    """A layer, its weight in float64, and its biases."""
    parts = [projection(format, n, ins, seed, bias) for seed, n in enumerate(outs)]
    full = [dense(dict(part)) for part in parts]
    layer = pack_weight([[dict(part) for part in parts]], gated=gated)
    assert isinstance(layer, GroupedWeight)
    biases = torch.cat([part.get("bias", torch.zeros(len(part["weight"]), device=DEVICE)) for part in full])
    return layer, torch.cat([part["weight"] for part in full]).double(), biases.double()


def exact_inputs(format: str, x: Tensor) -> Tensor:
    """The inputs as the kernels multiply them: rounded if the format rounds them, in float64."""
    return fp8_block.round_blocks(x).double() if format == "fp8" else x.double()


def test_inputs_are_rounded_to_the_numbers_of_the_reference() -> None:
    for ins in (4096, 12288, 304):
        x = randn(70, ins, seed=1)
        x[3] = 0
        for part in (x, x[:, 16:]):
            got, expected = quantise_inputs(part), fp8_block.quantise_inputs(part)
            assert torch.equal(got[1][:, :70].T, expected[1])
            assert torch.equal(got[0].view(torch.uint8), expected[0].contiguous().view(torch.uint8))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("outs", "ins", "bias"),
    [((4096, 1024, 1024), 4096, False), ((4096,), 12288, True), ((200, 72), 384, True)],
)
def test_linear_is_batch_invariant(format: str, outs: tuple[int, ...], ins: int, bias: bool) -> None:
    layer, weight, biases = layer_of(format, *outs, ins=ins, bias=bias)
    x = randn(1024, ins, seed=9)
    full = layer.linear(x)
    assert error(full[:200], exact_inputs(format, x[:200]) @ weight.T + biases) < 3e-3
    for rows in ROWS:
        for start in (0, 1024 - rows):
            assert torch.equal(layer.linear(x[start : start + rows]), full[start : start + rows]), (
                rows,
                start,
            )


@pytest.mark.parametrize("format", FORMATS)
def test_gated_linear_is_batch_invariant(format: str) -> None:
    layer, weight, _ = layer_of(format, 12288, 12288, ins=4096, gated=True)
    x = randn(600, 4096, seed=9)
    full = layer.linear_silu_mul(x)
    gate, up = (exact_inputs(format, x[:100]) @ weight.T).chunk(2, 1)
    assert error(full[:100], torch.nn.functional.silu(gate) * up) < 3e-3
    for rows in ROWS:
        assert torch.equal(layer.linear_silu_mul(x[:rows]), full[:rows]), rows


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("outs", "ins"), [(4096, 4096), (4096, 12288)])
def test_residual_linear_is_batch_invariant(format: str, outs: int, ins: int) -> None:
    layer, weight, _ = layer_of(format, outs, ins=ins)
    x, residual, norm = randn(600, ins, seed=9), randn(600, outs, seed=2), randn(outs, seed=3)
    full = layer.linear_add_rms_norm(x, residual, norm, 1e-6)
    hidden = exact_inputs(format, x[:100]) @ weight.T + residual[:100].double()
    assert error(full[0][:100], hidden) < 3e-3
    for rows in ROWS:
        got = layer.linear_add_rms_norm(x[:rows], residual[:rows], norm, 1e-6)
        assert torch.equal(got[0], full[0][:rows]) and torch.equal(got[1], full[1][:rows]), rows


def test_a_norm_rounds_groups_as_the_next_layer_would() -> None:
    layer, _, _ = layer_of("fp8", 4096, ins=4096)
    for rows in (1, 33):
        _, normed = layer.linear_add_rms_norm(
            randn(rows, 4096, seed=1),
            randn(rows, 4096, seed=2),
            randn(4096, seed=3),
            1e-6,
            rounding=layer.rounding,
        )
        assert isinstance(normed, RoundedGroups)
        made, alone = quantise_inputs(normed), quantise_inputs(normed[:])
        assert torch.equal(made[1][:, :rows], alone[1][:, :rows])
        assert torch.equal(made[0].view(torch.uint8), alone[0].view(torch.uint8))


def test_act_order_gathers_the_inputs() -> None:
    stored = projection("int4", 512, 1024, 0)
    order = torch.randperm(1024, device=DEVICE)
    stored["g_idx"] = stored["g_idx"][order]
    full = dense(dict(stored))["weight"].double()
    x = randn(40, 1024, seed=9)
    assert error(pack_weight([[stored]]).linear(x), x.double() @ full.T) < 3e-3


@pytest.mark.parametrize(
    "settings", [FP8, GPTQ8, GPTQ, AWQ], ids=lambda s: f"{s['quant_method']} {s.get('bits', 8)}"
)
def test_engines_have_the_text_of_ar_decoding(settings: dict[str, Any]) -> None:
    if "group_size" in settings:
        settings = settings | {"group_size": 128}
    shape = replace(
        shape_config("0.6B"),
        num_hidden_layers=2,
        quantization=read_quantization({"quantization_config": settings}),
    )
    prompts = [[int(t) for t in torch.randint(0, 1000, (n,))] for n in (5, 130, 700)]
    params = [
        SamplingParams(temperature=t, seed=1, max_tokens=60, ignore_eos=True, logprobs=1)
        for t in (0.0, 0.7, 0.0)
    ]
    engines = [
        shape_engine(model, schedule, DEVICE, torch.bfloat16, kv_cache_tokens=8192)
        for schedule, model in (
            ("ar", replace(shape, block_size=None, mask_token_id=None)),
            ("orthrus", shape),
        )
    ]
    alone = [engines[0].generate([p], one)[0][0] for p, one in zip(prompts, params, strict=True)]
    together = [found[0] for found in engines[1].generate(prompts, params)]
    for got, expected in zip(together, alone, strict=True):
        assert (got.token_ids, got.logprobs) == (expected.token_ids, expected.logprobs)
