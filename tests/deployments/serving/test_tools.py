"""Tool calls and thinking over the API, with Qwen3's own chat template on the small model."""

import json
import shutil
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from ray import serve

from orthrus.deployments.config.api import ApiConfig
from orthrus.deployments.ingress.ingress import Ingress
from orthrus.deployments.proto import orthrus_pb2 as pb
from orthrus.deployments.proto.orthrus_pb2_grpc import OrthrusStub
from orthrus.engine.config import EngineConfig
from tests.conftest import ROOT
from tests.serving import MODEL, http

APP = "tools"
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
CLOCK: Any = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "maxProperties": 0}},
}
ASKED: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "What is the weather in Łódź?"}],
    "temperature": 0,
    "max_tokens": 200,
    "tools": [WEATHER, CLOCK],
}


@pytest.fixture(scope="module")
def tools(url: str, qwen3_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Another ingress in front of the same replicas, whose tokenizer has Qwen3's chat template: its address."""
    model = tmp_path_factory.mktemp("tools") / MODEL
    shutil.copytree(ROOT / "models" / MODEL, model, ignore=shutil.ignore_patterns("*.safetensors"))
    (model / "chat_template.jinja").write_text(qwen3_tokenizer.chat_template)
    ingress: Any = Ingress  # The decorator's type is lost to the type checker.
    app = ingress.options(ray_actor_options={"num_cpus": 0.1}).bind(
        serve.get_deployment_handle("OrthrusReplica", "orthrus"),
        EngineConfig(model=str(model), served_model_name=MODEL, device="cpu"),
        ApiConfig(),
        None,
    )
    serve.run(app, name=APP, route_prefix=f"/{APP}")
    try:
        yield f"{url}/{APP}"
    finally:
        serve.delete(APP, _blocking=False)


@pytest.fixture(scope="module")
def chat(tools: str) -> Any:
    return openai.OpenAI(base_url=f"{tools}/v1", api_key="none", max_retries=0).chat.completions


def calls_of(answer: ChatCompletion) -> list[tuple[str, Any]]:
    """Names and arguments of an answer's calls. Checks the answer against OpenAI's types."""
    ChatCompletion.model_validate_json(answer.model_dump_json(), strict=True)
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    calls = choice.message.tool_calls or []
    assert len({call.id for call in calls}) == len(calls) > 0
    return [(c.function.name, json.loads(c.function.arguments)) for c in calls if c.type == "function"]


def test_required_calls_follow_their_schemas_and_stream(chat: Any) -> None:
    answer = chat.create(**ASKED, tool_choice="required", parallel_tool_calls=False)
    [(name, arguments)] = calls_of(answer)
    parameters = {"weather": PARAMETERS, "clock": CLOCK["function"]["parameters"]}[name]
    jsonschema.validate(arguments, parameters)
    assert answer.choices[0].message.content is None
    assert answer.choices[0].orthrus["tokens_per_cycle"] >= 1
    events = list(chat.create(**ASKED, tool_choice="required", parallel_tool_calls=False, stream=True))
    for event in events:
        ChatCompletionChunk.model_validate_json(event.model_dump_json(), strict=True)
    pieces = [call for event in events for call in event.choices[0].delta.tool_calls or ()]
    assert [(piece.index, piece.type) for piece in pieces if piece.id] == [(0, "function")]
    assert pieces[0].function.name == name
    assert json.loads("".join(piece.function.arguments for piece in pieces)) == arguments
    assert [e.choices[0].finish_reason for e in events if e.choices[0].finish_reason] == ["tool_calls"]


def test_the_embedded_model_makes_forced_calls_and_openais_package_streams_them(
    client: openai.OpenAI,
) -> None:
    """Its own chat template knows no tools."""
    tool = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    named: Any = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        asked: Any = ASKED | {"tools": [tool], "tool_choice": choice, "parallel_tool_calls": False}
        [(name, arguments)] = calls_of(client.chat.completions.create(**asked))
        jsonschema.validate(arguments, PARAMETERS)
        with client.chat.completions.stream(**asked) as stream:
            deltas = [event.chunk.choices[0].delta for event in stream if event.type == "chunk"]
            [call] = stream.get_final_completion().choices[0].message.tool_calls or []
        assert (call.function.name, call.function.parsed_arguments) == (name, arguments)
        assert all(delta.to_dict() and len(delta.tool_calls or ()) < 2 for delta in deltas)


def test_the_choice_of_tools_is_kept_to(chat: Any) -> None:
    named: Any = {"type": "function", "function": {"name": "clock"}}
    assert calls_of(chat.create(**ASKED, tool_choice=named)) == [("clock", {})]
    allowed: Any = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
    answer = chat.create(**ASKED, tool_choice=allowed, parallel_tool_calls=False)
    assert calls_of(answer) == [("clock", {})]
    free = chat.create(**{**ASKED, "max_tokens": 20}, tool_choice="none")
    assert free.choices[0].message.tool_calls is None and free.choices[0].message.content
    with pytest.raises(openai.BadRequestError) as caught:
        chat.create(**ASKED, tool_choice={"type": "function", "function": {"name": "stove"}})
    assert caught.value.param == "tool_choice"


def test_an_answer_is_a_call_or_under_the_schema(chat: Any) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    for seed in range(4):
        answer = chat.create(**ASKED | {"temperature": 1, "seed": seed}, response_format=wanted)
        [choice] = answer.choices
        if choice.finish_reason == "tool_calls":
            calls_of(answer)
        elif choice.finish_reason == "stop":
            jsonschema.validate(json.loads(choice.message.content), schema)


def test_grpc_makes_the_same_call(tools: str, stub: OrthrusStub, chat: Any) -> None:
    expected = calls_of(chat.create(**ASKED, tool_choice="required", parallel_tool_calls=False))
    request = pb.ChatRequest(
        model=MODEL,
        messages=[pb.ChatMessage(role="user", content=ASKED["messages"][0]["content"])],
        sampling=pb.SamplingParams(temperature=0, max_tokens=200),
        tools=[
            pb.Tool(name=t["function"]["name"], parameters=json.dumps(t["function"]["parameters"]))
            for t in (WEATHER, CLOCK)
        ],
        tool_choice="required",
        parallel_tool_calls=False,
    )
    [choice] = stub.Chat(request, metadata=[("application", APP)]).choices
    assert choice.finish_reason == "tool_calls"
    assert [(call.name, json.loads(call.arguments)) for call in choice.tool_calls] == expected
    pieces = [
        p for chunk in stub.ChatStream(request, metadata=[("application", APP)]) for p in chunk.tool_calls
    ]
    assert json.loads("".join(piece.arguments for piece in pieces)) == expected[0][1]


def test_a_conversation_with_calls_goes_through_the_template(tools: str, chat: Any) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Łódź"}'}}
    messages = [
        *ASKED["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "☀️"},
    ]
    assert chat.create(**ASKED | {"messages": messages, "max_tokens": 4}).usage.prompt_tokens > 100
    body = {"model": MODEL, "messages": messages, "tools": [WEATHER, CLOCK]}
    tokens = http(f"{tools}/tokenize", json.dumps(body).encode())[1]["tokens"]
    back = json.dumps({"model": MODEL, "tokens": tokens}).encode()
    prompt = http(f"{tools}/detokenize", back)[1]["prompt"]
    assert '"name": "clock"' in prompt
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Łódź"}}\n</tool_call>' in prompt
    assert "<tool_response>\n☀️\n</tool_response>" in prompt


def test_thinking_is_turned_off_in_three_ways(tools: str) -> None:
    def prompt(**fields: Any) -> str:
        body = json.dumps({"model": MODEL, "messages": ASKED["messages"], **fields}).encode()
        tokens = http(f"{tools}/tokenize", body)[1]["tokens"]
        back = json.dumps({"model": MODEL, "tokens": tokens}).encode()
        return str(http(f"{tools}/detokenize", back)[1]["prompt"])

    assert "</think>" not in prompt() and "</think>" not in prompt(reasoning_effort="high")
    for fields in (
        {"enable_thinking": False},
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ):
        assert prompt(**fields).endswith("<think>\n\n</think>\n\n")
