"""Stop strings, streamers and sampling through `orthrus.accelerate`, beside Hugging Face's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3ForCausalLM,
)
from transformers.generation.streamers import BaseStreamer

from orthrus.errors import RequestError
from orthrus.generate.accelerated import AcceleratedModel
from orthrus.requests.request import SamplingParams
from tests.generate.against import BATCH, MASK, PAD, PROMPT, VOCAB, accelerated, assert_same


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
    # A stop string may begin in the prompt. Of several, the first that is complete ends the sequence.
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


class Recorder(BaseStreamer):
    """Records what it is given, and raises at the `fail_at`-th call of put."""

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
