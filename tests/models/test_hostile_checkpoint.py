"""Hostile checkpoints: each gives one ConfigError within 2 s of CPU time and 1 GiB, and never another exception."""

import json
import os
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from orthrus.engine import Engine
from orthrus.engine.config import EngineConfig
from orthrus.errors import CheckpointError, ConfigError
from orthrus.models.checkpoint import load_weights
from orthrus.models.families import load_config, parse_config
from orthrus.models.files import check_files
from orthrus.text.tokenizer import load_tokenizer
from tests.checkpoints import edit_json, make_checkpoint
from tests.hostile import VALUES, bounded
from tests.models.test_config import ORTHRUS_1_7B, YARN, rotary

MODEL = Path(__file__).parents[2] / "models" / "orthrus-tiny"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

# Which of `VALUES` a field of config.json takes, of those that are used.
TAKEN: dict[str, set[str]] = {
    "architectures": {"null", "empty-list", "list", "nested-list", "mixed-list"},
    "attention_bias": {"null", "true"},
    "block_size": set(),
    "bos_token_id": {"null", "zero"},
    "dtype": {"null"},
    "eos_token_id": {"null", "zero", "list", "empty-list"},
    "head_dim": {"null"},
    "hidden_act": set(),
    "hidden_size": set(),
    "intermediate_size": set(),
    "layer_types": {"null", "empty-list"},
    "mask_token_id": {"zero"},
    "max_position_embeddings": {"null"},
    "model_type": set(),
    "num_attention_heads": set(),
    "num_hidden_layers": set(),
    "num_key_value_heads": set(),
    "pad_token_id": {"null", "zero"},
    "partial_rotary_factor": {"null", "true"},
    "quantization_config": {"null"},
    "rms_norm_eps": {"null", "tiny"},
    "rope_parameters": {"null", "empty-object", "object"},
    "rope_scaling": {"null", "empty-object", "object"},
    "rope_theta": {"null", "float", "whole-float", "2-to-31"},
    "tie_word_embeddings": {"null", "true"},
    "torch_dtype": {"null"},
    "use_sliding_window": {"null", "zero"},
    "vocab_size": set(),
}
ROPE_TAKEN: dict[str, set[str]] = {
    "rope_type": set(),
    "rope_theta": {"float", "whole-float", "2-to-31"},
    "factor": {"float", "whole-float"},
    "original_max_position_embeddings": {"float", "whole-float"},
    "attention_factor": {"null", "float", "whole-float"},
    "beta_fast": {"null", "float", "whole-float"},
    "beta_slow": {"null", "float", "whole-float"},
    "mscale": {"null", "float", "whole-float"},
    "mscale_all_dim": {"null", "float", "whole-float"},
    "partial_rotary_factor": {"null", "true"},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a tokenizer."""
    path = make_checkpoint(tmp_path_factory.mktemp("hostile") / "whole", vocab_size=4096, layers=1)
    for name in TOKENIZER_FILES:
        shutil.copy(MODEL / name, path)
    look_at(path)  # Late imports must not count as the checkpoint's cost.
    return path


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def look_at(path: Path) -> None:
    config = load_config(path)
    check_files(path, config)
    load_tokenizer(path)
    load_weights(path, config, "cpu", config.dtype)


def refused(look: Callable[[], object], error: type[ConfigError] = ConfigError) -> str:
    """The message of the error that `look` raises. It must be printable, and not too long."""
    with pytest.raises(error) as caught, bounded():
        look()
    message = str(caught.value)
    assert message.encode()
    assert len(message) < 1500
    return message


def complaint(look: Callable[[], object]) -> str | None:
    """The message of the ConfigError that `look` raises, or None."""
    try:
        with bounded():
            look()
    except ConfigError as error:
        return str(error)
    return None


def taken(data: dict[str, Any]) -> bool:
    message = complaint(lambda: rotary(parse_config(data)))
    assert message is None or (message.encode() and len(message) < 600)
    return message is None


@pytest.mark.parametrize("field", TAKEN)
def test_every_field_of_a_config_takes_its_values_or_is_refused(field: str) -> None:
    rotary(parse_config(ORTHRUS_1_7B))
    config = {k: v for k, v in ORTHRUS_1_7B.items() if k != "torch_dtype"}
    found = {name for name, value in VALUES.items() if taken(config | {field: value})}
    assert found == TAKEN[field]


@pytest.mark.parametrize("field", ROPE_TAKEN)
def test_every_rotary_setting_takes_its_values_or_is_refused(field: str) -> None:
    rotary(parse_config(ORTHRUS_1_7B))
    found = {
        name
        for name, value in VALUES.items()
        if taken(ORTHRUS_1_7B | {"rope_scaling": YARN | {field: value}})
    }
    assert found == ROPE_TAKEN[field]


@pytest.mark.parametrize("field", ["eos_token_id", "bos_token_id", "pad_token_id"])
def test_special_tokens_of_a_generation_config(model: Path, field: str) -> None:
    edit_json(model / "config.json", eos_token_id=None, bos_token_id=None, pad_token_id=None)
    for name, value in VALUES.items():
        (model / "generation_config.json").write_text(json.dumps({field: value}))
        fits = {"null", "zero", *({"list", "empty-list"} if field == "eos_token_id" else ())}
        if name in fits:
            load_config(model)
        else:
            message = refused(lambda: load_config(model))
            assert "generation_config.json" in message, name
            assert field in message


def test_a_checkpoint_without_an_end_token_loads(model: Path) -> None:
    edit_json(model / "config.json", eos_token_id=None)
    (model / "generation_config.json").write_text('{"eos_token_id": []}')
    assert load_config(model).eos_token_ids == ()
    engine = Engine.from_pretrained(EngineConfig(model=str(model), kv_cache_tokens=256))
    assert engine.generate([[1, 2, 3]])[0][0].finish_reason == "length"


def _socket(file: Path) -> None:
    before = Path.cwd()
    os.chdir(file.parent)  # A socket's path may have 108 bytes only.
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(file.name)
    finally:
        os.chdir(before)


def _terabyte(file: Path) -> None:
    file.touch()
    os.truncate(file, 1 << 40)


FILES: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "device": lambda file: file.symlink_to("/dev/zero"),
    "directory": Path.mkdir,
    "loop": lambda file: file.symlink_to(file),
    "dangling": lambda file: file.symlink_to(file.with_name("nowhere")),
    "socket": _socket,
    "empty": Path.touch,
    "terabyte": _terabyte,
    "deep-list": lambda file: file.write_text("[" * 100_000),
    "deep-object": lambda file: file.write_text('{"a":' * 100_000),
    "byte-order-mark": lambda file: file.write_bytes(b"\xef\xbb\xbf{}"),
    "utf-16": lambda file: file.write_bytes('{"a": 1}'.encode("utf-16")),
    "not-utf-8": lambda file: file.write_bytes(b'{"a": "\xff\xfe"}'),
    "half-a-million-digits": lambda file: file.write_text('{"vocab_size": ' + "9" * 500_000 + "}"),
    "list": lambda file: file.write_text("[" + "{}," * 300_000 + "{}]"),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ],
)
def test_anything_in_the_place_of_a_file_is_refused(model: Path, name: str, kind: str) -> None:
    file = model / name
    file.unlink(missing_ok=True)
    if name.endswith("index.json"):
        (model / "model.safetensors").unlink()
    FILES[kind](file)
    assert str(model) in refused(lambda: look_at(model))


@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "loop", "dangling", "terabyte", "not-utf-8"])
def test_anything_in_the_place_of_a_template_is_refused(model: Path, kind: str) -> None:
    file = model / "chat_template.jinja"
    file.unlink()
    FILES[kind](file)
    assert str(model) in refused(lambda: look_at(model))


def _entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


def _write_header(model: Path, raw: bytes) -> None:
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0" * 8)


@pytest.mark.parametrize("value", VALUES)
def test_headers_of_any_value(model: Path, value: str) -> None:
    v = VALUES[value]
    headers: list[Any] = [v, {"a": v}, {"__metadata__": v, "a": _entry()}]
    headers += [{"a": _entry(**{field: v})} for field in _entry()]
    headers += [
        {"a": _entry(data_offsets=[v, 8])},
        {"a": _entry(data_offsets=[0, v])},
        {"a": _entry(shape=[v])},
    ]
    for header in headers:
        _write_header(model, json.dumps(header).encode())
        assert str(model) in refused(lambda: look_at(model), CheckpointError)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ('{"a": %s, "b": %s}' % ((json.dumps(_entry()),) * 2), "tensor b overlaps the tensor before it"),
        ('{"a": %s, "a": %s}' % ((json.dumps(_entry()),) * 2), "it has 'a' twice"),
        (json.dumps({"a": _entry(data_offsets=[8, 16])}), "tensor a leaves bytes before it unused"),
        (json.dumps({"a": _entry(shape=[3])}), "tensor a of shape [3] in F32 has 8 bytes"),
        (json.dumps({"a": _entry(shape=[1 << 62, 1 << 62])}), "tensor a of shape"),
        (json.dumps({"a": _entry(shape=[1] * 100_000)}), "tensor a: dtype is"),
        ('{"a": ' * 100_000, "nested too deeply"),
    ],
)
def test_headers_that_contradict_themselves(model: Path, header: str, words: str) -> None:
    _write_header(model, header.encode())
    assert words in refused(lambda: look_at(model), CheckpointError)


def test_a_header_of_gigabytes(model: Path) -> None:
    file = model / "model.safetensors"
    for length, words in ((1 << 62, "expected a safetensors header"), (3 << 30, "no model needs more than")):
        file.write_bytes(struct.pack("<Q", length))
        os.truncate(file, 4 << 30)
        assert words in refused(lambda: look_at(model), CheckpointError)


def test_weights_that_no_machine_holds(model: Path) -> None:
    size = {"vocab_size": 1 << 24, "hidden_size": 1 << 17, "intermediate_size": 1 << 20}
    edit_json(model / "config.json", **size)
    message = refused(lambda: Engine.from_pretrained(EngineConfig(model=str(model))))
    assert "of memory" in message


def test_a_context_that_nobody_uses_costs_nothing(model: Path) -> None:
    edit_json(model / "config.json", max_position_embeddings=(1 << 31) - 1)
    with bounded():
        # Measuring what passes cost would take two seconds of its own.
        engine = Engine.from_pretrained(
            EngineConfig(model=str(model), kv_cache_tokens=256, adaptive_draft=False)
        )
    assert engine.max_model_len == 256
    assert engine.generate([[1, 2, 3]])[0][0].token_ids


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.k_proj_diff.weight"])
def test_weights_that_are_no_numbers(model: Path, name: str, value: float) -> None:
    file = model / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file)
    message = refused(lambda: look_at(model), CheckpointError)
    assert f"model.safetensors: tensor {name} holds values that are NaN or infinite" in message


def test_weights_that_a_dtype_does_not_hold(model: Path) -> None:
    file = model / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, file)
    config = load_config(model)
    load_weights(model, config, "cpu", "float32")
    with pytest.raises(
        CheckpointError, match=r"model\.norm\.weight has values too large for float16: set dtype"
    ):
        load_weights(model, config, "cpu", torch.float16)


@pytest.mark.parametrize(
    "field", ["model", "pre_tokenizer", "decoder", "added_tokens", "normalizer", "version"]
)
def test_tokenizers_of_any_value(model: Path, field: str) -> None:
    file = model / "tokenizer.json"
    original = json.loads(file.read_text())
    for name, value in VALUES.items():
        file.write_text(json.dumps(original | {field: value}))
        message = complaint(lambda: load_tokenizer(model))
        assert message is None or (message.encode() and len(message) < 1500), name


def test_a_checkpoints_own_code_is_not_run(model: Path) -> None:
    edit_json(
        model / "tokenizer_config.json",
        tokenizer_class="Own",
        auto_map={"AutoTokenizer": ["own.Own", "own.Own"]},
    )
    (model / "own.py").write_text("raise SystemExit('ran')")
    complaint(lambda: load_tokenizer(model))
