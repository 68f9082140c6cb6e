"""ModelConfig: reads every known style of config.json, and gives a helpful error for models that can't run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from orthrus.errors import ConfigError
from orthrus.models.config import ModelConfig
from orthrus.models.families import family_of, load_config, parse_config
from tests.checkpoints import edit_json, make_checkpoint

# What the published Orthrus-Qwen3-1.7B says, in transformers-4 style.
ORTHRUS_1_7B: dict[str, Any] = {
    "architectures": ["OrthrusLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "block_size": 32,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "mask_token_id": 151669,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def changed(**changes: Any) -> dict[str, Any]:
    return ORTHRUS_1_7B | changes


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in ORTHRUS_1_7B.items() if key not in keys}


def written(config: ModelConfig) -> dict[str, Any]:
    return family_of(config).write_config(config)


def rotary(config: ModelConfig) -> tuple[torch.Tensor, float]:
    return family_of(config).rotary(config)


def test_reads_a_published_config() -> None:
    config = parse_config(ORTHRUS_1_7B, name="Orthrus-Qwen3-1.7B")
    assert config == ModelConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000},
        eos_token_ids=(151645,),
        bos_token_id=151643,
        block_size=32,
        mask_token_id=151669,
        dtype="bfloat16",
    )
    assert config.has_diffusion
    assert config.name == "Orthrus-Qwen3-1.7B"


@pytest.mark.parametrize("model_type", ["qwen3", "orthrus"])
def test_both_model_types_and_rope_styles_read_the_same(model_type: str) -> None:
    style5 = without("rope_theta", "rope_scaling", "torch_dtype") | {
        "model_type": model_type,
        "dtype": "bfloat16",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000},
    }
    assert parse_config(style5) == parse_config(ORTHRUS_1_7B)


def test_yarn_reads_the_same_in_both_styles() -> None:
    old = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    style4 = parse_config(changed(rope_scaling=old))
    style5 = parse_config(without("rope_theta") | {"rope_parameters": YARN | {"rope_theta": 1000000}})
    assert style4 == style5
    assert style4.rope_parameters == YARN | {"rope_theta": 1000000}


@pytest.mark.parametrize("positions", [32768, 40960])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_yarn_as_the_model_card_writes_it_extends_the_context(positions: int, key: str) -> None:
    card = {key: "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = parse_config(changed(max_position_embeddings=positions, rope_scaling=card))
    assert config.max_position_embeddings == 131072
    assert parse_config(written(config)) == config
    # A file that names more, or says nothing of where it started, keeps to its own numbers.
    more = changed(max_position_embeddings=200_000, rope_scaling=card)
    assert parse_config(more).max_position_embeddings == 200_000
    del card["original_max_position_embeddings"]
    short = changed(max_position_embeddings=positions, rope_scaling=card)
    assert parse_config(short).max_position_embeddings == 4 * positions


def test_reading_leaves_the_dict_alone() -> None:
    data = changed(rope_scaling=dict(YARN))
    before = json.dumps(data)
    parse_config(data)
    assert json.dumps(data) == before


@pytest.mark.parametrize(
    "data",
    [
        ORTHRUS_1_7B,
        without("block_size", "mask_token_id", "architectures"),
        changed(
            eos_token_id=[151645, 151643], pad_token_id=151643, tie_word_embeddings=False, attention_bias=True
        ),
        changed(eos_token_id=None, rope_scaling=YARN, torch_dtype="float16", head_dim=80),
    ],
    ids=["orthrus", "plain", "biased", "yarn"],
)
def test_a_written_config_reads_the_same(data: dict[str, Any]) -> None:
    config = parse_config(data)
    assert parse_config(json.loads(json.dumps(written(config)))) == config
    assert hash(replace(config)) == hash(config)


def test_a_written_config_has_the_official_format() -> None:
    orthrus = written(parse_config(changed(model_type="orthrus")))
    assert (orthrus["architectures"], orthrus["model_type"]) == (["OrthrusLM"], "qwen3")
    assert (orthrus["block_size"], orthrus["mask_token_id"]) == (32, 151669)
    plain = written(parse_config(without("block_size", "mask_token_id", "architectures")))
    assert (plain["architectures"], plain["model_type"]) == (["Qwen3ForCausalLM"], "qwen3")
    assert "block_size" not in plain
    assert "mask_token_id" not in plain


def test_a_plain_model_may_name_a_mask_token() -> None:
    config = parse_config(without("block_size", "architectures"))
    assert not config.has_diffusion
    assert config.mask_token_id is None


@pytest.mark.parametrize("rope", [None, YARN, YARN | {"attention_factor": 1.5, "beta_fast": 16.0}])
def test_rotary_is_transformers(rope: dict[str, Any] | None) -> None:
    inv_freq, scaling = rotary(parse_config(changed(rope_scaling=rope)))
    hf = Qwen3RotaryEmbedding(Qwen3Config(**changed(rope_scaling=rope)))
    assert inv_freq.dtype == torch.float32
    assert torch.equal(inv_freq, hf.inv_freq)
    assert scaling == hf.attention_scaling
    assert (scaling != 1.0) == (rope is not None)


def test_rotary_is_on_the_cpu_whatever_the_default_device() -> None:
    with torch.device("meta"):
        assert rotary(parse_config(ORTHRUS_1_7B))[0].device.type == "cpu"


def test_eos_ids_are_those_of_generation_config(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, eos_token_id=5)
    assert load_config(path).eos_token_ids == (5,)
    edit_json(path / "generation_config.json", eos_token_id=[7, 8], bos_token_id=3, pad_token_id=4)
    config = load_config(path)
    assert (config.eos_token_ids, config.bos_token_id, config.pad_token_id) == ((7, 8), 3, 4)
    (path / "generation_config.json").unlink()
    assert load_config(path).eos_token_ids == (5,)


def test_name_is_the_directory_or_the_hub_id(tmp_path: Path) -> None:
    assert load_config(make_checkpoint(tmp_path / "mine")).name == "mine"
    snapshot = tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / "0123abc"
    assert load_config(make_checkpoint(snapshot)).name == "Qwen/Qwen3-0.6B"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (changed(model_type="llama"), ["model_type 'llama'", "qwen3 or orthrus"]),
        (without("model_type"), ["model_type None", "qwen3 or orthrus"]),
        (changed(use_sliding_window=True, sliding_window=4096), ["use_sliding_window", "false"]),
        (changed(layer_types=["full_attention", "sliding_attention"]), ["layer_types sliding_attention"]),
        (
            changed(quantization_config={"quant_method": "hqq"}),
            ["quantization_config", "quant_method 'hqq'", "awq"],
        ),
        (changed(hidden_act="gelu"), ["hidden_act 'gelu'", "silu"]),
        (
            changed(rope_scaling={"rope_type": "linear", "factor": 2.0}),
            ["rope_type 'linear'", "default, yarn"],
        ),
        (changed(rope_parameters={"rope_type": "longrope"}), ["rope_type 'longrope'", "default, yarn"]),
        (changed(rope_scaling={"rope_type": "yarn"}), ["factor of rope_type", "is missing: add it"]),
        (changed(rope_scaling=YARN | {"factor": "4"}), ["factor", "'4'"]),
        (changed(rope_scaling="yarn"), ["rope_scaling must be an object", "'yarn'"]),
        (changed(partial_rotary_factor=0.5), ["partial_rotary_factor", "remove"]),
        (changed(rope_theta=0), ["rope_theta", "at least 1", "0"]),
        (without("hidden_size", "vocab_size"), ["vocab_size, hidden_size missing"]),
        (changed(hidden_size="2048"), ["hidden_size", "2048"]),
        (changed(num_hidden_layers=0), ["num_hidden_layers", "positive", "0"]),
        (changed(num_key_value_heads=3), ["num_attention_heads (16)", "num_key_value_heads (3)"]),
        (changed(head_dim=127), ["head_dim", "even", "127"]),
        (changed(rms_norm_eps=-1.0), ["rms_norm_eps", "-1.0"]),
        (changed(torch_dtype="float8_e4m3fn"), ["dtype 'float8_e4m3fn'", "bfloat16"]),
        (without("block_size"), ["block_size is missing", "32 and 151669"]),
        (without("mask_token_id"), ["mask_token_id is missing", "block_size"]),
        (changed(block_size=1), ["block_size", "at least 2", "1"]),
        (changed(block_size="32"), ["block_size", "'32'"]),
        (changed(mask_token_id=151936), ["mask_token_id", "151935", "151936"]),
        (changed(eos_token_id=[1, -1]), ["eos_token_id", "-1"]),
        ([], ["JSON object", "list"]),
    ],
)
def test_unsupported_configs_say_what_to_change(data: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(data)
    for word in words:
        assert word in str(caught.value)


def test_errors_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with pytest.raises(ConfigError, match=r"config\.json is missing.*Hugging Face"):
        load_config(tmp_path)
    file.write_text('{"model_type": "qwen3",')
    with pytest.raises(ConfigError, match=r"config\.json isn't valid JSON"):
        load_config(tmp_path)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"config\.json isn't valid JSON"):
        load_config(tmp_path)
    file.write_text("[1]")
    with pytest.raises(ConfigError, match=r"config\.json: expected a JSON object, found list"):
        load_config(tmp_path)
    file.write_text(json.dumps(changed(hidden_act="gelu")))
    with pytest.raises(ConfigError, match=r"config\.json: hidden_act 'gelu'"):
        load_config(tmp_path)
    file.write_text(json.dumps(ORTHRUS_1_7B))
    (tmp_path / "generation_config.json").write_text("")
    with pytest.raises(ConfigError, match=r"generation_config\.json isn't valid JSON"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "given",
    [{}, {"rope_theta": 5e5}, {"rope_scaling": YARN}, {"rope_parameters": {"rope_theta": 2e4}}],
    ids=["nothing", "theta", "yarn", "parameters"],
)
def test_omitted_settings_have_hugging_faces_defaults(given: dict[str, Any]) -> None:
    least = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    ours, theirs = (
        parse_config({"model_type": "qwen3", **least, **given}),
        Qwen3Config(**least, **given),
    )
    for key in ("head_dim", "rms_norm_eps", "tie_word_embeddings", "attention_bias"):
        assert getattr(ours, key) == getattr(theirs, key)
    assert ours.rope_parameters == {k: v for k, v in theirs.rope_parameters.items() if k != "type"}
    assert ours.max_position_embeddings >= theirs.max_position_embeddings
