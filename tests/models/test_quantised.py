"""Quantised checkpoints in the published formats: what loads, what is refused, and what comes out of a model of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

from orthrus.cli import main
from orthrus.errors import CheckpointError, ConfigError
from orthrus.models.checkpoint import load_weights, save_checkpoint
from orthrus.models.dense import dequantised
from orthrus.models.families import family_of, load_config
from orthrus.models.shapes import QWEN3_SHAPES
from orthrus.models.shard import Shard
from orthrus.models.sizes import weight_bytes
from orthrus.training.model import load_frozen
from tests.checkpoints import edit_json, make_checkpoint
from tests.models.checkpoint_files import load, load_error, rewrite
from tests.quantised import AWQ, FP8, GPTQ, GPTQ8, SETTINGS, make_quantised


@pytest.mark.parametrize("name", SETTINGS)
def test_a_quantised_checkpoint_loads_as_it_is_stored_and_saves_again(name: str, tmp_path: Path) -> None:
    path = make_quantised(tmp_path / "model", SETTINGS[name])
    config, weights = load(path)
    stored = load_file(path / "model.safetensors")
    assert config.quantization is not None and config.quantization.settings == SETTINGS[name]
    assert set(weights) == set(stored) - {"lm_head.weight"}
    for key, tensor in weights.items():
        assert torch.equal(tensor.view(torch.uint8), stored[key].to(tensor.dtype).view(torch.uint8)), key
    save_checkpoint(tmp_path / "again", config, weights)
    again, saved = load(tmp_path / "again")
    assert again == config
    assert json.loads((tmp_path / "again/config.json").read_text())["quantization_config"] == SETTINGS[name]
    assert all(torch.equal(saved[key].float(), tensor.float()) for key, tensor in weights.items())


def test_scales_keep_their_dtype_in_a_model_of_16_bits(tmp_path: Path) -> None:
    path = make_quantised(tmp_path, AWQ)
    weights = load_weights(path, load_config(path), "cpu", "bfloat16")
    assert weights["model.layers.0.mlp.up_proj.scales"].dtype == torch.float16
    assert weights["model.norm.weight"].dtype == torch.bfloat16


def test_weights_can_be_dequantised_for_training_and_for_copies(tmp_path: Path) -> None:
    path = make_quantised(tmp_path, AWQ)
    config, weights = load(path)
    full = dequantised(weights, torch.float32)
    assert not weights
    shapes = family_of(config).tensor_shapes(replace(config, quantization=None))
    assert {name: tuple(tensor.shape) for name, tensor in full.items()} == shapes


def changed(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in (settings | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"quant_method": "bitsandbytes"},
            ["quant_method 'bitsandbytes'", "fp8", "gptq", "awq", "not quantised"],
        ),
        (changed(FP8, quant_method=None), ["quant_method None"]),
        (changed(FP8, weight_block_size=[64, 64]), ["weight_block_size [64, 64]", "[128, 128]"]),
        (changed(FP8, weight_block_size=None), ["weight_block_size None"]),
        (changed(FP8, fmt="e5m2"), ["fmt 'e5m2'"]),
        (changed(FP8, activation_scheme="static"), ["activation_scheme 'static'"]),
        (changed(FP8, modules_to_not_convert="lm_head"), ["modules_to_not_convert", "list of names"]),
        (changed(GPTQ, bits=3), ["bits 3", "4 or 8 bits"]),
        (changed(GPTQ, bits=True), ["bits True"]),
        (changed(GPTQ, checkpoint_format="gptq_v2"), ["checkpoint_format 'gptq_v2'"]),
        (changed(GPTQ, lm_head=True), ["lm_head True"]),
        (changed(GPTQ, dynamic={"-:.*": {}}), ["dynamic"]),
        (changed(AWQ, bits=8), ["bits 8"]),
        (changed(AWQ, version="gemv"), ["version 'gemv'"]),
        (changed(AWQ, group_size="128"), ["group_size '128'"]),
        (changed(AWQ, group_size=48), ["down_proj.weight", "group_size 48 divides", "found"]),
        ("awq", ["quantization_config must be an object", "'awq'"]),
    ],
    ids=str,
)
def test_unsupported_formats_are_refused_and_supported_ones_are_named(
    tmp_path: Path, settings: Any, words: list[str]
) -> None:
    path = make_quantised(tmp_path, AWQ)
    edit_json(path / "config.json", quantization_config=settings)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    for word in ["config.json", *words]:
        assert word in str(caught.value).replace("q_proj", "down_proj"), caught.value


QKV = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("settings", "part", "change", "words"),
    [
        (FP8, "weight_scale_inv", None, ["expected shape [1, 1], found none"]),
        (FP8, "weight_scale_inv", lambda t: t.new_ones(2, 1), ["expected shape [1, 1], found [2, 1]"]),
        (FP8, "weight", lambda t: t.float(), ["expected dtype F8_E4M3, found F32"]),
        (FP8, "weight", lambda t: t.view(torch.uint8).fill_(127).view(t.dtype), ["NaN"]),
        (FP8, "weight_scale_inv", lambda t: t / 0, ["NaN or infinite"]),
        (GPTQ, "g_idx", None, ["expected shape [128], found none"]),
        (GPTQ, "g_idx", lambda t: t + 1, ["expected groups from 0 to 3, found 1 to 4"]),
        (GPTQ8, "qzeros", lambda t: t[:, 1:], ["expected shape [4, 32], found [4, 31]"]),
        (AWQ, "scales", lambda t: t[:1], ["expected shape [4, 128], found [1, 128]"]),
        (AWQ, "qweight", lambda t: t.to(torch.int64), ["expected dtype I32, found I64"]),
    ],
)  # fmt: skip
def test_wrong_tensors_are_named_with_what_was_expected_and_found(
    tmp_path: Path, settings: dict[str, Any], part: str, change: Any, words: list[str]
) -> None:
    path = make_quantised(tmp_path, settings)

    def edit(tensors: dict[str, Tensor]) -> None:
        tensor = tensors.pop(f"{QKV}.{part}")
        if change is not None:
            tensors[f"{QKV}.{part}"] = change(tensor).contiguous()

    rewrite(path, edit)
    message = load_error(path)
    for word in [f"tensor {QKV}.{part}", *words]:
        assert word in message, message


def test_modules_that_are_not_converted_are_stored_in_full(tmp_path: Path) -> None:
    names = ["lm_head", "layers.0.mlp", "self_attn.o_proj"]
    config = load_config(make_quantised(tmp_path, FP8 | {"modules_to_not_convert": names}))
    how = config.quantization
    assert how is not None
    assert not how.covers("model.layers.0.mlp.up_proj.weight") and how.covers(
        "model.layers.1.mlp.up_proj.weight"
    )
    assert not how.covers("model.layers.1.self_attn.o_proj.weight")
    assert how.covers("model.layers.1.self_attn.q_proj.weight")
    for name in ("self_attn.q_proj_diff.weight", "self_attn.q_norm.weight", "self_attn.q_proj.bias"):
        assert not how.covers(f"model.layers.1.{name}")
    assert not how.covers("model.embed_tokens.weight") and not how.covers("lm_head.weight")


def test_a_diffusion_view_without_config_is_still_refused(tmp_path: Path) -> None:
    path = make_quantised(tmp_path, AWQ)
    edit_json(path / "config.json", block_size=None, architectures=["Qwen3ForCausalLM"])
    with pytest.raises(CheckpointError, match="has diffusion weights"):
        load_weights(path, load_config(path), "cpu")


@pytest.mark.parametrize(
    ("settings", "least", "most"),
    [(FP8, 0.57, 0.59), (GPTQ8 | {"group_size": 128}, 0.57, 0.60), (AWQ | {"group_size": 128}, 0.36, 0.40)],
)
def test_memory_is_that_of_the_quantised_weights(settings: dict[str, Any], least: float, most: float) -> None:
    """Of the 8B shape, against bfloat16: its embedding and its head stay in full."""
    from orthrus.models.quantization import read_quantization

    plain = QWEN3_SHAPES["8B"]
    quantised = replace(plain, quantization=read_quantization({"quantization_config": settings}))
    assert least < weight_bytes(Shard(quantised), 2) / weight_bytes(Shard(plain), 2) < most
    assert weight_bytes(Shard(quantised), 4) == weight_bytes(Shard(plain), 4), "a CPU dequantises them"


@pytest.fixture
def unquantised(tmp_path: Path) -> Path:
    return make_checkpoint(
        tmp_path / "full", dtype=torch.bfloat16, hidden_size=128, intermediate_size=256, head_dim=32
    )


@pytest.mark.parametrize(("format", "worst"), [("fp8", 0.07), ("int8", 0.01)])
def test_orthrus_quantize_writes_what_we_and_transformers_dequantise(
    unquantised: Path, tmp_path: Path, format: str, worst: float
) -> None:
    (unquantised / "tokenizer.json").write_text("{}")
    defaults = '{"eos_token_id": 0, "temperature": 0.6, "top_k": 20}'
    (unquantised / "generation_config.json").write_text(defaults)
    out = tmp_path / "out"
    assert main(["quantize", str(unquantised), str(out), "--format", format]) == 0
    assert (out / "tokenizer.json").read_text() == "{}"
    assert (out / "generation_config.json").read_text() == defaults
    assert main(["quantize", str(unquantised), str(out), "--format", format]) == 2, "it holds a checkpoint"
    config, weights = load(out)
    assert config.quantization is not None and config.has_diffusion and config.dtype == "bfloat16"
    full = dequantised(dict(weights), torch.float32)
    for name, tensor in load_file(unquantised / "model.safetensors").items():
        error = (full[name].float() - tensor.float()).abs().max() / tensor.float().abs().max()
        assert (0 < error < worst) if config.quantization.covers(name) else (error == 0), name
    if format == "fp8":
        name = "model.layers.1.mlp.down_proj.weight"
        theirs = _dequantize_fp8_weight(
            weights[name], weights[f"{name}_scale_inv"], [128, 128], torch.float32
        )
        assert torch.equal(theirs, full[name])


def test_orthrus_quantize_refuses_what_it_can_not_store(
    unquantised: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantised = make_quantised(tmp_path / "awq", AWQ)
    assert main(["quantize", str(quantised), str(tmp_path / "out")]) == 2
    assert "is quantised already (awq)" in capsys.readouterr().err
    assert main(["quantize", str(unquantised), str(unquantised)]) == 2
    assert "is the checkpoint itself" in capsys.readouterr().err
    narrow = make_checkpoint(tmp_path / "narrow")
    assert main(["quantize", str(narrow), str(tmp_path / "out"), "--format", "int8"]) == 2
    assert "group_size 128 divides, found 64" in capsys.readouterr().err


def test_heads_are_trained_on_the_dequantised_weights(tmp_path: Path) -> None:
    path = make_quantised(tmp_path, GPTQ, diffusion=False)
    model = load_frozen(path, 8, 127, torch.device("cpu"))
    full = dequantised(load_weights(path, load_config(path), "cpu", "float32"), torch.float32)
    state = model.state_dict()
    assert torch.equal(state["model.layers.1.mlp.up_proj.weight"], full["model.layers.1.mlp.up_proj.weight"])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == list(model.diffusion_parameters()) != []
    start = full["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(state["model.layers.0.self_attn.q_proj_diff.weight"], start)
    # Saved beside the base's own tensors, they make a checkpoint that drafts.
    stored = load_config(path)
    tensors = load_weights(path, stored, "cpu", stored.dtype)
    tensors |= {name: p.detach() for name, p in model.diffusion_parameters().items()}
    save_checkpoint(tmp_path / "heads", replace(stored, block_size=8, mask_token_id=127), tensors)
    config, weights = load(tmp_path / "heads")
    assert config.has_diffusion and config.quantization == stored.quantization
    assert torch.equal(
        weights["model.layers.0.self_attn.q_proj.qweight"], tensors["model.layers.0.self_attn.q_proj.qweight"]
    )
