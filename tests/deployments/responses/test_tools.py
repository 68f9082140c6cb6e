"""The Responses API's tools beside plain functions: namespaces, custom tools, and hosted ones, which do not run here."""

import asyncio
import json
import re
from typing import Any

import pytest

from orthrus.deployments.access.call import Call
from orthrus.deployments.config.api import ApiConfig
from orthrus.deployments.failures.failure import describe_failure
from orthrus.deployments.generation.handler import Handler
from orthrus.deployments.generation.served_model import ServedModel
from orthrus.deployments.responses.api import ResponsesApi
from orthrus.deployments.responses.items import listed
from orthrus.deployments.responses.tools import custom_input
from orthrus.errors import RequestError
from tests.chunks import chunks, cut
from tests.responses import SCHEMA, TOOL, body, streamed, whole, without_ids

PATCH = '*** Begin Patch\n*** Add File: a\n+"Łódź" 😀\\n\t\n*** End Patch\n'
GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": 'start: "a"'}
WAIT = {
    "type": "function",
    "name": "wait_agent",
    "description": "Waits.",
    "strict": False,
    "parameters": SCHEMA,
}
CLOSE = {"type": "function", "name": "close_agent", "strict": False, "parameters": SCHEMA}
AGENTS = {
    "type": "namespace",
    "name": "multi_agent_v1",
    "description": "Tools for sub-agents.",
    "tools": [WAIT, CLOSE],
}
APPLY_PATCH = {"type": "custom", "name": "apply_patch", "description": "Edits files.", "format": GRAMMAR}
WEB_SEARCH = {"type": "web_search", "external_web_access": False, "search_content_types": ["text", "image"]}
TOOL_SEARCH = {"type": "tool_search", "execution": "client", "description": "d", "parameters": SCHEMA}
CODEX = [TOOL, AGENTS, APPLY_PATCH, TOOL_SEARCH, WEB_SEARCH]
"""What Codex offers to the models that it knows and to those that it does not, each tool cut short."""


def call_text(name: str, arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>\n"


ANSWER = (
    "On it.\n"
    + call_text("multi_agent_v1.close_agent", {"city": "x"})
    + call_text("apply_patch", {"input": PATCH})
    + call_text("weather", {"city": "y"})
    + call_text("made.up", {})
)


def test_all_that_codex_offers_is_taken() -> None:
    asked = body(tools=CODEX, tool_choice="auto", parallel_tool_calls=True)
    weather, wait, close, patch = [tool.function for tool in asked.chat().offered_tools]
    assert (weather.name, weather.strict) == ("weather", True)
    assert (wait.name, wait.parameters, wait.strict) == ("multi_agent_v1.wait_agent", SCHEMA, False)
    assert wait.description == "multi_agent_v1: Tools for sub-agents.\n\nWaits."
    assert (close.name, close.description) == ("multi_agent_v1.close_agent", None)
    assert patch.description == 'Edits files.\n\nThe input follows this lark grammar:\nstart: "a"'
    assert (patch.name, patch.strict) == ("apply_patch", True)
    assert patch.parameters == {
        "type": "object",
        "properties": {"input": {"type": "string"}},
        "required": ["input"],
        "additionalProperties": False,
    }
    assert asked.left_out == ["tools[3]", "tools[4]"]
    assert whole(chunks(["a"]), asked)["tools"] == [TOOL, AGENTS, APPLY_PATCH]
    assert body(tools=[WEB_SEARCH]).chat().offered_tools == []


def additional(*tools: Any) -> dict[str, Any]:
    """Tools as newer versions of Codex send them: all in an item of the input, none in `tools`."""
    return {"type": "additional_tools", "role": "developer", "id": "at_1", "tools": list(tools)}


def test_tools_in_the_input_are_offered_like_those_of_the_body() -> None:
    message = {"type": "message", "role": "user", "content": "hi"}
    asked = body(input=[additional(*CODEX), message], tool_choice="auto")
    assert asked.chat().offered_tools == body(tools=CODEX).chat().offered_tools
    assert [m.role for m in asked.chat().messages] == ["user"]
    assert asked.left_out == ["input[0].tools[3]", "input[0].tools[4]"]
    assert asked.field_names()["tools[1].function.parameters"] == "input[0].tools[1].tools[0].parameters"
    _, response = streamed(chunks([ANSWER]), asked)
    kinds = [item["type"] for item in response["output"]]
    assert kinds == ["message", "function_call", "custom_tool_call", "function_call", "function_call"]
    assert response["output"][1]["namespace"] == "multi_agent_v1" and response["tools"] == []
    assert body(input=[additional(), message]).chat().offered_tools == []


def test_tools_in_the_input_replace_earlier_ones_of_the_same_name() -> None:
    newer = {**TOOL, "description": "newer"}
    asked = body(tools=[TOOL, WAIT], input=[additional(newer), {"role": "user", "content": "hi"}])
    assert [(t.name, t.description) for t in (tool.function for tool in asked.chat().offered_tools)] == [
        ("wait_agent", "Waits."),
        ("weather", "newer"),
    ]
    before = body(input=[additional(CLOSE, TOOL)]).items
    names = [tool.function.name for tool in asked.chat(before).offered_tools]
    assert names == ["close_agent", "wait_agent", "weather"]
    later = body(input="go on")
    assert [tool.name for tool in later.offered(before)] == ["close_agent", "weather"]
    assert listed(before[0]) == {**additional(CLOSE, TOOL), "status": "completed"}


@pytest.mark.parametrize("seed", range(20))
def test_calls_name_what_the_client_offered(seed: int) -> None:
    items = chunks(cut(ANSWER, seed))
    asked = body(tools=CODEX)
    events, response = streamed(items, asked)
    assert without_ids(response) == without_ids(whole(items, asked))
    _, close, patch, weather, unknown = response["output"]
    assert (close["type"], close["name"], close["namespace"]) == (
        "function_call",
        "close_agent",
        "multi_agent_v1",
    )
    assert (patch["type"], patch["name"], patch["input"]) == ("custom_tool_call", "apply_patch", PATCH)
    assert "namespace" not in patch and "arguments" not in patch and patch["id"].startswith("ctc_")
    assert weather["name"] == "weather" and "namespace" not in weather
    assert unknown["name"] == "made.up" and "namespace" not in unknown
    of_patch = [event for event in events if getattr(event, "output_index", None) == 2]
    first, *deltas, done, last = of_patch
    assert first.type == "response.output_item.added" and first.item.input == ""
    assert {event.type for event in deltas} == {"response.custom_tool_call_input.delta"}
    assert all(event.delta for event in deltas) and "".join(event.delta for event in deltas) == PATCH
    assert (done.type, done.input) == ("response.custom_tool_call_input.done", PATCH)
    assert last.type == "response.output_item.done" and last.item.type == "custom_tool_call"


def test_the_input_of_a_custom_tool_comes_as_it_is_written() -> None:
    """However its JSON is cut, even within an escape or a pair of surrogates."""
    for ascii_only in (True, False):
        pieces = list(json.dumps({"input": PATCH}, ensure_ascii=ascii_only))
        head, tail = '<tool_call>\n{"name": "apply_patch", "arguments": ', "}\n</tool_call>"
        events, response = streamed(chunks([head, *pieces, tail]), body(tools=CODEX))
        deltas = [event.delta for event in events if event.type == "response.custom_tool_call_input.delta"]
        assert "".join(deltas) == PATCH == response["output"][0]["input"] and len(deltas) > len(PATCH) / 2
    for no_input in ("", "{", "{}", "[", '{"input": 1', '{"input": null}', "nonsense"):
        assert custom_input(no_input) == ""


def test_calls_are_read_back() -> None:
    """Codex' history: earlier answers, the outputs of calls, and null for absent fields."""
    answered = whole(chunks(cut(ANSWER, 3)), body(tools=CODEX))["output"]
    outputs = [
        {
            "type": "function_call_output",
            "id": "fco_1",
            "call_id": answered[1]["call_id"],
            "output": "done",
            "name": "close_agent",
            "namespace": "multi_agent_v1",
        },
        {
            "type": "custom_tool_call_output",
            "id": "ctco_1",
            "call_id": answered[2]["call_id"],
            "output": [{"type": "input_text", "text": "patched"}],
        },
    ]
    thought: dict[str, Any] = {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [],
        "content": None,
        "encrypted_content": None,
    }
    chat = body(input=[{"role": "user", "content": "go"}, thought, *answered, *outputs], tools=CODEX).chat()
    _, assistant, done, patched = chat.messages
    assert [(call.function.name, call.function.arguments) for call in assistant.tool_calls or ()] == [
        ("multi_agent_v1.close_agent", {"city": "x"}),
        ("apply_patch", {"input": PATCH}),
        ("weather", {"city": "y"}),
        ("made.up", {}),
    ]
    assert (done.tool_call_id, done.text) == (answered[1]["call_id"], "done")
    assert (patched.tool_call_id, patched.text) == (answered[2]["call_id"], "patched")


def test_choices_of_other_tools_than_functions() -> None:
    close = {"type": "function", "namespace": "multi_agent_v1", "name": "close_agent"}
    patch = {"type": "custom", "name": "apply_patch"}
    for choice, callable_ in (
        (patch, ["apply_patch"]),
        (close, ["multi_agent_v1.close_agent"]),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [close, patch]},
            ["multi_agent_v1.close_agent", "apply_patch"],
        ),
    ):
        asked = body(tools=CODEX, tool_choice=choice)
        assert [tool.function.name for tool in asked.chat().callable_tools] == callable_
        assert asked.chat().must_call
        assert whole(chunks(["a"]), asked)["tool_choice"] == choice


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tools": [{"type": "teleport"}]}, "tools[0]: type 'teleport' is not supported here: send 'function'"),
        ({"tools": [{"name": "f", "type": ["function"]}]}, "tools[0]: type ['function'] is not supported here"),
        ({"tools": ["f"]}, "tools[0]"),
        ({"tools": [{"type": "custom"}]}, "tools[0].name: Field required"),
        ({"tools": [{**AGENTS, "tools": [WEB_SEARCH]}]}, "tools[0].tools[0]: type 'web_search' is not supported here"),
        ({"tools": [{**AGENTS, "tools": [{**WAIT, "name": "a b"}]}]}, "tools[0].tools[0].name: "),
        ({"tools": [{**AGENTS, "name": "n" * 120}]}, "has over 128 characters: shorten the name of the namespace"),
        ({"tools": [AGENTS, {**TOOL, "name": "multi_agent_v1.wait_agent"}]}, "each tool must have a name of its own"),
        ({"tools": [{**APPLY_PATCH, "format": {"type": "grammar"}}]}, "a format has a syntax and a definition if"),
        ({"input": [additional({**TOOL, "name": "a b"})]}, "input[0].additional_tools.tools[0].name: "),
        ({"input": [additional(TOOL, TOOL), {"role": "user", "content": "hi"}]}, "each tool must have a name of its own"),
        ({"tools": CODEX, "tool_choice": {"type": "web_search"}}, "tool_choice: type 'web_search' is not supported"),
        (
            {"tools": CODEX, "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}]}},
            "type 'mcp' is not supported here: send 'function' or 'custom'",
        ),
        ({"tools": [WEB_SEARCH], "tool_choice": "required"}, "tool_choice needs a function or custom tool"),
        ({"tools": CODEX, "tool_choice": {"type": "function", "name": "wait_agent"}}, "tool_choice names 'wait_agent'"),
    ],
)  # fmt: skip
def test_tools_that_cannot_be_offered_are_refused_by_name(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=re.escape(says)):
        body(**fields).chat()


def test_the_answer_says_what_was_left_out_and_errors_where_tools_are(tokenizer: Any) -> None:
    call = Call("responses")
    model = ServedModel("m", tokenizer, 256, 100)
    handler = Handler(model, None, None, None, ApiConfig())  # type: ignore[arg-type]
    asked = body(tools=[WEB_SEARCH, AGENTS])
    with pytest.raises(RequestError, match="chat template"):
        asyncio.run(ResponsesApi(handler, None).create(call, asked))
    assert call.headers["x-orthrus-ignored-fields"] == "tools[0]"
    told = describe_failure(
        RequestError("tools[1].function.parameters: no", "tools[1].function.parameters"), asked.field_names()
    )
    assert (told.param, told.message) == ("tools[1].tools[1].parameters", "tools[1].tools[1].parameters: no")
