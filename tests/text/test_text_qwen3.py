"""Detokenisation with Qwen3's own tokenizer, as a stream: characters over several tokens, stop strings over several chunks."""

import random
from typing import Any

import pytest

from orthrus.deployments.chat.output import ChatDelta, ChatSplitter, joined
from orthrus.text.stream import TextStream, token_bytes

SAMPLES = [
    "👩‍👩‍👧‍👦🏳️‍🌈👍🏽🫠🧑🏿‍🚀 in one line",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𓀀𓂀 𐍈 rare planes, ㋿ 龘 𠮷 rare characters",
    "Zażółć gęślą jaźń; ไทยภาษา हिन्दी العربية עברית 한국어 日本語",
    "\u202eright to left\u202c\u200b\u2060\ufeff and nothing to see",
    "tabs\tand\r\nlines\n\n\n  indented  \u3000 ideographic",
    "```python\nprint('\\x00', \"naïve\")\n```\x00\x07",
]


def streamed(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], str | None]:
    text = TextStream(tokenizer, stop)
    pieces = [text.push(token) for token in ids]
    return [*pieces, text.finish()], text.stopped


@pytest.mark.parametrize("sample", SAMPLES, ids=ascii)
def test_characters_come_whole(qwen3_tokenizer: Any, sample: str) -> None:
    ids = qwen3_tokenizer.encode(sample)
    pieces, _ = streamed(qwen3_tokenizer, ids)
    assert "".join(pieces) == sample
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[-1] == "", "nothing is left for the end"


def test_samples_do_split_characters_over_tokens(qwen3_tokenizer: Any) -> None:
    """Else the tests above would show nothing."""
    table = token_bytes(qwen3_tokenizer)
    ids = [token for sample in SAMPLES for token in qwen3_tokenizer.encode(sample)]
    split = [token for token in ids if "\ufffd" in table[token].decode(errors="replace")]
    assert len(split) > 20


def test_any_tokens_give_what_the_tokenizer_gives(qwen3_tokenizer: Any) -> None:
    """Bytes that are no text as well, which a model may write: U+FFFD for each run, at the same places."""
    rng = random.Random(0)
    table = token_bytes(qwen3_tokenizer)
    broken = [token for token in range(20_000) if "\ufffd" in table[token].decode(errors="replace")]
    for round_ in range(400):
        source = broken if round_ % 2 else range(len(qwen3_tokenizer))
        ids = [rng.choice(source) for _ in range(rng.randrange(30))]
        pieces, _ = streamed(qwen3_tokenizer, ids)
        assert "".join(pieces) == qwen3_tokenizer.decode(ids, skip_special_tokens=True)


def test_stop_strings_that_straddle_tokens_and_characters(qwen3_tokenizer: Any) -> None:
    """Every stretch of a text as its stop string: found where it first is, and nothing of it is shown before."""
    sample = "ab👩‍👧 é漢字 end. ab👩‍👧!"
    ids = qwen3_tokenizer.encode(sample)
    for start in range(len(sample)):
        for end in range(start + 1, min(start + 8, len(sample)) + 1):
            stop = sample[start:end]
            pieces, stopped = streamed(qwen3_tokenizer, ids, (stop, "never there"))
            assert stopped == stop
            assert "".join(pieces) == sample[: sample.index(stop)]


def test_markers_are_text_and_ends_are_not(qwen3_tokenizer: Any) -> None:
    answer = (
        "<think>\nHm, 🤔.\n</think>\n\nSure: é.\n"
        '<tool_call>\n{"name": "f", "arguments": {"a": "漢", "b": ["👍🏽"]}}\n</tool_call><|im_end|><|endoftext|>'
    )
    ids = qwen3_tokenizer.encode(answer)
    text, splitter = TextStream(qwen3_tokenizer), ChatSplitter(thinks=True, calls=True)
    deltas: list[ChatDelta] = []
    for token in ids:
        deltas.append(splitter.push(text.push(token)))
    deltas.append(splitter.push(text.finish(), final=True))
    message = joined(deltas)
    assert (message.reasoning, message.content) == ("Hm, 🤔.", "Sure: é.")
    [call] = message.tool_calls
    assert (call.name, call.arguments) == ("f", '{"a": "漢", "b": ["👍🏽"]}')
