"""Streamed chats as OpenAI's own package puts them together, and special tokens that are markers."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk
from tokenizers import AddedToken

from orthrus.deployments.chat.output import ChatSplitter, joined
from orthrus.deployments.generation.text_chunk import TextChunk
from orthrus.deployments.openai.format import CompletionFormat
from orthrus.requests.request import Chunk
from orthrus.text.stream import TextStream
from orthrus.text.tokenizer import load_tokenizer
from tests.conftest import ROOT

MODEL = ROOT / "models" / "orthrus-tiny"
CALLS = """Well.
<tool_call>
{"name": "f", "arguments": {"a": "b", "c": [1]}}
</tool_call>
<tool_call>
{"arguments": {"d": 2}, "name": "g"}
</tool_call>"""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(MODEL)


def events(tokenizer: Any, pieces: list[str]) -> Iterator[dict[str, Any]]:
    """The events of an answer whose chunks have these texts."""
    out = CompletionFormat(True, "m", tokenizer)
    splitter = ChatSplitter(thinks=True, calls=True)
    yield out.opening(0) or {}
    for number, piece in enumerate(pieces):
        last = number == len(pieces) - 1
        delta = splitter.push(piece, final=last)
        item = TextChunk(0, piece, Chunk("r", 0, (1,)), delta, "tool_calls" if last else None)
        if not item.says_nothing:
            yield json.loads(out.stream(item, 0).removeprefix("data: "))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 40, 100, 1000])
def test_openais_package_puts_streamed_calls_together(tokenizer: Any, size: int) -> None:
    """The package loses text if one event has two pieces of the same call."""
    state = ChatCompletionStreamState()
    pieces = [CALLS[at : at + size] for at in range(0, len(CALLS), size)]
    for event in events(tokenizer, [*pieces, ""]):
        delta = event["choices"][0]["delta"]
        assert delta, "an event without a delta"
        calls = [call["index"] for call in delta.get("tool_calls", ())]
        assert len(calls) == len(set(calls))
        state.handle_chunk(ChatCompletionChunk.model_validate(event))
    message = state.get_final_completion().choices[0].message
    assert message.content == "Well."
    assert [(call.function.name, call.function.arguments) for call in message.tool_calls or ()] == [
        ("f", '{"a": "b", "c": [1]}'),
        ("g", '{"d": 2}'),
    ]


def test_markers_that_are_special_tokens_are_read() -> None:
    tokenizer = load_tokenizer(MODEL)
    markers = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    tokenizer.add_tokens([AddedToken(text, special=True) for text in (*markers, "<|other|>")])
    text = f"<think>\nHm.<|other|>\n</think>\n\n{CALLS}<|im_end|>"
    tokens = tokenizer.encode(text)
    for kept in (True, False):
        splitter = ChatSplitter(thinks=True, calls=True)
        stream = TextStream(tokenizer, kept=splitter.markers if kept else ())
        pieces = [splitter.push(stream.push(token)) for token in tokens]
        message = joined([*pieces, splitter.push(stream.finish(), final=True)])
        assert len(message.tool_calls) == 2 * kept
        if kept:
            assert (message.reasoning, message.content) == ("Hm.", "Well.")
