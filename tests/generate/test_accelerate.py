"""`orthrus.accelerate` against Hugging Face's own `generate`: same arguments, same result."""

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    Qwen3ForCausalLM,
    StoppingCriteriaList,
    TopKLogitsWarper,
)

import orthrus
from orthrus.errors import RequestError
from orthrus.generate.accelerated import AcceleratedModel
from tests.checkpoints import edit_json, make_checkpoint
from tests.generate.against import BATCH, MASK, PAD, PROMPT, VOCAB, accelerated, assert_same, load_reference

# --- greedy decoding


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tie": False, "heads": 4, "kv_heads": 4},
        {"heads": 8, "kv_heads": 1, "head_dim": 8, "layers": 3, "bias": True},
        {"yarn": True, "layers": 1, "block_size": 4},
        {"correlated": False, "hidden_size": 32},
        {"diffusion": False},
    ],
    ids=["default", "untied", "one-kv-head-bias", "yarn", "bad-drafts", "plain"],
)
def test_greedy_equals_hugging_face(tmp_path: Path, shape: dict[str, Any]) -> None:
    path = make_checkpoint(tmp_path / "model", vocab_size=VOCAB, **shape)
    reference, model = load_reference(path), accelerated(path)
    assert_same(model, reference, PROMPT, max_new_tokens=48)
    assert model.stats is not None
    assert model.engine.schedule_name == ("ngram" if "diffusion" in shape else "orthrus")
    if "correlated" not in shape:
        assert model.stats.tokens_per_cycle > 1.1
    assert_same(model, reference, input_ids=BATCH, attention_mask=MASK, max_new_tokens=32, pad_token_id=PAD)


def test_hole_in_the_mask(model: AcceleratedModel, reference: Qwen3ForCausalLM) -> None:
    mask = torch.tensor([[1, 1, 0, 0, 1, 1]])
    shown = assert_same(model, reference, PROMPT, attention_mask=mask, max_new_tokens=16)
    full = assert_same(model, reference, PROMPT, max_new_tokens=16)
    assert shown.tolist() != full.tolist()


def test_mask_is_inferred_from_the_pad_token(model: AcceleratedModel, reference: Qwen3ForCausalLM) -> None:
    inferred = assert_same(model, reference, BATCH, max_new_tokens=16, pad_token_id=PAD)
    # A pad token that also ends sequences says nothing about the prompt.
    plain = assert_same(model, reference, BATCH, max_new_tokens=16, pad_token_id=PAD, eos_token_id=[PAD, 1])
    assert inferred.tolist() != plain.tolist()


def test_end_tokens_and_padding(model: AcceleratedModel, reference: Qwen3ForCausalLM) -> None:
    batch: dict[str, Any] = {"input_ids": BATCH, "attention_mask": MASK, "max_new_tokens": 24}
    free = assert_same(model, reference, **batch, eos_token_id=None)
    # Tokens that end the first two rows at different steps.
    ends = [int(free[0, 5 + 3]), int(free[1, 5 + 9])]
    for eos in (ends[0], ends, torch.tensor(ends), -1):
        assert_same(model, reference, **batch, eos_token_id=eos)
        result = assert_same(model, reference, **batch, eos_token_id=eos, pad_token_id=PAD)
        if eos is ends:
            assert (result[0, 5 + 4 :] == PAD).all()


def test_result_is_as_wide_as_the_longest_row(model: AcceleratedModel, reference: Qwen3ForCausalLM) -> None:
    free = reference.generate(PROMPT, max_new_tokens=12, eos_token_id=None)
    twice = PROMPT.repeat(2, 1)
    result = assert_same(model, reference, twice, max_new_tokens=12, eos_token_id=int(free[0, 6 + 4]))
    assert result.shape[1] <= 6 + 5


def test_repetition_penalty_counts_the_prompt(model: AcceleratedModel, reference: Qwen3ForCausalLM) -> None:
    plain = reference.generate(PROMPT, max_new_tokens=32)
    penalised = assert_same(model, reference, PROMPT, max_new_tokens=32, repetition_penalty=1.7)
    assert penalised.tolist() != plain.tolist()
    assert_same(
        model,
        reference,
        BATCH,
        attention_mask=MASK,
        max_new_tokens=24,
        repetition_penalty=1.3,
        pad_token_id=PAD,
    )


# --- arguments


def test_lengths(model: AcceleratedModel, reference: Qwen3ForCausalLM) -> None:
    assert_same(model, reference, PROMPT, max_length=17)
    assert_same(model, reference, inputs=BATCH, attention_mask=MASK, max_length=17)
    assert_same(model, reference, PROMPT, max_length=9, max_new_tokens=7)
    with pytest.warns(UserWarning, match="max_new_tokens"):
        result = assert_same(model, reference, PROMPT)
    assert result.shape[1] == PROMPT.shape[1] + 20


def test_generation_configs_are_merged(tmp_path: Path) -> None:
    reference = load_reference(make_checkpoint(tmp_path / "plain", vocab_size=VOCAB, diffusion=False))
    model = accelerated(reference)
    assert model.generation_config is reference.generation_config
    reference.generation_config.update(repetition_penalty=1.4, max_new_tokens=11, pad_token_id=PAD)
    own = assert_same(model, reference, PROMPT)
    given = GenerationConfig(max_new_tokens=13)
    # What the given config leaves open, the model's own decides.
    assert assert_same(model, reference, PROMPT, given)[0, : own.shape[1]].tolist() == own[0].tolist()
    assert_same(model, reference, PROMPT, generation_config=GenerationConfig(repetition_penalty=1.0))
    result = assert_same(model, reference, PROMPT, generation_config=given, max_new_tokens=5)
    assert result.shape[1] == PROMPT.shape[1] + 5
    assert given.repetition_penalty is None


def test_generation_config_of_a_checkpoint(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", vocab_size=VOCAB, eos_token_id=[1, 2])
    edit_json(path / "generation_config.json", repetition_penalty=1.4, pad_token_id=PAD, max_new_tokens=9)
    model = accelerated(path)
    assert model.generation_config.eos_token_id == [1, 2]
    result = assert_same(model, load_reference(path), PROMPT)
    assert result.shape[1] <= PROMPT.shape[1] + 9
    (path / "generation_config.json").unlink()
    assert accelerated(path).generation_config.eos_token_id == [1, 2]


def test_arguments_without_effect(model: AcceleratedModel) -> None:
    plain = model.generate(PROMPT, max_new_tokens=9)
    same = model.generate(
        PROMPT,
        max_new_tokens=9,
        use_cache=False,
        cache_implementation="static",
        num_beams=1,
        temperature=0.0,
        typical_p=0.9,
        min_new_tokens=None,
        logits_processor=LogitsProcessorList(),
        stopping_criteria=StoppingCriteriaList(),
        past_key_values=None,
        length_penalty=2.0,
    )
    assert same.tolist() == plain.tolist()


def test_output_object(model: AcceleratedModel, reference: Qwen3ForCausalLM) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 9, "return_dict_in_generate": True}
    expected = reference.generate(PROMPT, **arguments)
    result = model.generate(PROMPT, **arguments)
    assert type(result) is type(expected)
    assert result.sequences.tolist() == expected.sequences.tolist()
    assert result.scores is None


def test_prompt_from_bos(model: AcceleratedModel, reference: Qwen3ForCausalLM) -> None:
    assert_same(model, reference, bos_token_id=7, max_new_tokens=9)
    with pytest.raises(RequestError) as caught:
        model.generate(max_new_tokens=9)
    assert caught.value.param == "input_ids"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 2),
        ("logits_processor", LogitsProcessorList([TopKLogitsWarper(3)])),
        ("stopping_criteria", StoppingCriteriaList([lambda ids, scores: True])),
        ("prefix_allowed_tokens_fn", lambda batch, ids: [1]),
        ("synced_gpus", True),
        ("assistant_model", "anything"),
        ("negative_prompt_ids", PROMPT),
        ("custom_generate", "some/repo"),
        ("past_key_values", ((PROMPT,),)),
        ("inputs_embeds", torch.zeros(1, 6, 64)),
        ("position_ids", PROMPT),
        ("token_type_ids", PROMPT),
        ("max_tokens", 5),
        ("temprature", 0.5),
        ("output_scores", True),
        ("output_logits", True),
        ("output_attentions", True),
        ("output_hidden_states", True),
        ("min_new_tokens", 3),
        ("min_length", 8),
        ("max_time", 1.0),
        ("no_repeat_ngram_size", 2),
        ("encoder_repetition_penalty", 1.2),
        ("bad_words_ids", [[1]]),
        ("suppress_tokens", [1]),
        ("begin_suppress_tokens", [1]),
        ("sequence_bias", [[[1], 2.0]]),
        ("forced_bos_token_id", 0),
        ("forced_eos_token_id", 5),
        ("guidance_scale", 1.5),
        ("watermarking_config", {"bias": 1.0}),
        ("prompt_lookup_num_tokens", 4),
        ("use_mtp", True),
        ("token_healing", True),
        ("dola_layers", "high"),
        ("exponential_decay_length_penalty", (2, 1.1)),
        ("remove_invalid_values", True),
        ("cache_implementation", "quantized"),
        ("num_return_sequences", 2),
        ("max_new_tokens", 0),
        ("max_new_tokens", 1000),
        ("max_length", 6),
        ("max_length", 1000),
        ("attention_mask", torch.ones(1, 7)),
        ("attention_mask", torch.tensor([[1, 1, 1, 1, 1, 0]])),
        ("attention_mask", [1] * 6),
        ("input_ids", PROMPT[0]),
        ("input_ids", PROMPT.float()),
        ("input_ids", [[1, 2]]),
        ("input_ids", torch.zeros(1, 0, dtype=torch.long)),
        ("input_ids", PROMPT + VOCAB),
        ("eos_token_id", "</s>"),
        ("generation_config", {"max_new_tokens": 3}),
        ("repetition_penalty", 0.0),
        ("schedule", "fastest"),
    ],
)
def test_errors_name_the_argument(model: AcceleratedModel, name: str, value: Any) -> None:
    arguments = {"input_ids": PROMPT, "max_new_tokens": 5, name: value}
    if name == "max_length":
        del arguments["max_new_tokens"]
    with pytest.raises(RequestError) as caught:
        model.generate(**arguments)
    assert isinstance(caught.value, ValueError)
    assert caught.value.param == name
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("min_p", 2.0),
        ("typical_p", 0.5),
        ("epsilon_cutoff", 0.1),
        ("eta_cutoff", 0.1),
        ("top_h", 0.4),
        ("seed", -1),
        ("num_return_sequences", 1000),
    ],
)
def test_errors_of_sampling_name_the_argument(model: AcceleratedModel, name: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        model.generate(PROMPT, max_new_tokens=5, do_sample=True, **{name: value})
    assert caught.value.param == name
    assert name in str(caught.value)


def test_prompts_are_given_once(model: AcceleratedModel) -> None:
    with pytest.raises(RequestError) as caught:
        model.generate(PROMPT, input_ids=PROMPT, max_new_tokens=5)
    assert caught.value.param == "inputs"


# --- acceleration, and the rest of the object


def test_tokens_per_cycle(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", vocab_size=VOCAB, seed=1, noise=0.0, block_size=8)
    model = accelerated(path)
    model.generate(PROMPT, max_new_tokens=64, eos_token_id=None)
    stats = model.stats
    assert stats is not None
    assert (stats.sequences, stats.prompt_tokens, stats.new_tokens) == (1, 6, 64)
    assert stats.cycle_tokens == 63
    assert stats.passes == 1 + 2 * stats.cycles
    assert stats.tokens_per_cycle == 63 / stats.cycles
    assert stats.tokens_per_cycle > 1.2
    drafted = model.generate(PROMPT, max_new_tokens=20, eos_token_id=None)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=20, eos_token_id=None, schedule="ar"), drafted)
    assert model.stats is not None and model.stats.tokens_per_cycle == 1.0


# --- the package


def test_import_is_light() -> None:
    code = "import sys, orthrus; orthrus.__version__; print(sorted({'torch', 'transformers', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_exports() -> None:
    assert {"accelerate", "Engine", "EngineConfig", "SamplingParams", "Request"} <= set(dir(orthrus))
    for name in orthrus.__all__:
        assert getattr(orthrus, name) is not None
    assert callable(orthrus.accelerate)
    with pytest.raises(AttributeError, match="speed_up"):
        orthrus.speed_up  # noqa: B018


def test_version_is_the_projects() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert orthrus.__version__ == project["project"]["version"]
