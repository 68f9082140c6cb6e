"""Unexpected values for every argument of `generate`: an error names the argument, or the result is Hugging Face's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, Qwen3ForCausalLM

import orthrus
from orthrus.errors import ConfigError, RequestError
from orthrus.generate.accelerated import AcceleratedModel
from orthrus.generate.hf_fields import KINDS
from tests.checkpoints import edit_json, make_checkpoint

PROMPT = torch.tensor([[11, 42, 7, 99]])
# Nothing here depends on what passes cost, so it is not measured.
SETTINGS: dict[str, Any] = {"kv_cache_tokens": 1024, "device": "cpu", "adaptive_draft": False}
ODD: dict[str, Any] = {
    "str": "5",
    "bytes": b"5",
    "nan": float("nan"),
    "inf": float("inf"),
    "minus-inf": float("-inf"),
    "negative": -3,
    "zero": 0,
    "true": True,
    "float": 2.5,
    "whole-float": 1.0,
    "huge": 10**400,
    "5000-digits": 10**5000,
    "huge-float": 1e308,
    "int64": np.int64(2),
    "float32": np.float32(1.5),
    "numpy-bool": np.bool_(True),
    "array": np.array([1, 2]),
    "tensor": torch.tensor(2),
    "float-tensor": torch.tensor(1.5),
    "bool-tensor": torch.tensor(True),
    "vector": torch.tensor([1, 2]),
    "meta": torch.tensor(1, device="meta"),
    "list": [],
    "nested": [[1], 2],
    "strings": ["a", 5],
    "dict": {"a": 1},
    "complex": 1j,
    "object": object(),
    "type": int,
}
OTHERS = (
    *("inputs", "input_ids", "attention_mask", "generation_config", "seed", "streamer", "tokenizer"),
    *("logits_processor", "stopping_criteria", "assistant_model", "synced_gpus", "custom_generate"),
    *("negative_prompt_ids", "past_key_values", "position_ids", "no_such_argument"),
)
FIELDS = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
# Fields without effect on greedy decoding or on sampling without beams. Neither Hugging Face nor we read them.
UNREAD = {
    *(
        "use_cache",
        "cache_config",
        "max_cache_len",
        "prefill_chunk_size",
        "compile_config",
        "disable_compile",
    ),
    *("low_memory", "continuous_batching_config", "renormalize_logits", "early_stopping", "length_penalty"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "max_matching_ngram_size"),
    *("decoder_start_token_id", "transformers_version", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
}
# Numbers that Hugging Face may refuse because of their type.
NUMBERS = {"int64", "float32", "tensor", "float-tensor", "huge-float", "whole-float", "zero"}


def attempt(model: Any, arguments: dict[str, Any]) -> tuple[list[list[int]] | None, RequestError | None]:
    try:
        result = model.generate(**arguments)
        return getattr(result, "sequences", result).tolist(), None
    except RequestError as error:
        return None, error


def complains_of(error: RequestError, name: str) -> bool:
    """Whether the message is short and names the argument, or what it lacks."""
    wanted = (name, None, "tokenizer") if name == "stop_strings" else (name, None)
    return name in str(error) and len(str(error)) < 500 and error.param in wanted


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("arguments") / "model", diffusion=False, layers=1)


@pytest.fixture(scope="module")
def reference(path: Path) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM.from_pretrained(path).eval()


@pytest.fixture(scope="module")
def model(path: Path) -> AcceleratedModel:
    return orthrus.accelerate(path, **SETTINGS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*FIELDS, *OTHERS])
def test_odd_values_are_refused_by_name_or_do_what_they_do_in_hugging_face(
    model: AcceleratedModel, reference: Qwen3ForCausalLM, name: str
) -> None:
    for kind, value in ODD.items():
        arguments = {"input_ids": PROMPT, "max_new_tokens": 3, "pad_token_id": 3, name: value}
        if name == "inputs":
            del arguments["input_ids"]
        if name == "max_length":
            del arguments["max_new_tokens"]
        result, error = attempt(model, arguments)
        if error is not None:
            assert complains_of(error, name), (kind, str(error))
        elif name not in UNREAD | {"seed", "tokenizer", "do_sample"}:
            try:
                expected = reference.generate(**arguments)
                expected = getattr(expected, "sequences", expected)
            except (ValueError, TypeError):
                assert kind in NUMBERS
            else:
                assert result == expected.tolist(), kind


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"])
def test_odd_values_of_sampling(model: AcceleratedModel, name: str) -> None:
    for kind, value in ODD.items():
        # A fixed seed, because some seeds would end the text early.
        arguments = {"input_ids": PROMPT, "max_new_tokens": 3, "do_sample": True, "seed": 0, name: value}
        result, error = attempt(model, arguments)
        assert (error is None) == (result is not None and len(result[0]) == 7)
        if error is not None:
            assert complains_of(error, name) and error.param == name, (kind, str(error))
        else:
            assert kind in NUMBERS | {"float"}, kind


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", 2.5),
        ("seed", 1.5),
        ("repetition_penalty", "1.2"),
        ("eos_token_id", []),
        ("eos_token_id", [[1]]),
        ("pad_token_id", 10**6),
        ("pad_token_id", -1),
        ("pad_token_id", [3]),
        ("num_return_sequences", 1.0),
        ("num_return_sequences", 0),
        ("max_new_tokens", "5"),
        ("max_new_tokens", 4.5),
        ("max_length", 9.0),
        ("do_sample", "no"),
        ("stop_strings", [""]),
        ("bos_token_id", "x"),
        ("attention_mask", torch.tensor([[2, 2, 2, 2]])),
        ("attention_mask", torch.tensor([[0.5, 1.0, 1.0, 1.0]])),
        ("attention_mask", torch.tensor([[float("nan"), 1.0, 1.0, 1.0]])),
        ("attention_mask", torch.tensor([[-1, 1, 1, 1]])),
        ("input_ids", PROMPT.float()),
        ("input_ids", PROMPT.bool()),
        ("input_ids", PROMPT.to(torch.uint8)),
        ("input_ids", PROMPT.to(torch.complex64)),
        ("input_ids", torch.zeros(0, 4, dtype=torch.int64)),
        ("input_ids", PROMPT.to("meta")),
    ],
)
def test_impossible_values_are_refused(model: AcceleratedModel, name: str, value: Any) -> None:
    arguments: dict[str, Any] = {"input_ids": PROMPT, "max_new_tokens": 3, name: value}
    if name == "max_length":
        del arguments["max_new_tokens"]
    with pytest.raises(RequestError) as caught:
        model.generate(**arguments)
    assert caught.value.param == name
    assert str(caught.value).startswith(name)


@pytest.mark.parametrize(
    "arguments",
    [
        {"input_ids": PROMPT.int()},
        {"attention_mask": torch.tensor([[0.0, 1.0, 1.0, 1.0]])},
        {"attention_mask": torch.tensor([[False, True, True, True]])},
        {"attention_mask": torch.tensor([[0, 1, 1, 1]], dtype=torch.uint8)},
        {"max_new_tokens": torch.tensor(4)},
        {"max_new_tokens": np.int64(4)},
        {"eos_token_id": 10**6},
        {"eos_token_id": (7, 9)},
        {"do_sample": True, "top_p": 0},
        {"do_sample": True, "top_p": 0.0, "top_k": 0, "temperature": 3.0},
    ],
)
def test_unusual_valid_values_do_what_they_do_in_hugging_face(
    model: AcceleratedModel, reference: Qwen3ForCausalLM, arguments: dict[str, Any]
) -> None:
    given: dict[str, Any] = {"input_ids": PROMPT, "max_new_tokens": 6, "pad_token_id": 3} | arguments
    expected, result = reference.generate(**given), model.generate(**given)
    assert result.dtype == expected.dtype
    assert result.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("name", "value", "off"),
    [
        ("no_repeat_ngram_size", 3, 0),
        ("min_new_tokens", 2, 0),
        ("forced_eos_token_id", 5, None),
        ("suppress_tokens", [1], None),
        ("num_beams", 4, 1),
        ("guidance_scale", 1.5, 1.0),
    ],
)
def test_a_setting_of_a_file_is_named_with_the_value_that_turns_it_off(
    path: Path, name: str, value: Any, off: Any
) -> None:
    model = orthrus.accelerate(path, **SETTINGS)
    plain = model.generate(PROMPT, max_new_tokens=3)
    setattr(model.generation_config, name, value)
    with pytest.raises(RequestError) as caught:
        model.generate(PROMPT, max_new_tokens=3)
    message = str(caught.value)
    assert caught.value.param == name
    assert (
        f"of the model's generation_config can't be honoured by accelerated generate: pass {name}={off!r}"
        in message
    )
    assert "leave it out" not in message
    # As advised.
    assert model.generate(PROMPT, max_new_tokens=3, **{name: off}).tolist() == plain.tolist()
    given = GenerationConfig(max_new_tokens=3, **{name: value})
    with pytest.raises(RequestError, match=f"of generation_config can't be honoured .*: set it to {off}"):
        model.generate(PROMPT, given)
    with pytest.raises(RequestError, match="generate: leave it out"):
        model.generate(PROMPT, max_new_tokens=3, **{name: value})


@pytest.mark.parametrize("name", KINDS)
def test_a_wrong_setting_of_a_file_is_named(tmp_path: Path, path: Path, name: str) -> None:
    model = orthrus.accelerate(path, **SETTINGS)
    setattr(model.generation_config, name, {"a": 1})
    with pytest.raises(RequestError, match=f"{name} of the model's generation_config must be"):
        model.generate(PROMPT, max_new_tokens=3)


def test_a_generation_config_that_transformers_rejects(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", diffusion=False, layers=1)
    edit_json(path / "generation_config.json", max_new_tokens=-1)
    with pytest.raises(ConfigError, match=r"generation_config\.json: transformers rejects it"):
        orthrus.accelerate(path, **SETTINGS)
