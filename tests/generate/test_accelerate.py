"""`orthrus.accelerate` against Hugging Face's own `generate`: same arguments, same result."""

import copy
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    Qwen3ForCausalLM,
    StoppingCriteriaList,
    TopKLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

import orthrus
from orthrus.errors import ConfigError, RequestError
from orthrus.generate.accelerated import AcceleratedModel
from orthrus.requests.request import SamplingParams
from tests.checkpoints import edit_json, make_checkpoint

VOCAB = 128
PAD = 3
PROMPT = torch.tensor([[11, 42, 7, 99, 23, 64]])
# Three prompts of different lengths, padded on the left, with a pad id that also occurs as a token.
BATCH = torch.tensor([[PAD, PAD, PAD, 5, 9], [PAD, 17, 81, 33, 2], [8, 6, PAD, 55, 101]])
MASK = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])


def load_reference(path: Path) -> Qwen3ForCausalLM:
    """The AR view as Hugging Face runs it, in float32."""
    return Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def accelerated(path: Any, **settings: Any) -> AcceleratedModel:
    # Fixed draft lengths: how many tokens a cycle brings must not depend on this machine's speed.
    defaults: dict[str, Any] = {"adaptive_draft": False, "kv_cache_tokens": 4096, "device": "cpu"}
    return orthrus.accelerate(path, **(defaults | settings))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("accelerate") / "orthrus", vocab_size=VOCAB, seed=1)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Qwen3ForCausalLM:
    return load_reference(checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> AcceleratedModel:
    return accelerated(checkpoint)


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "model" in request.fixturenames:
        engine = request.getfixturevalue("model").engine
        assert not engine.has_work
        assert engine.stats.kv_pages_used == 0


def assert_same(model: AcceleratedModel, reference: Qwen3ForCausalLM, *args: Any, **kwargs: Any) -> Tensor:
    """Both generate the same, to the shape and dtype. Returns it."""
    expected = reference.generate(*args, **kwargs)
    result = model.generate(*args, **kwargs)
    assert result.dtype == expected.dtype
    assert result.tolist() == expected.tolist()
    return result


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
    if "diffusion" in shape:
        assert model.stats.tokens_per_cycle == 1.0
    elif "correlated" not in shape:
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


# --- stop strings


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One character per token id."""
    letters = [chr(i) for i in range(0x21, 0x180) if chr(i).isalnum()]
    characters = Tokenizer(WordLevel({letters[i]: i for i in range(VOCAB)}, unk_token=letters[0]))
    characters.pre_tokenizer = Split("", "isolated")
    characters.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters)


def test_stop_strings(
    model: AcceleratedModel, reference: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    free = reference.generate(PROMPT, max_new_tokens=24)[0, 6:].tolist()
    text = tokenizer.decode(free)
    assert len(text) == len(free)
    arguments: dict[str, Any] = {"max_new_tokens": 24, "tokenizer": tokenizer}
    result = assert_same(model, reference, PROMPT, stop_strings=text[9:12], **arguments)
    assert result.shape[1] <= 6 + 12
    # It may begin in the prompt, and of several the first to be complete ends the sequence.
    spanning = tokenizer.decode(PROMPT[0].tolist())[-1] + text[0]
    result = assert_same(model, reference, PROMPT, stop_strings=[text[9:12], spanning], **arguments)
    assert result.shape[1] == 6 + 1
    rows = assert_same(
        model,
        reference,
        torch.cat([PROMPT, PROMPT.flip(1)]),
        stop_strings=[text[4:6]],
        pad_token_id=PAD,
        **arguments,
    )
    assert (rows[0, 6 + 6 :] == PAD).all()


def test_stop_strings_need_a_tokenizer_and_padding(
    model: AcceleratedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(RequestError) as caught:
        model.generate(PROMPT, max_new_tokens=5, stop_strings="x")
    assert caught.value.param == "tokenizer"
    with pytest.raises(RequestError) as caught:
        model.generate(
            BATCH,
            max_new_tokens=5,
            stop_strings="x",
            tokenizer=tokenizer,
            eos_token_id=None,
            pad_token_id=PAD,
        )
    assert caught.value.param == "stop_strings"


# --- streamers


class Recorder(BaseStreamer):
    """Notes what it is given; raises at the `fail_at`-th call of put."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls: list[Any] = []
        self.fail_at = fail_at

    def put(self, value: Tensor) -> None:
        if len(self.calls) == self.fail_at:
            raise ConnectionError("the reader is gone")
        self.calls.append((value.dtype, value.tolist()))

    def end(self) -> None:
        self.calls.append("end")


def test_streamer(model: AcceleratedModel, reference: Qwen3ForCausalLM) -> None:
    expected, recorder = Recorder(), Recorder()
    reference.generate(PROMPT, max_new_tokens=17, streamer=expected)
    result = model.generate(PROMPT, max_new_tokens=17, streamer=recorder)
    assert recorder.calls == expected.calls
    assert recorder.calls[0] == (torch.int64, PROMPT.tolist())
    assert [ids for _, (ids,) in recorder.calls[1:-1]] == result[0, 6:].tolist()


def test_streamer_that_fails_leaves_nothing_behind(model: AcceleratedModel) -> None:
    whole = model.generate(PROMPT, max_new_tokens=17)
    with pytest.raises(ConnectionError):
        model.generate(PROMPT, max_new_tokens=17, streamer=Recorder(fail_at=4))
    assert not model.engine.has_work
    assert model.generate(PROMPT, max_new_tokens=17).tolist() == whole.tolist()


def test_streamer_follows_one_sequence(model: AcceleratedModel) -> None:
    for arguments in (
        {"input_ids": BATCH},
        {"input_ids": PROMPT, "do_sample": True, "num_return_sequences": 2},
    ):
        with pytest.raises(RequestError) as caught:
            model.generate(**arguments, max_new_tokens=5, streamer=Recorder())
        assert caught.value.param == "streamer"


# --- sampling


def test_sampling_is_repeatable(model: AcceleratedModel) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 16, "do_sample": True, "top_p": 0.95}
    torch.manual_seed(5)
    first = model.generate(PROMPT, **arguments)
    second = model.generate(PROMPT, **arguments)
    torch.manual_seed(5)
    assert model.generate(PROMPT, **arguments).tolist() == first.tolist()
    assert second.tolist() != first.tolist()
    seeded = model.generate(PROMPT, **arguments, seed=9)
    assert model.generate(PROMPT, **arguments, seed=9).tolist() == seeded.tolist()
    state = torch.get_rng_state()
    model.generate(PROMPT, **arguments, seed=9)
    model.generate(PROMPT, max_new_tokens=4)
    assert torch.equal(torch.get_rng_state(), state)


def test_seed_is_the_servers(model: AcceleratedModel) -> None:
    result = model.generate(PROMPT, max_new_tokens=16, do_sample=True, seed=9, top_k=20, temperature=0.8)
    params = SamplingParams(temperature=0.8, top_k=20, seed=9, max_tokens=16)
    ((completion,),) = model.engine.generate([PROMPT[0].tolist()], params)
    assert list(completion.token_ids) == result[0, 6:].tolist()


def test_samples_do_not_depend_on_the_schedule(checkpoint: Path, model: AcceleratedModel) -> None:
    plain = accelerated(checkpoint, schedule="ar")
    arguments: dict[str, Any] = {"attention_mask": MASK, "max_new_tokens": 24, "do_sample": True, "seed": 3}
    result = model.generate(BATCH, **arguments, num_return_sequences=2)
    assert result.tolist() == plain.generate(BATCH, **arguments, num_return_sequences=2).tolist()
    assert plain.stats is not None
    assert plain.stats.tokens_per_cycle == 1.0


def test_rows_are_independent_samples(model: AcceleratedModel) -> None:
    same = PROMPT.repeat(3, 1)
    result = model.generate(same, max_new_tokens=16, do_sample=True, num_return_sequences=2, seed=1)
    assert result.shape[0] == 6
    assert (result[:, :6] == PROMPT).all()
    assert len({tuple(row) for row in result.tolist()}) == 6


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"top_k": 0},
        {"top_k": None},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"temperature": 0.5, "top_k": 5, "top_p": 0.8},
    ],
    ids=str,
)
def test_samples_have_the_distribution_of_hugging_face(
    model: AcceleratedModel, reference: Qwen3ForCausalLM, arguments: dict[str, Any]
) -> None:
    first = reference.generate(
        PROMPT,
        do_sample=True,
        max_new_tokens=1,
        return_dict_in_generate=True,
        output_scores=True,
        **arguments,
    )
    expected = first.scores[0][0].softmax(-1)
    drawn = []
    for seed in range(16):
        samples = model.generate(
            PROMPT, do_sample=True, max_new_tokens=1, num_return_sequences=128, seed=seed, **arguments
        )
        drawn.append(samples[:, -1])
    observed = torch.cat(drawn).bincount(minlength=VOCAB) / 2048
    assert (observed[expected == 0] == 0).all()
    # Total variation of 2048 draws from at most 128 tokens: about 0.1 when right.
    assert (observed - expected).abs().sum() / 2 < 0.15


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


@pytest.fixture(scope="module")
def module(checkpoint: Path) -> Qwen3ForCausalLM:
    """A Hugging Face module with the diffusion view's parameters where Orthrus has them."""
    module = load_reference(checkpoint)
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        if "_diff." in name:
            owner, attribute, _ = name.rsplit(".", 2)
            holder = torch.nn.Module()
            holder.weight = torch.nn.Parameter(tensor)
            module.get_submodule(owner).add_module(attribute, holder)
    return module


def test_module_with_diffusion_weights(module: Qwen3ForCausalLM, model: AcceleratedModel) -> None:
    own = accelerated(module)
    assert own.engine.schedule_name == "orthrus"
    result = own.generate(PROMPT, max_new_tokens=32)
    assert result.tolist() == model.generate(PROMPT, max_new_tokens=32).tolist()
    assert own.stats == model.stats


def test_module_keeps_its_weights(module: Qwen3ForCausalLM) -> None:
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    model = accelerated(module)
    model.generate(PROMPT, max_new_tokens=8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert torch.equal(model(PROMPT).logits, module(PROMPT).logits)


def test_module_loaded_without_its_diffusion_weights(checkpoint: Path, reference: Qwen3ForCausalLM) -> None:
    with pytest.warns(UserWarning, match="without the diffusion weights"):
        model = accelerated(reference)
    assert model.engine.schedule_name == "ar"
    assert_same(model, reference, PROMPT, max_new_tokens=16)
    with pytest.raises(ConfigError, match=str(checkpoint)):
        accelerated(reference, schedule="orthrus")


def test_module_attributes(module: Qwen3ForCausalLM) -> None:
    model = accelerated(module)
    assert model.config is module.config
    assert model.generation_config is module.generation_config
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float32
    assert model.eval() is model
    assert model.lm_head is module.lm_head
    assert model.num_parameters() == module.num_parameters()
    with pytest.raises(AttributeError, match="device="):
        model.to("cpu")
    assert not hasattr(model, "no_such_attribute")


def test_checkpoint_attributes(model: AcceleratedModel) -> None:
    assert model.config.vocab_size == VOCAB
    assert model.config.block_size == 8
    assert model.device == torch.device("cpu")
    assert "orthrus" in repr(model)
    with pytest.raises(AttributeError, match="from_pretrained"):
        model(PROMPT)
    assert not hasattr(model, "lm_head")


def test_dtype_is_converted(module: Qwen3ForCausalLM) -> None:
    model = accelerated(module, dtype=torch.float64)
    assert model.dtype == torch.float64
    expected = module.generate(PROMPT, max_new_tokens=8)
    assert model.generate(PROMPT, max_new_tokens=8).tolist() == expected.tolist()


def test_what_cannot_be_accelerated(checkpoint: Path, module: Qwen3ForCausalLM) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes))
    with pytest.raises(ConfigError, match="llama"):
        accelerated(llama)
    with pytest.raises(ConfigError, match="int"):
        accelerated(7)
    with pytest.raises(ConfigError, match="max_num_seq"):
        accelerated(checkpoint, max_num_seq=3)
    with pytest.raises(ConfigError, match="schedule"):
        accelerated(checkpoint, schedule="fast")
    adapted = copy.deepcopy(module)
    adapted.model.layers[0].self_attn.q_proj.add_module("lora_A", torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="lora_A"):
        accelerated(adapted)


def test_a_head_untied_by_hand_counts(tmp_path: Path) -> None:
    reference = load_reference(make_checkpoint(tmp_path / "model", vocab_size=VOCAB, diffusion=False))
    tied = assert_same(accelerated(reference), reference, PROMPT, max_new_tokens=12)
    generator = torch.Generator().manual_seed(1)
    reference.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, 64, generator=generator))
    assert reference.config.tie_word_embeddings
    own = assert_same(accelerated(reference), reference, PROMPT, max_new_tokens=12)
    assert own.tolist() != tied.tolist()


def test_a_file_s_own_head_counts(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", vocab_size=VOCAB, diffusion=False)
    tensors = {name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(1)
    tensors["lm_head.weight"] = torch.randn(VOCAB, 64, generator=generator)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert_same(accelerated(path), load_reference(path), PROMPT, max_new_tokens=12)


def _replaced(module: Qwen3ForCausalLM) -> None:
    mlp = module.model.layers[0].mlp
    mlp.forward = lambda x: 0.0 * x


def _subclassed(module: Qwen3ForCausalLM) -> None:
    class Shifted(torch.nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1.0

    module.model.layers[1].self_attn.o_proj.__class__ = Shifted


def _parametrized(module: Qwen3ForCausalLM) -> None:
    torch.nn.utils.parametrizations.weight_norm(module.model.layers[0].mlp.up_proj)


def _int8(module: Qwen3ForCausalLM) -> None:
    weight = torch.zeros_like(module.lm_head.weight, dtype=torch.int8)
    module.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)


CHANGES: dict[str, tuple[Callable[[Qwen3ForCausalLM], object], str]] = {
    "hook": (lambda m: m.register_forward_hook(lambda *_: None), "the model has a forward hook"),
    "pre-hook": (lambda m: m.register_forward_pre_hook(lambda *_: None), "the model has a forward pre-hook"),
    "hook-with-kwargs": (
        lambda m: m.model.register_forward_hook(lambda *_: None, with_kwargs=True),
        "the model's model has a forward hook",
    ),
    "hook-on-a-layer": (
        lambda m: m.model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: None),
        "the model's model.layers.1.mlp.down_proj has a forward hook",
    ),
    "pre-hook-on-the-head": (
        lambda m: m.lm_head.register_forward_pre_hook(lambda *_: None),
        "the model's lm_head has a forward pre-hook",
    ),
    "replaced-forward": (_replaced, "the model's model.layers.0.mlp has a forward method of its own"),
    "subclass": (_subclassed, "the model's model.layers.1.self_attn.o_proj is a Shifted"),
    "parametrization": (_parametrized, "the model's model.layers.0.mlp.up_proj"),
    "int8": (_int8, "lm_head.weight is torch.int8"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_module_computes_beside_its_weights_is_refused(module: Qwen3ForCausalLM, change: str) -> None:
    apply, words = CHANGES[change]
    changed = copy.deepcopy(module)
    accelerated(changed)
    apply(changed)
    with pytest.raises(ConfigError, match=re.escape(words)):
        accelerated(changed)


def test_hooks_of_transformers_itself_only_look_on(module: Qwen3ForCausalLM) -> None:
    watched = copy.deepcopy(module)
    watched.enable_input_require_grads()
    watched(PROMPT, output_hidden_states=True)
    accelerated(watched)


def test_weights_that_are_on_no_device(module: Qwen3ForCausalLM) -> None:
    with torch.device("meta"):
        empty = Qwen3ForCausalLM(module.config)
    with pytest.raises(ConfigError, match="on no device"):
        accelerated(empty, schedule="ar")


def test_wrappers_are_refused(module: Qwen3ForCausalLM) -> None:
    with pytest.raises(ConfigError, match="got OptimizedModule"):
        accelerated(torch.compile(module))


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
