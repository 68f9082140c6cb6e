"""Anthropic's Messages API without a server: bodies become chats, chunks become messages and events of Anthropic's types."""

import asyncio
import json
import re
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter, ValidationError

from orthrus.deployments.bodies.faults import describe
from orthrus.deployments.failures.errors import GenerationFailed, ModelUnavailable, QueueFull, RateLimited
from orthrus.deployments.failures.failure import describe_failure
from orthrus.deployments.generation.choices import Choice
from orthrus.deployments.generation.text_chunk import TextChunk
from orthrus.deployments.messages import router as messages_router
from orthrus.deployments.messages.body import CountTokensBody, MessagesBody
from orthrus.deployments.messages.format import MessageFormat, error_body, error_status
from orthrus.errors import RequestError
from tests.chunks import ANSWER, chunks, cut

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
EVENTS: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def messages(**fields: Any) -> MessagesBody:
    asked = {"model": "m", "max_tokens": 99, "messages": [{"role": "user", "content": "hi"}], **fields}
    try:
        return MessagesBody.model_validate_json(json.dumps(asked))
    except ValidationError as error:
        raise describe(error) from None


def streamed(items: list[TextChunk], max_tokens: int = 40) -> tuple[list[dict[str, Any]], Message]:
    """The events, each checked against Anthropic's types, and the message that Anthropic's client makes of them."""
    out = MessageFormat("m", 50, max_tokens)
    events = [*out.opening(), *(event for item in items for event in out.events(item))]
    snapshot: Any = None
    buffers: dict[int, bytes] = {}
    for event in events:
        if event["type"] != "ping":
            parsed = EVENTS.validate_json(json.dumps(event), strict=True)
            snapshot = accumulate_event(event=parsed, current_snapshot=snapshot, json_bufs=buffers)
    assert snapshot is not None
    return events, Message.model_validate(snapshot.to_dict())


def whole(items: list[TextChunk], max_tokens: int = 40) -> Message:
    message = MessageFormat("m", 50, max_tokens).whole(Choice(items))
    return Message.model_validate_json(json.dumps(message), strict=True)


def same(one: Message, other: Message) -> bool:
    return one.model_dump(exclude={"id", "orthrus"}) == other.model_dump(exclude={"id", "orthrus"})


# --- requests


def test_a_conversation_becomes_a_chat() -> None:
    """All kinds of blocks, as an agent sends them back, cache marks and all."""
    mark = {"cache_control": {"type": "ephemeral"}}
    body = messages(
        system=[{"type": "text", "text": "You are", **mark}, {"type": "text", "text": "an agent."}],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "Weather?", **mark}, {"type": "text", "text": "Quick."}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "See.", "citations": None},
                {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Łódź"}, "caller": None},
                {"type": "tool_use", "id": "t2", "name": "clock", "input": {}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "☀️"}], **mark},
                {"type": "tool_result", "tool_use_id": "t2", "is_error": True},
                {"type": "text", "text": "Well?"},
            ]},
        ],
        tools=[
            {"name": "weather", "description": "d", "input_schema": SCHEMA, **mark},
            {"type": "custom", "name": "clock", "input_schema": {"type": "object"}},
        ],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        thinking={"type": "enabled", "budget_tokens": 1024},
        metadata={"user_id": "u"},
        stop_sequences=["END"],
        temperature=0.5, top_p=0.9, top_k=20, seed=11, service_tier="auto",
    )  # fmt: skip
    chat = body.chat()
    assert [message.model_dump(exclude_none=True) for message in chat.messages] == [
        {"role": "system", "content": "You are\nan agent."},
        {"role": "user", "content": "Weather?\nQuick."},
        {"role": "assistant", "content": "See.", "reasoning_content": "hm", "tool_calls": [
            {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Łódź"}}},
            {"id": "t2", "type": "function", "function": {"name": "clock", "arguments": {}}},
        ]},
        {"role": "tool", "tool_call_id": "t1", "content": "☀️"},
        {"role": "tool", "tool_call_id": "t2", "content": "", "is_error": True},
        {"role": "user", "content": "Well?"},
    ]  # fmt: skip
    assert [tool.function.name for tool in chat.offered_tools] == ["weather", "clock"]
    assert chat.must_call and chat.parallel_tool_calls is False and chat.thinking is True
    assert chat.prompt_cache_key == "u"
    params = chat.sampling()
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0.5, 0.9, 20, 11)
    assert (params.max_tokens, params.stop) == (99, ("END",))


def test_an_answer_may_be_begun_by_the_client() -> None:
    asked = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "The best answer is ("}]
    assert messages(messages=asked).chat().continue_final_message
    assert not messages(messages=asked[:1]).chat().continue_final_message
    call = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    asked[1] = {"role": "assistant", "content": [{"type": "text", "text": "See."}, call]}  # type: ignore[dict-item]
    assert not messages(messages=asked).chat().continue_final_message


@pytest.mark.parametrize("others", [[], [{"role": "user", "content": "hi"}]])
def test_a_turn_may_be_empty(others: list[dict[str, Any]]) -> None:
    chat = messages(messages=[*others, {"role": "user", "content": []}]).chat()
    assert [message.content for message in chat.messages] == ["hi"] * len(others) + [""]


def test_the_model_thinks_only_if_the_request_asks_for_it() -> None:
    assert messages().chat().thinking is False
    assert messages(thinking={"type": "disabled"}).chat().thinking is False
    assert messages(thinking={"type": "adaptive"}).chat().thinking is True


@pytest.mark.parametrize(
    ("choice", "names", "must"),
    [
        ({"type": "auto"}, ["f", "g"], False),
        ({"type": "any"}, ["f", "g"], True),
        ({"type": "tool", "name": "g"}, ["g"], True),
        ({"type": "none"}, [], False),
    ],
)
def test_the_choice_of_tools(choice: dict[str, Any], names: list[str], must: bool) -> None:
    tools = [{"name": name, "input_schema": SCHEMA} for name in "fg"]
    chat = messages(tools=tools, tool_choice=choice).chat()
    assert [tool.function.name for tool in chat.callable_tools] == names
    assert chat.must_call == must


@pytest.mark.parametrize("where", [{"output_config": {"format": None}}, {"output_format": None}])
def test_structured_output(where: dict[str, Any]) -> None:
    wanted = {"type": "json_schema", "schema": SCHEMA}
    fields = json.loads(json.dumps(where).replace("null", json.dumps(wanted)))
    constraint = messages(**fields).chat().constraint
    assert constraint is not None and constraint.schema == SCHEMA


def test_a_count_needs_no_max_tokens() -> None:
    chat = CountTokensBody.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    ).chat()
    assert chat.messages[0].content == "hi"


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_tokens": None}, "max_tokens: Field required"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]: type 'image' is not supported"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [IMAGE]}]}]},
            "messages[0].content[0].tool_result.content[0]: type 'image' is not supported",
        ),
        ({"system": [IMAGE]}, "system[0]: type 'image' is not supported"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]}]},
            "belongs to the assistant",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "t"}]}]},
            "tool_result blocks belong to the user",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]: tools of type 'web_search_20250305'"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema: Field required"),
        ({"tool_choice": {"type": "any"}}, "tool_choice needs tools"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice has a name"),
        ({"mcp_servers": []}, "unknown field 'mcp_servers'"),
        ({"stop_sequences": [""]}, "must not be empty"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_by_name(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=re.escape(says)):
        messages(**fields).chat().sampling()


# --- answers


@pytest.mark.parametrize("seed", range(20))
def test_a_stream_adds_up_to_the_whole_message(seed: int) -> None:
    items = chunks(cut(ANSWER, seed))
    events, message = streamed(items)
    assert same(message, whole(items))
    assert [(block.type, block.model_dump()) for block in message.content if block.type != "thinking"] == [
        ("text", {"type": "text", "text": "Let me see.", "citations": None}),
        ("tool_use", whole(items).content[2].model_dump()),
        ("tool_use", whole(items).content[3].model_dump()),
    ]
    thinking, _, weather, clock = message.content
    assert thinking.type == "thinking" and thinking.thinking == "Two cities." and thinking.signature
    assert weather.type == clock.type == "tool_use"
    assert (weather.name, weather.input, clock.name, clock.input) == (
        "weather",
        {"city": "Łódź"},
        "clock",
        {},
    )
    assert weather.id != clock.id
    assert (message.stop_reason, message.stop_sequence) == ("tool_use", None)
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (18, 32)
    assert message.usage.output_tokens == 40
    cost = {"tokens_per_cycle": 3.9, "cycles": 10, "passes": 20, "seed": 7}
    assert whole(items).model_extra == {"orthrus": cost} and events[-2]["orthrus"] == cost
    kinds = [event["type"] for event in events if event["type"] != "content_block_delta"]
    block = ["content_block_start", "content_block_stop"]
    first, *others = block
    assert kinds[:3] == ["message_start", first, "ping"]
    assert kinds[3:] == [*others, *block * 3, "message_delta", "message_stop"]


@pytest.mark.parametrize(
    ("reason", "stop_reason", "limit", "expected"),
    [
        ("stop", None, 99, ("end_turn", None)),
        ("stop", "END", 99, ("stop_sequence", "END")),
        ("length", None, 40, ("max_tokens", None)),
        ("length", None, 99, ("model_context_window_exceeded", None)),
    ],
)
def test_stop_reasons(
    reason: str, stop_reason: str | None, limit: int, expected: tuple[str, str | None]
) -> None:
    items = chunks(["a", "b"], reason, stop_reason)
    for message in (whole(items, limit), streamed(items, limit)[1]):
        assert (message.stop_reason, message.stop_sequence) == expected
        assert [block.type for block in message.content] == ["text"]


def test_an_empty_answer_has_no_blocks() -> None:
    items = chunks([""])
    assert whole(items).content == streamed(items)[1].content == []


def test_a_call_that_was_cut_has_the_arguments_that_had_come() -> None:
    items = chunks(['<tool_call>\n{"name": "f", "arguments": {"a": [1, 2], "b": "xy'], "length")
    for message in (whole(items), streamed(items)[1]):
        [call] = message.content
        assert call.type == "tool_use" and call.input == {"a": [1, 2]}
        assert message.stop_reason == "max_tokens"


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e400"])
def test_numbers_that_json_lacks_reach_the_client_as_they_were_written(number: str) -> None:
    """A message that has them as numbers can't be sent."""
    written = f'{{"a": {number}}}'
    items = chunks([f'<tool_call>\n{{"name": "f", "arguments": {written}}}\n</tool_call>'])
    [call] = MessageFormat("m", 50, 40).whole(Choice(items))["content"]
    assert json.dumps(call["input"], allow_nan=False) == json.dumps({"arguments": written})


def test_failures_are_anthropics() -> None:
    for error, status, kind in [
        (RequestError("no", "messages"), 400, "invalid_request_error"),
        (RateLimited("no", 2.0), 429, "rate_limit_error"),
        (QueueFull("no"), 529, "overloaded_error"),
        (ModelUnavailable("no"), 529, "overloaded_error"),
        (GenerationFailed("no"), 500, "api_error"),
    ]:
        failure = describe_failure(error)
        assert error_status(failure) == status
        assert error_body(failure) == {"type": "error", "error": {"type": kind, "message": "no"}}
        assert MessageFormat("m", 1, 1).failed(failure) == [error_body(failure)]


def test_a_grammar_is_made_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take long, and all other requests of the ingress wait for its event loop."""
    threads: list[int] = []

    async def read_body(*_: Any) -> MessagesBody:
        return messages()

    class Ended(Exception):
        pass

    async def chat(*_: Any) -> None:
        raise Ended

    monkeypatch.setattr(messages_router, "read_body", read_body)
    call = SimpleNamespace(read=lambda _: threads.append(threading.get_ident()))
    answer: Any = messages_router.messages
    with pytest.raises(Ended):
        asyncio.run(answer(None, SimpleNamespace(chat=chat), call))
    assert len(threads) == 1 and threads[0] != threading.get_ident()
