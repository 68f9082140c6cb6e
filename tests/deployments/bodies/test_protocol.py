"""Requests in and responses out, without a server: OpenAI's bodies and types, the gRPC messages, and failures."""

import json
import math
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import quote

import grpc
import numpy as np
import pytest
from grpc_tools import protoc
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming as ChatParamsStreaming
from openai.types.completion_create_params import CompletionCreateParamsStreaming
from pydantic import TypeAdapter, ValidationError
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError

from orthrus.deployments.bodies.completion_body import CompletionBody
from orthrus.deployments.bodies.faults import describe
from orthrus.deployments.chat.body import ChatBody
from orthrus.deployments.chat.call_text import ToolCallDelta
from orthrus.deployments.chat.output import ChatDelta
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
from orthrus.deployments.generation.choices import Choice
from orthrus.deployments.generation.text_chunk import TextChunk
from orthrus.deployments.grpc.format import chat_body, chat_chunk, generate_chunk, request_params
from orthrus.deployments.openai.format import ResponseFormat, cost
from orthrus.deployments.openai.logprobs import Echo
from orthrus.deployments.proto import orthrus_pb2 as pb
from orthrus.errors import RequestError
from orthrus.requests.request import Chunk, PromptLogprobs, RequestStats, SamplingParams, TokenLogprob
from tests.conftest import ROOT

STATS = RequestStats(prompt_tokens=5, cached_tokens=2, completion_tokens=3, cycles=1, passes=2, seed=7)


def completion(**fields: Any) -> CompletionBody:
    return CompletionBody.model_validate_json(json.dumps({"model": "m", "prompt": "p", **fields}))


def chat(**fields: Any) -> ChatBody:
    asked = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return ChatBody.model_validate_json(json.dumps(asked))


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
def test_spellings(fields: dict[str, Any], params: dict[str, Any]) -> None:
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
def test_reasoning_effort_is_whether_to_think(fields: dict[str, Any], thinking: bool | None) -> None:
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


# --- responses


def chunk(index: int, tokens: tuple[int, ...], last: bool, logprobs: bool) -> Chunk:
    scored = tuple(TokenLogprob(t, -0.5, ((t, -0.5), (1, -math.inf))) for t in tokens)
    return Chunk(
        request_id="r",
        index=index,
        token_ids=tokens,
        logprobs=scored if logprobs else None,
        finish_reason="length" if last else None,
        stats=STATS if last else None,
    )


def prompt_scores() -> PromptLogprobs:
    """Of the second and third token of a prompt."""
    return PromptLogprobs(
        token_ids=np.array([66, 67]),
        logprobs=np.array([-0.5, -2.0], np.float32),
        ranks=np.array([1, 9]),
        top_ids=np.array([[66, 2], [1, 67]]),
        top_logprobs=np.array([[-0.5, -1.0], [-0.25, -2.0]], np.float32),
    )


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
        json.dumps(ResponseFormat(False, "m", tokenizer, **asked).whole(choices), allow_nan=False),
        strict=True,
    )
    talk = ChatCompletion.model_validate_json(
        json.dumps(ResponseFormat(True, "m", tokenizer, **asked).whole(choices), allow_nan=False), strict=True
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
def test_a_seed_is_told_so_that_it_can_be_sent_again(sent: int) -> None:
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
    text = ResponseFormat(False, "m", tokenizer, logprobs=2)
    talk = ResponseFormat(True, "m", tokenizer, True, logprobs=2)
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
def test_server_sent_events_are_the_events(tokenizer: Any, include_usage: bool) -> None:
    """Those that carry only text are put together from parts: nothing may show of it."""
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
            ResponseFormat(delta is not None, 'm"é', tokenizer, include_usage, logprobs=2) for _ in range(2)
        )
        whole.id, whole.created = out.id, out.created
        text = 'x"\n' if delta is None else ""
        for index, last in ((0, False), (3, False), (3, False), (3, True)):
            item = TextChunk(index, text, chunk(index, (1,), last, last), delta, "length" if last else None)
            said = out.stream(item, index)
            assert said.startswith("data: ") and said.endswith("\n\n") and said.count("\n") == 2
            assert json.loads(said.removeprefix("data: ")) == whole.event(item, index)


def test_echo_puts_the_prompt_first(tokenizer: Any) -> None:
    out = ResponseFormat(False, "m", tokenizer, n=2, echo=[Echo("pq"), Echo("r")])
    items = [TextChunk(0, "ab", chunk(0, (1, 2), True, False), finish_reason="length")]
    whole = Completion.model_validate(out.whole([Choice(items)] * 4))
    assert [choice.text for choice in whole.choices] == ["pqab", "pqab", "rab", "rab"]
    opening = out.opening(2)
    assert opening is not None and opening["choices"][0]["text"] == "r"
    assert ResponseFormat(False, "m", tokenizer).opening(0) is None


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
    out = ResponseFormat(True, "m", tokenizer)
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


# --- gRPC


def test_generated_stubs_are_up_to_date(tmp_path: Path) -> None:
    """If this fails: `make proto`."""
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    include = str(files("grpc_tools") / "_proto")
    source = "orthrus/deployments/proto/orthrus.proto"
    assert protoc.main(["protoc", f"-I{ROOT}", f"-I{include}", *outputs, str(ROOT / source)]) == 0
    made = sorted((tmp_path / source).parent.iterdir())
    assert [file.name for file in made] == ["orthrus_pb2.py", "orthrus_pb2.pyi", "orthrus_pb2_grpc.py"]
    for file in made:
        assert file.read_text() == (ROOT / source).with_name(file.name).read_text(), file.name


def test_grpc_has_the_same_parameters() -> None:
    names = {field.name for field in pb.SamplingParams.DESCRIPTOR.fields}
    # The grammar follows from the request's response_format and tools.
    assert names == set(SamplingParams.__dataclass_fields__) - {"grammar"}
    message = pb.SamplingParams(
        temperature=0.0, n=2, stop=["a"], stop_token_ids=[4], logit_bias={5: 1.5}, max_tokens=3, seed=9
    )
    expected = SamplingParams(
        temperature=0.0, n=2, stop=("a",), stop_token_ids=(4,), logit_bias={5: 1.5}, max_tokens=3, seed=9
    )
    assert request_params(message) == expected
    assert request_params(pb.SamplingParams()).seed is not None


def test_grpc_answers() -> None:
    items = [
        TextChunk(0, "a", chunk(0, (1,), False, True)),
        TextChunk(0, "b", chunk(0, (2, 3), True, True), finish_reason="length"),
    ]
    choice = generate_chunk(0, items)
    assert (choice.text, list(choice.token_ids), choice.finish_reason) == ("ab", [1, 2, 3], "length")
    assert [item.token_id for item in choice.logprobs] == [1, 2, 3]
    assert (choice.stats.tokens_per_cycle, choice.stats.seed) == (2.0, 7)
    first = replace(items[0].chunk, prompt_logprobs=prompt_scores())
    for message in (
        generate_chunk(0, [replace(items[0], chunk=first), items[1]]),
        chat_chunk(0, [TextChunk(0, "", first, ChatDelta())]),
    ):
        assert [(s.token_id, s.logprob, len(s.top)) for s in message.prompt_logprobs] == [
            (66, -0.5, 2),
            (67, -2.0, 2),
        ]
        assert [(top.token_id, top.logprob) for top in message.prompt_logprobs[1].top] == [
            (1, -0.25),
            (67, -2.0),
        ]


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
