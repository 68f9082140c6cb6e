"""OpenAI's Responses API without a server: bodies become chats, chunks become responses and events of OpenAI's types."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from orthrus.deployments.failures.errors import GenerationFailed, RateLimited
from orthrus.deployments.failures.failure import describe_failure
from orthrus.deployments.responses.format import ResponsesFormat
from orthrus.deployments.responses.items import seal
from orthrus.errors import RequestError
from tests.chunks import ANSWER, chunks, cut
from tests.responses import EVENTS, SCHEMA, TOOL, body, streamed, whole, without_ids

LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}


# --- requests


def test_a_conversation_becomes_a_chat() -> None:
    """All kinds of items, as an agent sends them back. Consecutive reasoning, text and calls become one assistant message."""
    asked = body(
        instructions="Be brief.",
        input=[
            {"role": "developer", "content": "Use tools."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "phase": "commentary",
             "content": [{"type": "output_text", "text": "See.", "annotations": [], "logprobs": []}]},
            {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "weather", "arguments": "{}", "status": "completed"},
            {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": '{"city": "Ł"}'},
            {"type": "function_call_output", "call_id": "c1", "output": "rain"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "sun"}]},
            {"type": "reasoning", "summary": [], "encrypted_content": seal("so")},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "in short"}], "encrypted_content": "gAAAA"},
            {"role": "assistant", "content": "Rain, sun."},
            {"role": "user", "content": "Thanks"},
        ],
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
        reasoning={"effort": "low", "summary": "auto"},
        max_output_tokens=77, temperature=0.5, top_p=0.9, seed=11, top_k=20,
    )  # fmt: skip
    chat = asked.chat()
    call = {"type": "function", "function": {"name": "weather"}}
    assert [message.model_dump(exclude_none=True) for message in chat.messages] == [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Use tools."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "See.", "reasoning_content": "hm", "tool_calls": [
            {"id": "c1", **call, "function": {"name": "weather", "arguments": {}}},
            {"id": "c2", **call, "function": {"name": "weather", "arguments": {"city": "Ł"}}},
        ]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "tool", "tool_call_id": "c2", "content": "sun"},
        {"role": "assistant", "content": "Rain, sun.", "reasoning_content": "so\nin short"},
        {"role": "user", "content": "Thanks"},
    ]  # fmt: skip
    assert chat.must_call and chat.parallel_tool_calls is False and chat.thinking is True
    params = chat.sampling()
    assert (params.max_tokens, params.temperature, params.top_p) == (77, 0.5, 0.9)
    assert (params.seed, params.top_k, params.logprobs) == (11, 20, None)


CODEX: dict[str, Any] = {
    "instructions": "You are a coding agent.",
    "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "ls"}]}],
    "tools": [
        {"type": "function", "name": "shell", "description": "d", "strict": False, "parameters": SCHEMA}
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0199",
    "client_metadata": {"session_id": "01a2"},
    "text": {"verbosity": "low"},
    "service_tier": "priority",
}


def test_what_agents_send_is_taken() -> None:
    """Codex's request, and every field of OpenAI's that has nothing to say here."""
    chat = body(**CODEX).chat()
    assert [tool.function.name for tool in chat.offered_tools] == [
        "shell"
    ] and chat.prompt_cache_key == "0199"
    nothing = {
        "background": False,
        "conversation": None,
        "max_tool_calls": 3,
        "metadata": {"a": "b"},
        "previous_response_id": None,
        "prompt": None,
        "prompt_cache_retention": "24h",
        "safety_identifier": "s",
        "tools": [],
        "truncation": "disabled",
        "user": "u",
        "include": ["file_search_call.results"],
    }
    assert body(**nothing).chat().messages[0].content == "hi"


def test_the_formats_of_text_and_the_choices_of_tools() -> None:
    format_ = {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}
    for asked, schema in ((format_, SCHEMA), ({"type": "json_object"}, {"type": "object"})):
        constraint = body(text={"format": asked}).chat().constraint
        assert constraint is not None and constraint.schema == schema
    assert body(text={"format": {"type": "text"}}).chat().constraint is None
    tools = [TOOL, {**TOOL, "name": "clock"}]
    named = {"type": "function", "name": "clock"}
    for choice, must in (
        (named, True),
        ({"type": "allowed_tools", "mode": "required", "tools": [named]}, True),
        ({"type": "allowed_tools", "mode": "auto", "tools": [named]}, False),
    ):
        chat = body(tools=tools, tool_choice=choice).chat()
        assert [tool.function.name for tool in chat.callable_tools] == ["clock"]
        assert chat.must_call == must
    assert body(tools=tools, tool_choice="none").chat().offered_tools == []


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"input": []}, "input must have at least one item"),
        (
            {"input": [{"type": "item_reference", "id": "x"}]},
            "input[0]: type 'item_reference' is not supported here",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "type 'input_image' is not supported here",
        ),
        ({"input": [{"role": "tool", "content": "x"}]}, "role"),
        (
            {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "[]"}]},
            "input[0].function_call.arguments: must be the text of a JSON object",
        ),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name: Field required"),
        ({"tool_choice": "required"}, "tool_choice needs tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice names 'g'"),
        ({"tool_choice": {"type": "file_search"}}, "type 'file_search' is not supported here"),
        ({"background": True}, "background: answers are not made in the background"),
        ({"conversation": "c"}, "conversation: conversations are not kept here"),
        ({"prompt": {"id": "p"}}, "prompt: prompts are not kept here"),
        ({"truncation": "auto"}, "truncation"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format has a schema"),
        ({"include": ["everything"]}, "include"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 21, "include": LOGPROBS["include"]}, "top_logprobs"),
        ({"n": 2}, "n: "),
        ({"return_token_ids": True}, "return_token_ids is not for responses"),
        ({"messages": [{"role": "user"}]}, "messages is not supported"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=re.escape(says)):
        body(**fields).chat().sampling()


# --- answers


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("summary", [None, "auto"])
def test_a_stream_adds_up_to_the_whole_response(seed: int, summary: str | None) -> None:
    items = chunks(cut(ANSWER, seed))
    asked = body(tools=[TOOL], reasoning={"effort": "high", "summary": summary})
    events, response = streamed(items, asked)
    assert without_ids(response) == without_ids(whole(items, asked))
    assert response["status"] == "completed" and response["completed_at"]
    thought, said, weather, clock = response["output"]
    assert said["content"] == [
        {"type": "output_text", "text": "Let me see.", "annotations": [], "logprobs": []}
    ]
    if summary:
        assert (
            thought["summary"] == [{"type": "summary_text", "text": "Two cities."}]
            and "content" not in thought
        )
    else:
        assert (
            thought["content"] == [{"type": "reasoning_text", "text": "Two cities."}]
            and thought["summary"] == []
        )
    assert (weather["name"], json.loads(weather["arguments"])) == ("weather", {"city": "Łódź"})
    assert (clock["name"], json.loads(clock["arguments"])) == ("clock", {})
    assert len({item["id"] for item in response["output"]} | {weather["call_id"], clock["call_id"]}) == 6
    assert response["usage"]["input_tokens_details"]["cached_tokens"] == 32
    assert response["orthrus"]["seed"] == 7
    kinds = [event.type.removeprefix("response.") for event in events]
    reasoning = ["reasoning_summary_part.added", "reasoning_summary_text.done", "reasoning_summary_part.done"]
    if not summary:
        reasoning = ["content_part.added", "reasoning_text.done", "content_part.done"]
    assert [kind for kind in kinds if not kind.endswith("delta")] == [
        "created", "in_progress",
        "output_item.added", *reasoning, "output_item.done",
        "output_item.added", "content_part.added", "output_text.done", "content_part.done", "output_item.done",
        *["output_item.added", "function_call_arguments.done", "output_item.done"] * 2,
        "completed",
    ]  # fmt: skip


def test_clients_can_send_encrypted_reasoning_back() -> None:
    """Agents with `store: false` send back the encrypted content, without the text."""
    asked = body(include=["reasoning.encrypted_content"])
    thought, *_ = whole(chunks(cut(ANSWER, 1)), asked)["output"]
    back = body(input=[{key: thought[key] for key in ("id", "type", "summary", "encrypted_content")}])
    assert back.chat().messages[0].reasoning_content == "Two cities."


def test_an_answer_that_was_cut_is_incomplete() -> None:
    items = chunks(["Let ", "me"], "length")
    events, response = streamed(items, body())
    assert events[-1].type == "response.incomplete"
    assert without_ids(response) == without_ids(whole(items, body()))
    assert (
        response["incomplete_details"] == {"reason": "max_output_tokens"} and response["completed_at"] is None
    )
    assert [item["status"] for item in response["output"]] == ["incomplete"]


def test_an_empty_answer_is_an_empty_text() -> None:
    for items in (chunks([""]), chunks(["<think>\nhm\n</think>\n\n"])):
        _, response = streamed(items, body())
        assert without_ids(response) == without_ids(whole(items, body()))
        assert response["output"][-1]["content"][0]["text"] == ""


def test_logprobs_are_those_of_the_text(tokenizer: Any) -> None:
    """Whatever of the answer comes in one chunk: not those of reasoning and its markers."""
    pieces = ["<think>", "h", "</think>", "\n\n", "a", "b"]
    for sizes in ([1] * 6, [2, 2, 2], [3, 3], [6]):
        items = chunks(pieces, "stop", tokenizer=tokenizer, sizes=sizes)
        asked = body(**LOGPROBS)
        events, response = streamed(items, asked, tokenizer)
        assert without_ids(response) == without_ids(whole(items, asked, tokenizer))
        [scores] = [part["logprobs"] for part in response["output"][1]["content"]]
        assert [score["token"] for score in scores][-2:] == ["a", "b"]
        assert all(score["token"] not in ("<", "h") for score in scores)
        assert all(len(score["top_logprobs"]) == 1 for score in scores)
        deltas = [event for event in events if event.type == "response.output_text.delta"]
        assert [s.token for event in deltas for s in event.logprobs] == [score["token"] for score in scores]


def in_chunks_of_any_size(text: str, tokenizer: Any) -> Iterator[list[dict[str, Any]]]:
    """The output of the response to `text`, which is the same in a stream and in the whole, for each size of chunks."""
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode(text)]
    asked = body(**LOGPROBS, tools=[{**TOOL, "name": "f"}])
    for size in range(1, len(pieces) + 1):
        sizes = [min(size, len(pieces) - begin) for begin in range(0, len(pieces), size)]
        items = chunks(pieces, "stop", tokenizer=tokenizer, sizes=sizes)
        _, response = streamed(items, asked, tokenizer)
        assert without_ids(response) == without_ids(whole(items, asked, tokenizer))
        yield response["output"]


def scored(content: dict[str, Any]) -> str:
    """The tokens that have log-probabilities."""
    return "".join(score["token"] for score in content["logprobs"])


def test_logprobs_end_where_a_call_begins(tokenizer: Any) -> None:
    text = 'ab<tool_call>{"name": "f", "arguments": {}}</tool_call>cd'
    for before, _, after in in_chunks_of_any_size(text, tokenizer):
        assert (before["content"][0]["text"], after["content"][0]["text"]) == ("ab", "cd")
        assert (scored(before["content"][0]), scored(after["content"][0])) == ("ab", "")


def test_logprobs_go_on_after_a_marker_that_begins_no_call(tokenizer: Any) -> None:
    said = 'ab<tool_call>cd <tool_call>{"x": 1}ef'
    text = said + '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    for spoken, _ in in_chunks_of_any_size(text, tokenizer):
        [content] = spoken["content"]
        assert (content["text"], scored(content)) == (said, said)


def test_of_a_long_text_that_has_log_probabilities_only_the_end_is_searched_again(tokenizer: Any) -> None:
    """A call's marker may begin at the end of a chunk. All text before that has been searched."""
    out = ResponsesFormat(body(**LOGPROBS, tools=[TOOL]), tokenizer, stored=False)
    for item in chunks(["a"] * 50, "stop", tokenizer=tokenizer):
        out.events(item)
    assert out._scored == b"a" * 10


def test_a_response_repeats_the_fields_of_its_request() -> None:
    asked = body(**CODEX, metadata={"k": "v"}, max_output_tokens=9)
    response = whole(chunks(["a"]), asked)
    assert (response["instructions"], response["store"]) == ("You are a coding agent.", False)
    assert (response["metadata"], response["max_output_tokens"]) == ({"k": "v"}, 9)
    assert response["tools"] == CODEX["tools"] and response["tool_choice"] == "auto"
    assert response["reasoning"] == {"effort": "medium", "summary": "auto"}
    assert response["text"] == {"format": {"type": "text"}, "verbosity": "low"}
    schema = {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather"}]}
    response = whole(chunks(["a"]), body(text={"format": schema}, tools=[TOOL], tool_choice=choice))
    assert response["text"]["format"] == schema and response["tool_choice"] == choice


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (GenerationFailed("no"), "server_error"),
        (RateLimited("no", 1.0), "rate_limit_exceeded"),
        (RequestError("no", "input"), "invalid_prompt"),
    ],
)
def test_a_stream_that_cannot_go_on_says_why(error: Exception, code: str) -> None:
    out = ResponsesFormat(body(), None, stored=False)
    raw = [*out.opening(), *out.events(chunks(["a", "b"])[0]), *out.failed(describe_failure(error))]
    *_, told, failed = [EVENTS.validate_json(json.dumps(event), strict=True) for event in raw]
    assert (told.type, told.code, told.message) == ("error", code, "no")
    assert failed.type == "response.failed" and failed.response.status == "failed"
    assert failed.response.error is not None and failed.response.error.code == code
