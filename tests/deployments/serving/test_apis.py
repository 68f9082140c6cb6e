"""OpenAI's Responses API and Anthropic's Messages API on a running Serve instance, through their own clients."""

import json
from typing import Any

import anthropic
import httpx2
import jsonschema
import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel

from tests.serving import MODEL, http, wait_until_busy, wait_until_free

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
QUESTION = "What is the weather in Łódź?"
SAID: dict[str, Any] = {"model": MODEL, "temperature": 0, "input": QUESTION, "max_output_tokens": 24}
WEATHER: Any = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}
TOLD: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": QUESTION}],
    "max_tokens": 24,
}
GREEDY: dict[str, Any] = {"extra_body": {"temperature": 0}}
"""Anthropic's client has no argument for it."""
CLIENT_TOOL: Any = {"name": "weather", "description": "d", "input_schema": PARAMETERS}


class Verdict(BaseModel):
    good: bool


@pytest.fixture(scope="module")
def claude(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def said(client: openai.OpenAI) -> str:
    """The chat's answer to the question, which is that of every API."""
    messages: Any = [{"role": "user", "content": QUESTION}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=24)
    return answer.choices[0].message.content or ""


# --- /v1/responses


def test_a_response_has_the_same_text_as_a_chat(client: openai.OpenAI, said: str) -> None:
    answer = client.responses.create(**SAID)
    Response.model_validate_json(answer.model_dump_json(by_alias=True), strict=True)
    assert answer.output_text == said
    assert answer.status == "incomplete" and answer.incomplete_details is not None
    assert answer.usage is not None and answer.usage.output_tokens == 24
    assert answer.orthrus["tokens_per_cycle"] > 1
    with client.responses.stream(**SAID) as stream:
        events = list(stream)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == said
    assert events[-1].type == "response.incomplete" and events[-1].response.output_text == said


def test_a_response_makes_calls_that_clients_can_read(client: openai.OpenAI) -> None:
    asked = {**SAID, "max_output_tokens": 200, "tools": [WEATHER], "parallel_tool_calls": False}
    answer = client.responses.create(**asked, tool_choice="required")
    [call] = answer.output
    assert call.type == "function_call" and answer.status == "completed"
    jsonschema.validate(json.loads(call.arguments), PARAMETERS)
    with client.responses.stream(**asked, tool_choice={"type": "function", "name": "weather"}) as stream:
        [streamed] = stream.get_final_response().output
    assert streamed.type == "function_call" and streamed.arguments == call.arguments
    back = [
        {"role": "user", "content": QUESTION},
        call.model_dump(exclude_none=True, exclude={"parsed_arguments"}),
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
    ]
    assert client.responses.create(**{**asked, "input": back, "max_output_tokens": 8}).usage is not None


def test_a_response_can_be_parsed(client: openai.OpenAI) -> None:
    answer = client.responses.parse(**{**SAID, "max_output_tokens": 100}, text_format=Verdict)
    assert isinstance(answer.output_parsed, Verdict)


def test_responses_are_not_stored_unless_that_is_set(client: openai.OpenAI) -> None:
    answer = client.responses.create(**SAID, store=True)
    assert answer.store is False
    with pytest.raises(openai.NotFoundError, match=r"api\.response_store"):
        client.responses.retrieve(answer.id)
    with pytest.raises(openai.BadRequestError, match=r"api\.response_store") as caught:
        client.responses.create(**SAID, previous_response_id=answer.id)
    assert caught.value.param == "previous_response_id"


def test_refusals_of_a_response_are_openais(client: openai.OpenAI) -> None:
    hosted: Any = [{"type": "web_search"}]
    for fields, param in (
        ({"tools": hosted, "tool_choice": "required"}, "tool_choice"),
        ({"background": True}, "background"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(**SAID, **fields, stream=True)
        assert caught.value.param == param
    with pytest.raises(openai.NotFoundError):
        client.responses.create(**{**SAID, "model": "gpt-5"})
    count = client.responses.input_tokens.count(model=MODEL, input=QUESTION)
    assert count.input_tokens == client.responses.create(**SAID).usage.input_tokens


# --- /v1/messages


def test_a_message_has_the_same_text_as_a_chat(claude: anthropic.Anthropic, said: str) -> None:
    answer = claude.messages.create(**TOLD, **GREEDY)
    anthropic.types.Message.model_validate_json(answer.model_dump_json(), strict=True)
    [block] = answer.content
    assert block.type == "text" and block.text == said and answer.stop_reason == "max_tokens"
    assert answer.orthrus["tokens_per_cycle"] > 1
    with claude.messages.stream(**TOLD, **GREEDY) as stream:
        assert "".join(stream.text_stream) == said
        final = stream.get_final_message()
    assert final.stop_reason == "max_tokens" and final.usage.output_tokens == 24
    count = claude.messages.count_tokens(model=MODEL, messages=TOLD["messages"])
    cached = final.usage.cache_read_input_tokens or 0
    assert count.input_tokens == final.usage.input_tokens + cached
    words = said.split()
    stopped = claude.messages.create(**TOLD, **GREEDY, stop_sequences=[words[1]])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", words[1])


def test_a_message_makes_calls_that_clients_can_read(claude: anthropic.Anthropic) -> None:
    asked = {**TOLD, **GREEDY, "max_tokens": 200, "tools": [CLIENT_TOOL]}
    one: Any = {"type": "any", "disable_parallel_tool_use": True}
    answer = claude.messages.create(**asked, tool_choice=one)
    [call] = answer.content
    assert call.type == "tool_use" and answer.stop_reason == "tool_use"
    jsonschema.validate(call.input, PARAMETERS)
    with claude.messages.stream(**asked, tool_choice={"type": "tool", "name": "weather"}) as stream:
        [streamed] = stream.get_final_message().content
    assert streamed.type == "tool_use" and streamed.input == call.input
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "rain"}
    talk: Any = [*TOLD["messages"], answer.to_param(), {"role": "user", "content": [result]}]
    assert claude.messages.create(**{**asked, "messages": talk, "max_tokens": 8}).usage.output_tokens == 8


def test_refusals_of_a_message_are_anthropics(claude: anthropic.Anthropic, url: str) -> None:
    image: Any = [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}]
    with pytest.raises(anthropic.BadRequestError, match="type 'image' is not supported") as caught:
        claude.messages.create(**{**TOLD, "messages": image}, stream=True)
    assert caught.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(**{**TOLD, "model": "claude-fable-5"})
    assert http(f"{url}/v1/messages")[1]["error"]["type"] == "invalid_request_error"
    status, answer = http(f"{url}/v1/messages", b'{"model": "' + b"x" * (5 << 20) + b'"}')
    assert (status, answer["type"], answer["error"]["type"]) == (413, "error", "request_too_large")


@pytest.mark.parametrize("path", ["responses", "messages"])
def test_a_client_that_leaves_ends_its_request(url: str, path: str) -> None:
    asked = {**(SAID if path == "responses" else TOLD), "temperature": 1, "seed": 1, "stream": True}
    asked |= {"max_output_tokens": 4000} if path == "responses" else {"max_tokens": 4000}
    wait_until_free()
    with httpx2.stream("POST", f"{url}/v1/{path}", json=asked, timeout=60) as answer:
        lines = answer.iter_lines()
        while not next(lines).startswith("data:"):
            pass
        wait_until_busy()
    wait_until_free()
