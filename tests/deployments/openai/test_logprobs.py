"""Log-probabilities in answers: every alternative has its own key, and every offset is a place in the returned text."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from openai.types.completion import Completion
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from orthrus.deployments.generation.choices import Choice
from orthrus.deployments.generation.generate import MAX_SCORES, check_scores
from orthrus.deployments.generation.text_chunk import TextChunk, text_chunk
from orthrus.deployments.openai.format import CompletionFormat
from orthrus.deployments.openai.logprobs import Echo, TextLogprobs, chat_logprobs, prompt_logprobs
from orthrus.deployments.tokenizer.info import tokenizer_info
from orthrus.errors import RequestError
from orthrus.requests.request import (
    Chunk,
    FinishReason,
    PromptLogprobs,
    RequestStats,
    SamplingParams,
    TokenLogprob,
)
from orthrus.text.stream import TextStream

SPECIAL, TWIN, PADDING = 256, 257, 300
STATS = RequestStats(prompt_tokens=5, cached_tokens=0, completion_tokens=3, cycles=1, passes=2, seed=7)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A token for each byte, whose id is the byte. Then a special token, and a second token for a blank."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    vocabulary = {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }
    bpe = Tokenizer(models.BPE(vocabulary, []))
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken("<|end|>", special=True)])
    bpe.add_tokens([AddedToken(" ", normalized=False)])  # The same text as the byte's own token.
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")


def scored(tokens: Sequence[int]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(token, -1.0 - i, ((token, -1.0 - i), (97, -9.0))) for i, token in enumerate(tokens)
    )


def answer(
    tokenizer: Any, parts: Sequence[Sequence[int]], params: SamplingParams, reason: FinishReason
) -> list[TextChunk]:
    """The chunks of a completion whose passes committed `parts`."""
    text = TextStream(tokenizer, params.stop, params.skip_special_tokens)
    items = []
    for i, part in enumerate(parts):
        last = i + 1 == len(parts)
        chunk = Chunk(
            "r", 0, tuple(part), scored(part), reason if last else None, None, STATS if last else None
        )
        if last and params.stop and reason == "stop":
            chunk = replace(chunk, stop_reason=params.stop[0])
        items.append(text_chunk(chunk, params, text, None))
    return items


def streamed(out: CompletionFormat, items: list[TextChunk]) -> tuple[str, dict[str, list[Any]]]:
    """What the events of an answer add up to. Checks that no token in an event begins after the end of the text so far."""
    text, whole = "", dict[str, list[Any]]()
    for item in items:
        [choice] = json.loads(out.stream(item, 0).removeprefix("data: "))["choices"]
        text += choice["text"]
        assert all(offset <= len(text) for offset in choice["logprobs"]["text_offset"])
        for name, values in choice["logprobs"].items():
            whole.setdefault(name, []).extend(values)
    return text, whole


PLAIN = SamplingParams(stop=("END",))
CASES: dict[str, tuple[Sequence[Sequence[int]], SamplingParams, FinishReason, str, list[int]]] = {
    "plain": ([b"ab", b"c"], PLAIN, "length", "abc", [0, 1, 2]),
    "characters of several tokens": (
        [b"a\xe6", b"\x97", b"\xa5b"],
        PLAIN,
        "length",
        "a\u65e5b",
        [0, 1, 1, 1, 2],
    ),
    "an unfinished character": ([b"a", b"\xe6\x97"], PLAIN, "length", "a\ufffd", [0, 1, 1]),
    "no character": ([b"a\xff", b"b"], PLAIN, "length", "a\ufffdb", [0, 1, 2]),
    "a stop string": ([b"ab", b"E", b"N", b"D"], PLAIN, "stop", "ab", [0, 1, 2, 2, 2]),
    "a stop string in one pass": ([b"abEND"], PLAIN, "stop", "ab", [0, 1, 2, 2, 2]),
    "no stop string after all": ([b"aE", b"N", b"x", b"y"], PLAIN, "length", "aENxy", [0, 1, 2, 3, 4]),
    "held back at the end": ([b"aE", b"N"], PLAIN, "length", "aEN", [0, 1, 2]),
    "a stop string that stays": (
        [b"ab", b"E", b"ND"],
        replace(PLAIN, include_stop_str_in_output=True),
        "stop",
        "abEND",
        [0, 1, 2, 3, 4],
    ),
    "special tokens left out": (
        [[97, SPECIAL, 98], [SPECIAL]],
        SamplingParams(),
        "length",
        "ab",
        [0, 1, 1, 2],
    ),
    "special tokens": (
        [[97, SPECIAL, 98]],
        SamplingParams(skip_special_tokens=False),
        "length",
        "a<|end|>b",
        [0, 1, 8],
    ),
    "a stop token": (
        [[97, 98], [SPECIAL]],
        SamplingParams(skip_special_tokens=False),
        "stop",
        "ab",
        [0, 1, 2],
    ),
    "a stop token that stays": (
        [[97, 98], [99]],
        SamplingParams(include_stop_str_in_output=True),
        "stop",
        "abc",
        [0, 1, 2],
    ),
    "nothing": ([[97], [PADDING, 98]], SamplingParams(), "length", "ab", [0, 1, 1]),
}


@pytest.mark.parametrize("echo", ["", "pq\u65e5"])
@pytest.mark.parametrize("case", CASES)
def test_offsets_are_places_in_the_text_that_is_returned(tokenizer: Any, case: str, echo: str) -> None:
    parts, params, reason, text, offsets = CASES[case]
    given = [Echo(echo)] if echo else []
    items = answer(tokenizer, parts, params, reason)

    def out() -> CompletionFormat:
        return CompletionFormat(
            False, "m", tokenizer, echo=given, logprobs=2, skip_special_tokens=params.skip_special_tokens
        )

    whole = Completion.model_validate(out().whole([Choice(items)])).choices[0]
    assert whole.text == echo + text
    assert whole.logprobs is not None
    assert whole.logprobs.text_offset == [len(echo) + offset for offset in offsets]
    assert streamed(out(), items) == (whole.text, whole.logprobs.model_dump())


def test_every_alternative_has_a_key(tokenizer: Any) -> None:
    space, tokens = ord(" "), (0xE6, 0x97, TWIN, PADDING, PADDING + 1, SPECIAL)
    items = [TokenLogprob(space, -3.0, tuple((token, -0.1 * i) for i, token in enumerate(tokens)))]
    told = TextLogprobs(tokenizer, 20).event(" ", items, last=True)
    assert told["tokens"] == [" "] and told["token_logprobs"] == [-3.0]
    assert told["top_logprobs"] == [
        {
            "bytes:\\xe6": 0.0,
            "bytes:\\x97": -0.1,
            f"token_id:{TWIN}": -0.2,
            "": pytest.approx(-0.3),
            f"token_id:{PADDING + 1}": -0.4,
            "<|end|>": -0.5,
            " ": -3.0,  # The token that was picked, one more than were asked for.
        }
    ]
    picked = TokenLogprob(TWIN, -0.2, ((space, -0.1), (TWIN, -0.2)))
    told = TextLogprobs(tokenizer, 2).event(" ", [picked], last=True)
    assert told["tokens"] == [" "] and told["top_logprobs"] == [{f"token_id:{space}": -0.1, " ": -0.2}]
    alone = TextLogprobs(tokenizer, 0).event("a", [TokenLogprob(97, float("-inf"))], last=True)
    assert alone["top_logprobs"] == [{"a": -9999.0}]


def test_a_chat_has_the_best_alternatives_alone(tokenizer: Any) -> None:
    [told] = chat_logprobs(tokenizer, [TokenLogprob(0xE6, -3.0, ((97, -0.5), (98, -1.0)))])["content"]
    assert (told["bytes"], told["logprob"]) == ([0xE6], -3.0)
    assert [alternative["token"] for alternative in told["top_logprobs"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("prompt", "offsets"),
    [
        ("pq", [0, 1]),
        ("a\u65e5b", [0, 1, 1, 1, 2]),
        ("e\u0301x", [0, 0, 2]),  # The tokenizer makes one character of two.
        ("a<|end|>b", [0, 1, 8]),
    ],
)
def test_a_prompt_is_echoed_as_it_came_with_its_tokens_places(
    tokenizer: Any, prompt: str, offsets: list[int]
) -> None:
    tokens = tokenizer.encode(prompt)
    assert Echo.of(tokenizer, prompt, tokens) == Echo(prompt, tokens, offsets)
    assert Echo.of(tokenizer, prompt, tokens[1:]) == Echo(prompt, tokens[1:], offsets[1:])
    by_ids = Echo.of(tokenizer, tokens, tokens)
    assert by_ids.text == tokenizer.decode(tokens)
    if by_ids.text == prompt:
        assert by_ids.offsets == offsets


def scores(tokens: Sequence[int]) -> PromptLogprobs:
    count = len(tokens)
    return PromptLogprobs(
        token_ids=np.array(tokens, np.int32),
        logprobs=np.full(count, -2.5, np.float32),
        ranks=np.full(count, 5, np.int32),
        top_ids=np.tile(np.array([98, 99, 100], np.int32), (count, 1)),
        top_logprobs=np.tile(np.array([-0.5, -1.0, -1.5], np.float32), (count, 1)),
    )


@pytest.mark.parametrize("generated", [True, False])
def test_an_echoed_prompt_has_its_logprobs_before_the_answers(tokenizer: Any, generated: bool) -> None:
    """As vLLM's: null for the first token, and in a stream in the first event of each choice."""
    tokens = tokenizer.encode("p\u65e5")
    asked: dict[str, Any] = {"n": 2, "echo": [Echo.of(tokenizer, "p\u65e5", tokens)], "logprobs": 1}
    parts = [b"a", b"b"] if generated else [b""]
    items = answer(tokenizer, parts, SamplingParams(), "length")
    items[0] = replace(items[0], chunk=replace(items[0].chunk, prompt_logprobs=scores(tokens[1:])))
    others = [replace(item, index=1, chunk=replace(item.chunk, prompt_logprobs=None)) for item in items]
    whole = CompletionFormat(False, "m", tokenizer, **asked).whole([Choice(items), Choice(others)])
    text = "p\u65e5" + ("ab" if generated else "")
    for choice in whole["choices"]:
        assert choice["text"] == text and "prompt_logprobs" not in choice
        told = choice["logprobs"]
        assert told["tokens"] == [
            "p",
            "bytes:\\xe6",
            "bytes:\\x97",
            "bytes:\\xa5",
            *("ab" if generated else ""),
        ]
        assert told["text_offset"] == [0, 1, 1, 1, *([2, 3] if generated else [])]
        assert told["token_logprobs"][:2] == [None, -2.5]
        assert told["top_logprobs"][:2] == [None, {"b": -0.5, "bytes:\\xe6": -2.5}]
    out = CompletionFormat(False, "m", tokenizer, **asked)
    assert out.opening(0) is None
    assert streamed(out, items) == (text, whole["choices"][0]["logprobs"])


def test_prompt_logprobs_are_vllms(tokenizer: Any) -> None:
    told = prompt_logprobs(tokenizer, scores([97, 99]), 2)
    assert told == [
        None,
        {
            "97": {"logprob": -2.5, "rank": 5, "decoded_token": "a"},
            "98": {"logprob": -0.5, "rank": 1, "decoded_token": "b"},
            "99": {"logprob": -1.0, "rank": 2, "decoded_token": "c"},
        },
        {
            "99": {"logprob": -2.5, "rank": 5, "decoded_token": "c"},
            "98": {"logprob": -0.5, "rank": 1, "decoded_token": "b"},
        },
    ]
    items = answer(tokenizer, [b"a"], SamplingParams(), "length")
    items[0] = replace(items[0], chunk=replace(items[0].chunk, prompt_logprobs=scores([97, 99])))
    text = CompletionFormat(False, "m", tokenizer, prompt_logprobs=2).whole([Choice(items)])
    assert text["choices"][0]["prompt_logprobs"] == told and text["choices"][0]["logprobs"] is None


def test_scores_are_bounded_before_they_are_computed() -> None:
    params = SamplingParams(prompt_logprobs=3)
    check_scores([[1] * (MAX_SCORES // 8)] * 2, params)
    with pytest.raises(RequestError) as caught:
        check_scores([[1] * (MAX_SCORES // 8)] * 2 + [[1]], params)
    assert caught.value.param == "prompt_logprobs"
    check_scores([[1] * MAX_SCORES] * 9, SamplingParams())


def test_tokenizer_info_is_json_that_javascript_reads(tokenizer: Any) -> None:
    """A tokenizer that sets no limit has 10**30, which no double holds."""
    assert tokenizer.model_max_length > 2**53
    tokenizer.init_kwargs["name_or_path"] = "/somewhere"
    info = json.loads(json.dumps(tokenizer_info(tokenizer, 512), allow_nan=False))
    assert (info["model_max_length"], info["eos_token"], info["bos_token"]) == (512, "<|end|>", None)
    assert info["tokenizer_class"] == type(tokenizer).__name__
    assert info["added_tokens_decoder"][str(SPECIAL)]["special"] is True
    assert "/somewhere" not in json.dumps(info)
