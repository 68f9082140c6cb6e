"""Whole answers and streamed events as OpenAI's types, without a server."""

import json
from dataclasses import replace
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from orthrus.deployments.chat.call_text import ToolCallDelta
from orthrus.deployments.chat.output import ChatDelta
from orthrus.deployments.generation.choices import Choice
from orthrus.deployments.generation.text_chunk import TextChunk
from orthrus.deployments.grpc.format import chat_chunk
from orthrus.deployments.openai.format import CompletionFormat, cost
from orthrus.deployments.openai.logprobs import Echo
from tests.deployments.examples import STATS, chunk, completion


@pytest.mark.parametrize("logprobs", [False, True])
def test_whole_answers_are_openais_types(tokenizer: Any, logprobs: bool) -> None:
    ids = tuple(tokenizer.encode("é!"))
    choices = [
        Choice(
            [
                TextChunk(i, "", chunk(i, ids[:1], False, logprobs), ChatDelta()),
                TextChunk(i, "é!", chunk(i, ids[1:], True, logprobs), ChatDelta("é!"), "length"),
            ]
        )
        for i in range(2)
    ]
    asked: dict[str, Any] = {"n": 2, "logprobs": 2 if logprobs else None}
    text = Completion.model_validate_json(
        json.dumps(CompletionFormat(False, "m", tokenizer, **asked).whole(choices), allow_nan=False),
        strict=True,
    )
    talk = ChatCompletion.model_validate_json(
        json.dumps(CompletionFormat(True, "m", tokenizer, **asked).whole(choices), allow_nan=False),
        strict=True,
    )
    assert [choice.text for choice in text.choices] == ["é!"] * 2
    assert [choice.message.content for choice in talk.choices] == ["é!"] * 2
    for usage in (text.usage, talk.usage):
        assert usage is not None and usage.prompt_tokens_details is not None
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 6, 11)
        assert usage.prompt_tokens_details.cached_tokens == 2
    costs = {"tokens_per_cycle": 2.0, "cycles": 1, "passes": 2, "seed": 7}
    assert text.choices[0].model_extra == talk.choices[1].model_extra == {"orthrus": costs}
    if logprobs:
        assert text.choices[0].logprobs is not None
        assert text.choices[0].logprobs.text_offset == [0, 0, 1]
        assert talk.choices[0].logprobs is not None
        content = talk.choices[0].logprobs.content
        assert content is not None
        assert b"".join(bytes(item.bytes or ()) for item in content).decode() == "é!"
        assert content[0].top_logprobs[1].logprob == -9999.0


@pytest.mark.parametrize("sent", [0, 7, 2**53 - 1, -1, -5, 1 - 2**53, 2**60, -(2**63)])
def test_a_returned_seed_can_be_sent_again(sent: int) -> None:
    seed = completion(seed=sent).sampling().seed
    assert seed is not None
    told = cost(replace(STATS, seed=seed))["seed"]
    assert completion(seed=told).sampling().seed == seed
    if abs(sent) < 2**53:
        assert told == sent


def test_streamed_events_are_openais_types(tokenizer: Any) -> None:
    ids = tuple(tokenizer.encode("ab"))
    pieces = [
        TextChunk(0, "a", chunk(0, ids[:1], False, True), ChatDelta("a")),
        TextChunk(0, "b", chunk(0, ids[1:], True, True), ChatDelta("b"), "length"),
    ]
    text = CompletionFormat(False, "m", tokenizer, logprobs=2)
    talk = CompletionFormat(True, "m", tokenizer, True, logprobs=2)
    # `construct` is what the client uses: the type wants a finish reason, and OpenAI streams null until there is one.
    events = [Completion.construct(**text.event(piece, 0)) for piece in pieces]
    Completion.model_validate(events[-1].model_dump())
    assert [event.choices[0].finish_reason for event in events] == [None, "length"]
    assert [event.choices[0].text for event in events] == ["a", "b"]
    assert [event.choices[0].logprobs and event.choices[0].logprobs.text_offset for event in events] == [
        [0],
        [1],
    ]
    chunks = [talk.opening(0), *(talk.event(piece, 0) for piece in pieces), talk.usage_event([STATS])]
    parsed = [ChatCompletionChunk.model_validate(event) for event in chunks]
    assert len({event.id for event in parsed}) == 1
    assert parsed[0].choices[0].delta.role == "assistant"
    assert [event.choices[0].finish_reason for event in parsed[:3]] == [None, None, "length"]
    assert parsed[3].choices == [] and parsed[3].usage is not None
    # OpenAI's events have the field from the start.
    assert all(event is not None and event["usage"] is None for event in chunks[:3])
    assert "".join(event.choices[0].delta.content or "" for event in parsed[:3]) == "ab"


@pytest.mark.parametrize("include_usage", [False, True])
def test_server_sent_events_equal_the_rendered_events(tokenizer: Any, include_usage: bool) -> None:
    """Events with text alone are put together from rendered parts. They must not differ from other events."""
    call = (ToolCallDelta(0, "{}", "call_1", "f"),)
    deltas = [
        None,
        *(ChatDelta(text) for text in ('"é\n\\', "\x00\u2028", "", "</script>")),
        ChatDelta(reasoning="hm"),
        ChatDelta("a", "b"),
        ChatDelta("a", tool_calls=call),
    ]
    for delta in deltas:
        out, whole = (
            CompletionFormat(delta is not None, 'm"é', tokenizer, include_usage, logprobs=2) for _ in range(2)
        )
        whole.id, whole.created = out.id, out.created
        text = 'x"\n' if delta is None else ""
        for index, last in ((0, False), (3, False), (3, False), (3, True)):
            item = TextChunk(index, text, chunk(index, (1,), last, last), delta, "length" if last else None)
            said = out.stream(item, index)
            assert said.startswith("data: ") and said.endswith("\n\n") and said.count("\n") == 2
            assert json.loads(said.removeprefix("data: ")) == whole.event(item, index)


def test_echo_puts_the_prompt_first(tokenizer: Any) -> None:
    out = CompletionFormat(False, "m", tokenizer, n=2, echo=[Echo("pq"), Echo("r")])
    items = [TextChunk(0, "ab", chunk(0, (1, 2), True, False), finish_reason="length")]
    whole = Completion.model_validate(out.whole([Choice(items)] * 4))
    assert [choice.text for choice in whole.choices] == ["pqab", "pqab", "rab", "rab"]
    opening = out.opening(2)
    assert opening is not None and opening["choices"][0]["text"] == "r"
    assert CompletionFormat(False, "m", tokenizer).opening(0) is None


def test_tool_calls_and_reasoning_are_openais_types(tokenizer: Any) -> None:
    deltas = [
        ChatDelta(reasoning="hm"),
        ChatDelta("see", tool_calls=(ToolCallDelta(0, "", "call_1", "f"),)),
        ChatDelta(tool_calls=(ToolCallDelta(0, '{"a": 1}'), ToolCallDelta(1, "{}", "call_2", "g"))),
    ]
    reasons = (None, None, "tool_calls")
    items = [
        TextChunk(0, "", chunk(0, (1,), reason is not None, False), delta, reason)
        for delta, reason in zip(deltas, reasons, strict=True)
    ]
    out = CompletionFormat(True, "m", tokenizer)
    whole = ChatCompletion.model_validate_json(json.dumps(out.whole([Choice(items)])), strict=True)
    [answer] = whole.choices
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content == "see"
    assert answer.message.model_extra == {"reasoning_content": "hm"}
    calls = [call for call in answer.message.tool_calls or () if call.type == "function"]
    assert [(c.id, c.function.name, c.function.arguments) for c in calls] == [
        ("call_1", "f", '{"a": 1}'),
        ("call_2", "g", "{}"),
    ]
    events = [ChatCompletionChunk.model_validate(out.event(item, 0)).choices[0] for item in items]
    assert events[0].delta.model_extra == {"reasoning_content": "hm"}
    pieces = [piece for event in events for piece in event.delta.tool_calls or ()]
    assert [(p.index, p.id, p.function and p.function.name) for p in pieces] == [
        (0, "call_1", "f"),
        (0, None, None),
        (1, "call_2", "g"),
    ]
    assert events[-1].finish_reason == "tool_calls"
    message = chat_chunk(0, items)
    assert [(c.id, c.name, c.arguments) for c in message.tool_calls] == [
        ("call_1", "f", '{"a": 1}'),
        ("call_2", "g", "{}"),
    ]
    assert (message.content, message.reasoning_content, message.finish_reason) == ("see", "hm", "tool_calls")
