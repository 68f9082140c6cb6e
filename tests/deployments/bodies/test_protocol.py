"""Requests in and responses out, without a server: OpenAI's bodies and types, the gRPC messages, and failures."""

import json
from typing import Any, get_type_hints
from urllib.parse import quote

import grpc
import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming as ChatParamsStreaming
from openai.types.completion_create_params import CompletionCreateParamsStreaming
from pydantic import TypeAdapter, ValidationError
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError

from orthrus.deployments.bodies.completion_body import CompletionBody
from orthrus.deployments.bodies.faults import describe
from orthrus.deployments.chat.body import ChatBody
from orthrus.deployments.failures.errors import (
    BodyTooLarge,
    BodyTooSlow,
    GenerationFailed,
    InvalidKey,
    ModelNotFound,
    RateLimited,
    UnsupportedBody,
    unwrap,
)
from orthrus.deployments.failures.failure import describe_failure
from orthrus.deployments.grpc.format import chat_body
from orthrus.deployments.proto import orthrus_pb2 as pb
from orthrus.errors import RequestError
from orthrus.requests.request import SamplingParams
from tests.deployments.examples import chat, completion

# --- requests


def test_defaults_are_openais() -> None:
    assert completion().sampling() == SamplingParams(max_tokens=16)
    assert chat().sampling() == SamplingParams()


def test_every_sampling_parameter_arrives() -> None:
    given: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.1,
        "seed": 11,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
        "min_tokens": 3,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "max_tokens": 9,
        "n": 2,
    }
    lists = {"logit_bias": {"5": -2.5}, "stop": ["a", "b"], "stop_token_ids": [3], "logprobs": 4}
    expected = SamplingParams(**given, logit_bias={5: -2.5}, stop=("a", "b"), stop_token_ids=(3,), logprobs=4)
    assert completion(**given, **lists).sampling() == expected
    lists |= {"logprobs": True, "top_logprobs": 4}
    assert chat(**given, **lists).sampling() == expected


FULL_TEXT: dict[str, Any] = {
    "model": "m",
    "prompt": ["a"],
    "best_of": 2,
    "echo": True,
    "frequency_penalty": 0.5,
    "logit_bias": {"5": -100},
    "logprobs": 2,
    "max_tokens": 3,
    "n": 2,
    "presence_penalty": -2.0,
    "seed": -5,
    "stop": ["a", "b"],
    "stream": True,
    "stream_options": {"include_usage": True, "include_obfuscation": False},
    "suffix": "s",
    "temperature": 2.0,
    "top_p": 0.1,
    "user": "u",
}
FULL_CHAT: dict[str, Any] = {
    **{name: value for name, value in FULL_TEXT.items() if name not in ("prompt", "best_of", "echo", "suffix")},
    "messages": [
        {"role": "developer", "content": "a", "name": "n"},
        {"role": "system", "content": [{"type": "text", "text": "a"}]},
        {"role": "user", "content": [{"type": "text", "text": "a", "prompt_cache_breakpoint": {"mode": "explicit"}}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "a"}], "refusal": "r", "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "content": "a", "tool_call_id": "c"},
    ],
    "logprobs": True,
    "top_logprobs": 2,
    "max_completion_tokens": 3,
    "metadata": {"a": "b"},
    "modalities": ["text"],
    "parallel_tool_calls": False,
    "prediction": {"type": "content", "content": "a"},
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "low",
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, "strict": True}},
    "safety_identifier": "s",
    "service_tier": "auto",
    "store": False,
    "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}, "strict": True}}],
    "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [
        {"type": "function", "function": {"name": "f"}}]}},
    "verbosity": "medium",
}  # fmt: skip


@pytest.mark.parametrize(
    ("full", "params", "body"),
    [
        (FULL_TEXT, CompletionCreateParamsStreaming, CompletionBody),
        (FULL_CHAT, ChatParamsStreaming, ChatBody),
    ],
)
def test_every_field_of_openais_requests_is_taken_or_refused_by_name(
    full: Any, params: Any, body: Any
) -> None:
    TypeAdapter(params).validate_python(full)
    known = set(get_type_hints(params))
    assert body.model_validate_json(json.dumps(full)).stream
    for name in known - set(full):
        with pytest.raises(ValidationError) as caught:
            body.model_validate_json(json.dumps({**full, name: {}}))
        error = describe(caught.value)
        assert error.param == name and error.message.startswith(f"{name} is not supported: ")


def test_null_means_not_given_and_harmless_fields_change_nothing() -> None:
    fields = {name: None for name in CompletionBody.model_fields if name not in ("model", "prompt")}
    assert completion(**fields, tools=None).sampling() == completion().sampling()
    assert completion(user="u", store=True, metadata={"a": 1}, service_tier="auto").sampling().n == 1


@pytest.mark.parametrize(
    ("fields", "params"),
    [
        ({"stop": "x"}, {"stop": ("x",)}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"seed": -1}, {"seed": 2**63 - 1}),
        ({"seed": -(2**63)}, {"seed": 0}),
        ({"temperature": -0.0}, {"temperature": 0.0}),
        ({"max_tokens": 5, "max_completion_tokens": 6}, {"max_tokens": 6}),
        ({"logprobs": True}, {"logprobs": 0}),
    ],
)
def test_equivalent_fields_give_the_same_parameters(fields: dict[str, Any], params: dict[str, Any]) -> None:
    assert chat(**fields).sampling() == SamplingParams(**params)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_the_four_kinds_of_prompt(prompt: Any, prompts: list[Any]) -> None:
    assert completion(prompt=prompt).prompts() == prompts


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"temprature": 1}, "temprature", "unknown field"),
        ({"max_tokens": "5"}, "max_tokens", "integer"),
        ({"max_tokens": 5.0}, "max_tokens", "integer"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"temperature": "1"}, "temperature", "number"),
        ({"prompt": 5}, "prompt", "prompt: "),
        ({"prompt": [1, "a"]}, "prompt[0]", "prompt[0]: "),
        ({"stop": ["a", 1]}, "stop[1]", "stop[1]: "),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown field"),
    ],
)
def test_bodies_that_cannot_be_read(fields: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        completion(**fields)
    error = describe(caught.value)
    assert error.param == param
    assert said in error.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"suffix": "s"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a"] * 600, "n": 2}, "prompt"),
        ({"logit_bias": {"x": 1.0}}, "logit_bias"),
        ({"logit_bias": {"1_0": 1.0}}, "logit_bias"),
        ({"logit_bias": {"٣": 1.0}}, "logit_bias"),
        ({"top_k": -2}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"n": 0}, "n"),
        ({"seed": 2**70}, "seed"),
    ],
)
def test_bodies_that_cannot_be_served(fields: dict[str, Any], param: str) -> None:
    body = completion(**fields)
    with pytest.raises(RequestError) as caught:
        (body.sampling(), body.prompts())
    assert caught.value.param == param


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ],
)
def test_chats_that_cannot_be_served(fields: dict[str, Any], param: str) -> None:
    with pytest.raises((RequestError, ValidationError)) as caught:
        chat(**fields).sampling()
    error: Any = caught.value
    assert (error if isinstance(error, RequestError) else describe(error)).param == param


def test_grpc_chats_are_http_chats() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    expected = chat(
        messages=[
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call]},
            {"role": "tool", "content": "2", "tool_call_id": "c"},
        ],
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "f"}},
        enable_thinking=False,
        parallel_tool_calls=False,
        chat_template_kwargs={"x": [1]},
    )
    messages = [
        pb.ChatMessage(role="user", content="hi"),
        pb.ChatMessage(
            role="assistant",
            reasoning_content="hm",
            tool_calls=[pb.ToolCall(id="c", name="f", arguments='{"a": 1}')],
        ),
        pb.ChatMessage(role="tool", content="2", tool_call_id="c"),
    ]
    request = pb.ChatRequest(
        model="m",
        messages=messages,
        tools=[pb.Tool(name="f", parameters='{"type": "object"}')],
        tool_choice="f",
        enable_thinking=False,
        parallel_tool_calls=False,
        chat_template_kwargs='{"x": [1]}',
    )
    assert chat_body(request) == expected
    assert chat_body(pb.ChatRequest(model="m", messages=messages[:1])) == chat()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [pb.ChatMessage(role="king")]}, "messages[0].role"),
        ({"messages": []}, "messages"),
        ({"chat_template_kwargs": "[1]"}, "chat_template_kwargs"),
        ({"chat_template_kwargs": "{"}, "chat_template_kwargs"),
        ({"tools": [pb.Tool(name="f", parameters="[" * 10**5)]}, "tools[0].parameters"),
    ],
)
def test_grpc_chats_that_cannot_be_served(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat_body(pb.ChatRequest(**{"messages": [pb.ChatMessage(role="user", content="hi")], **fields}))
    assert caught.value.param == param


def test_messages_reach_the_template_as_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}]
    body = chat(messages=[{"role": "developer", "content": parts}, {"role": "assistant", "content": None}])
    assert [message.for_template() for message in body.messages] == [
        {"role": "system", "content": "ab"},
        {"role": "assistant", "content": ""},
    ]


@pytest.mark.parametrize(
    ("fields", "thinking"),
    [
        ({}, None),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "low"}, True),
        ({"reasoning_effort": "high", "enable_thinking": False}, False),
    ],
)
def test_reasoning_effort_decides_whether_to_think(fields: dict[str, Any], thinking: bool | None) -> None:
    assert chat(**fields).thinking is thinking


OTHER_TOOL = {"type": "function", "function": {"name": "g"}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.mark.parametrize(
    ("choice", "offered", "callable_", "must"),
    [
        (None, "fg", "fg", False),
        ("none", "", "", False),
        ("required", "fg", "fg", True),
        ({"type": "function", "function": {"name": "g"}}, "fg", "g", True),
        (allowed("auto", "f"), "f", "f", False),
        (allowed("required", "g"), "g", "g", True),
    ],
)
def test_tool_choices(choice: Any, offered: str, callable_: str, must: bool) -> None:
    body = chat(tools=[TOOL, OTHER_TOOL], tool_choice=choice)
    assert [tool.function.name for tool in body.offered_tools] == list(offered)
    assert [tool.function.name for tool in body.callable_tools] == list(callable_)
    assert body.must_call is must


def test_pictures_are_refused_by_path() -> None:
    picture = [{"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(ValidationError) as caught:
        chat(messages=[{"role": "user", "content": picture}])
    assert describe(caught.value).message.startswith("messages[0].content[0].type: ")


# --- failures


@pytest.mark.parametrize(
    ("error", "status", "code", "kind"),
    [
        (RequestError("bad", "n"), 400, "INVALID_ARGUMENT", "invalid_request_error"),
        (ModelNotFound("none"), 404, "NOT_FOUND", "invalid_request_error"),
        (BodyTooLarge("big"), 413, "INVALID_ARGUMENT", "invalid_request_error"),
        (unwrap(BackPressureError(9, 8)), 429, "RESOURCE_EXHAUSTED", "rate_limit_error"),
        (unwrap(ReplicaUnavailableError("gone")), 503, "UNAVAILABLE", "server_error"),
        (BodyTooSlow("slow"), 408, "DEADLINE_EXCEEDED", "invalid_request_error"),
        (UnsupportedBody("form"), 415, "INVALID_ARGUMENT", "invalid_request_error"),
        (InvalidKey("no key"), 401, "UNAUTHENTICATED", "invalid_request_error"),
        (RateLimited("wait", 1.5), 429, "RESOURCE_EXHAUSTED", "rate_limit_error"),
        (GenerationFailed("engine"), 500, "INTERNAL", "server_error"),
        (KeyError("secret"), 500, "INTERNAL", "server_error"),
    ],
)
def test_every_failure_has_an_answer(error: Exception, status: int, code: str, kind: str) -> None:
    failure = describe_failure(error)
    assert (failure.status, failure.grpc_code) == (status, grpc.StatusCode[code])
    body = failure.body["error"]
    assert set(body) == {"message", "type", "param", "code"} and body["type"] == kind
    assert "secret" not in body["message"]


def test_messages_are_short_enough_for_a_grpc_trailer() -> None:
    message = describe_failure(RequestError("😀" * 10**6)).message
    assert len(quote(message)) < 8000 and message.endswith("...")
