"""The fixed factors of FP8 drafts: what they bound, and that a model with very large and very small weights drafts with them."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from orthrus.kernels.linear import Weight, pack_weight
from orthrus.kernels.rounding import LARGEST
from orthrus.kernels.rows.rms_norm import rms_norm
from orthrus.models.checkpoint import load_weights
from orthrus.models.dense import dequantised
from orthrus.models.factors import Factors, norm_factor
from orthrus.models.families import family_of, load_config
from orthrus.models.forward import LayerParallelForward
from orthrus.models.stack import LayerStack
from tests.checkpoints import make_checkpoint
from tests.quantised import FP8, make_quantised

WIDTH, INNER, KEYS = 96, 160, 32
VIEWS = ("", "_diff")


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(size: float = 1.0, bias: bool = False) -> dict[str, Tensor]:
    """The tensors of a layer that factors depend on."""
    tensors = {"l.post_attention_layernorm.weight": randn(WIDTH, seed=1) * 3}
    for seed, view in enumerate(VIEWS):
        tensors[f"l.self_attn.v_proj{view}.weight"] = size * randn(KEYS, WIDTH, seed=2 + seed)
        if bias:
            tensors[f"l.self_attn.v_proj{view}.bias"] = 50 * randn(KEYS, seed=8 + seed)
    for seed, name in enumerate(("gate", "up")):
        tensors[f"l.mlp.{name}_proj.weight"] = size * randn(INNER, WIDTH, seed=4 + seed)
    return tensors


def is_power_of_two(factor: float) -> bool:
    return math.log2(factor).is_integer()


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_a_normed_row_never_exceeds_the_largest_number(size: float) -> None:
    """The worst row has one number alone, where the norm's weight is largest."""
    norm = size * randn(WIDTH, seed=0)
    factor = norm_factor(norm)
    assert is_power_of_two(factor)
    worst = torch.zeros(1, WIDTH)
    worst[0, norm.abs().argmax()] = 7.0
    largest = float((rms_norm(worst, norm, 0.0) * factor).abs().max())
    assert LARGEST / 2 < largest <= LARGEST * 1.001
    # Usual rows are still in the range in which e4m3 has its full precision.
    usual = (rms_norm(randn(50, WIDTH, seed=3), norm, 1e-6) * factor).abs()
    assert float((usual > 2**-6).float().mean()) > 0.97


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("bias", [False, True])
def test_values_of_both_views_never_exceed_the_largest_number(size: float, bias: bool) -> None:
    """The worst row has the direction of an output's weights."""
    tensors, norm = layer(size, bias), randn(WIDTH, seed=0)
    factors = Factors.of(tensors, "l", norm, VIEWS)
    largest = 0.0
    for view in VIEWS:
        weight = tensors[f"l.self_attn.v_proj{view}.weight"]
        offset = tensors.get(f"l.self_attn.v_proj{view}.bias", torch.zeros(KEYS))
        for sign in (1, -1):
            worst = rms_norm(sign * weight * norm, norm, 0.0)
            largest = max(largest, float((worst @ weight.T + offset).abs().max()))
    assert is_power_of_two(factors.attended)
    assert LARGEST / 5 < largest * factors.attended <= LARGEST * 1.001


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_the_numbers_of_the_mlp_are_well_inside_the_range(size: float) -> None:
    tensors = layer(size)
    factors = Factors.of(tensors, "l", randn(WIDTH, seed=0), VIEWS)
    mlp_norm = tensors["l.post_attention_layernorm.weight"]
    x = rms_norm(randn(200, WIDTH, seed=9), mlp_norm, 1e-6)
    gate, up = (x @ tensors[f"l.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    gated = torch.nn.functional.silu(gate) * up * factors.gated
    assert is_power_of_two(factors.gated)
    # One neuron with large weights changes nothing for the others, and half of them may be zeros.
    for name in ("gate", "up"):
        tensors[f"l.mlp.{name}_proj.weight"][0] *= 1000
        tensors[f"l.mlp.{name}_proj.weight"][INNER // 2 :] = 0
    changed = Factors.of(tensors, "l", randn(WIDTH, seed=0), VIEWS).gated
    assert factors.gated / 2 <= changed <= 2 * factors.gated
    assert float(gated.square().mean().sqrt()) > 0.02 and float(gated.abs().max()) < LARGEST / 8


def test_weights_of_zeros_have_factors() -> None:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in layer().items()}
    assert Factors.of(zeros, "l", torch.zeros(WIDTH), VIEWS) == Factors(1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("size", [1e-30, 1e-18])
def test_factors_of_tiny_weights_are_finite(size: float) -> None:
    factors = Factors.of(layer(size), "l", randn(WIDTH, seed=0), VIEWS)
    assert torch.tensor([factors.attended, factors.gated]).isfinite().all()


def test_factors_of_a_quantised_layer_are_those_of_its_dequantised_weights(tmp_path: Path) -> None:
    path = make_quantised(tmp_path, FP8)
    config = load_config(path)
    stored = load_weights(path, config, "cpu", "float32")
    norm = stored["model.layers.0.input_layernorm.weight"]
    own = {name: tensor for name, tensor in stored.items() if name.startswith("model.layers.0.")}
    assert "model.layers.0.mlp.gate_proj.weight_scale_inv" in own
    found = family_of(config).factors(config, own, 0, norm)
    assert found == Factors.of(dequantised(dict(own), norm.dtype), "model.layers.0", norm, VIEWS)


def drafts(path: Path, weights: str, draft: str, norms: float = 1.0) -> LayerStack:
    """The drafts' weights of a checkpoint, whose norms are multiplied by `norms`."""
    config = load_config(path)
    tensors = load_weights(path, config, "cpu", "float32")
    tensors = {name: tensor * (norms if "norm" in name else 1.0) for name, tensor in tensors.items()}
    found = LayerParallelForward(config, tensors, weights, draft).draft
    assert found is not None
    return found


def factor(weight: Weight) -> float:
    assert weight.rounding is not None and weight.rounding.factor is not None
    return weight.rounding.factor


@pytest.mark.parametrize("format", ["fp8", "int4", "fp8+int4"])
def test_the_layers_of_drafts_and_their_head_get_factors(tmp_path: Path, format: str) -> None:
    path = make_checkpoint(tmp_path, layers=3, hidden_size=128, intermediate_size=256, head_dim=32)
    plain, large = (drafts(path, "plain", format, norms) for norms in (1.0, 256.0))
    for own, other in zip(plain.layers, large.layers, strict=True):
        for field in ("qkv", "out", "gate_up"):
            assert factor(getattr(other, field)) == factor(getattr(own, field)) / 256, field
        assert factor(other.down) == factor(own.down) / 256**2
    assert factor(large.head) == factor(plain.head) / 256


def test_projections_of_lossless8_drafts_get_factors(tmp_path: Path) -> None:
    """Those that are packed for drafts alone. CPUs keep the rest in full."""
    path = make_checkpoint(tmp_path, layers=2, hidden_size=128, intermediate_size=256, head_dim=32)
    plain, large = (drafts(path, "lossless12", "lossless8", norms) for norms in (1.0, 256.0))
    for own, other in zip(plain.layers, large.layers, strict=True):
        assert factor(other.qkv) == factor(own.qkv) / 256
        assert factor(other.out) == factor(own.out) / 256


def test_other_formats_have_no_factors() -> None:
    packed = pack_weight([[{"weight": randn(128, 256, seed=0)}]], "plain")
    assert packed.rounding is None and packed.with_factor(4.0) is packed
