"""Conversations through chat templates: Qwen3's own, and one that knows neither tools nor thinking."""

import json
from functools import lru_cache
from typing import Any

import pytest
from pydantic import ValidationError

from orthrus.deployments.bodies.faults import describe
from orthrus.deployments.chat.body import ChatBody
from orthrus.deployments.chat.grammar import answer_grammar
from orthrus.deployments.chat.output import ChatDelta, joined
from orthrus.deployments.chat.template import ChatTemplate
from orthrus.errors import RequestError
from orthrus.text.grammar_mask import GrammarMasks
from orthrus.text.stream import TextStream
from orthrus.text.tokenizer import load_tokenizer
from tests.conftest import ROOT

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather now.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture
def tiny_tokenizer() -> Any:
    """A new tokenizer for each test. Its template knows neither tools nor thinking."""
    return load_tokenizer(ROOT / "models" / "orthrus-tiny")


def chat(*messages: dict[str, Any], **fields: Any) -> ChatBody:
    return ChatBody.model_validate({"model": "m", "messages": list(messages), **fields})


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def rendered(tokenizer: Any, body: ChatBody) -> str:
    return str(tokenizer.decode(ChatTemplate(tokenizer).apply(body).tokens))


def answered(tokenizer: Any, body: ChatBody, text: str) -> ChatDelta:
    """The message that an answer of these tokens is, token by token."""
    split, stream = ChatTemplate(tokenizer).apply(body).splitter(), TextStream(tokenizer)
    deltas = [split.push(stream.push(token)) for token in tokenizer.encode(text)]
    return joined([*deltas, split.push(stream.finish(), final=True)])


def test_tools_and_their_answers_reach_the_model(qwen3_tokenizer: Any) -> None:
    call = {
        "id": "c",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Ulm"}'},
    }
    text = rendered(
        qwen3_tokenizer,
        chat(
            user("Weather in Ulm?"),
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "12 °C", "tool_call_id": "c"},
            tools=[WEATHER],
        ),
    )
    assert '"name": "get_weather"' in text.split("<tools>\n")[1].split("</tools>")[0]
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Ulm"}}\n</tool_call>' in text
    assert "<tool_response>\n12 °C\n</tool_response>" in text
    assert text.endswith("<|im_start|>assistant\n")


def test_no_tools_are_offered_with_tool_choice_none(qwen3_tokenizer: Any) -> None:
    body = chat(user("hi"), tools=[WEATHER], tool_choice="none")
    assert rendered(qwen3_tokenizer, body) == rendered(qwen3_tokenizer, chat(user("hi")))
    call = '<tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call>'
    assert answered(qwen3_tokenizer, body, call) == ChatDelta(call)


@pytest.mark.parametrize(
    "fields", [{"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}}]
)
def test_thinking_can_be_switched_off(qwen3_tokenizer: Any, fields: dict[str, Any]) -> None:
    text = rendered(qwen3_tokenizer, chat(user("hi"), **fields))
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_qwen3s_answers_are_taken_apart(qwen3_tokenizer: Any) -> None:
    body = chat(user("Weather in Ulm?"), tools=[WEATHER])
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Ulm 🌧"}}\n</tool_call>'
    answer = answered(
        qwen3_tokenizer, body, f"<think>\nA tool, then.\n</think>\n\nLet me see.\n{call}<|im_end|>"
    )
    assert (answer.reasoning, answer.content) == ("A tool, then.", "Let me see.")
    [made] = answer.tool_calls
    assert (made.name, made.arguments) == ("get_weather", '{"city": "Ulm 🌧"}')


def test_a_prompt_that_opens_the_reasoning(qwen3_tokenizer: Any) -> None:
    """As the templates of Qwen3's thinking-only models do."""
    kept = qwen3_tokenizer.chat_template
    qwen3_tokenizer.chat_template = kept + "{{- '<think>\\n' }}"
    try:
        answer = answered(qwen3_tokenizer, chat(user("hi")), "Hm.\n</think>\n\nHello!")
    finally:
        qwen3_tokenizer.chat_template = kept
    assert (answer.reasoning, answer.content) == ("Hm.", "Hello!")


def test_chat_template_kwargs_that_are_not_the_templates_are_refused(tiny_tokenizer: Any) -> None:
    template = ChatTemplate(tiny_tokenizer)
    with pytest.raises(RequestError, match="tokenize") as caught:
        template.apply(chat(user("hi"), chat_template_kwargs={"tokenize": True}))
    assert caught.value.param == "chat_template_kwargs"


@pytest.mark.parametrize("templates", [None, {"other": "x", "rag": "y"}])
def test_a_model_without_a_template_says_so(tiny_tokenizer: Any, templates: Any) -> None:
    tiny_tokenizer.chat_template = templates
    with pytest.raises(RequestError, match="chat template"):
        ChatTemplate(tiny_tokenizer).apply(chat(user("hi")))


def test_a_template_for_tools_is_taken_where_there_are_tools(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = {
        "default": "<think>",
        "tool_use": "{{ tools | length }} tools: <tool_call>",
    }
    assert rendered(tiny_tokenizer, chat(user("hi"))) == "<think>"
    assert rendered(tiny_tokenizer, chat(user("hi"), tools=[WEATHER])) == "1 tools: <tool_call>"
    assert rendered(tiny_tokenizer, chat(user("hi"), tools=[WEATHER], tool_choice="none")) == "<think>"


CALLED: dict[str, Any] = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Łódź"}'}}
    ],
}


def test_tools_are_spelled_out_for_a_template_that_knows_none(tiny_tokenizer: Any) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        user("Weather?"),
        {**CALLED, "content": "I look.", "tool_calls": CALLED["tool_calls"] * 2},
        {
            "role": "tool",
            "content": [{"type": "text", "text": "12 "}, {"type": "text", "text": "°C"}],
            "tool_call_id": "c",
        },
        {"role": "tool", "content": "rain", "tool_call_id": "c", "name": "get_weather"},
    ]
    text = rendered(tiny_tokenizer, chat(*messages, tools=[STRICT]))
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n")
    assert text.count("<|im_start|>system") == 1
    assert json.loads(text.split("<tools>\n")[1].split("\n</tools>")[0]) == WEATHER
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Łódź"}}\n</tool_call>'
    assert f"<|im_start|>assistant\nI look.\n{call}\n{call}<|im_end|>" in text
    results = "<tool_response>\n12 °C\n</tool_response>\n<tool_response>\nrain\n</tool_response>"
    assert f"<|im_start|>user\n{results}<|im_end|>" in text
    without = rendered(tiny_tokenizer, chat(*messages))
    assert "# Tools" not in without and call in without and results in without
    made = answered(tiny_tokenizer, chat(user("hi"), tools=[WEATHER]), f"Well.\n{call}")
    assert (made.content, made.tool_calls[0].arguments) == ("Well.", '{"city": "Łódź"}')


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[0].tool_calls[0].function.arguments | tojson }}", '{"city": "Łódź"}'),
        ("{{ messages[0].tool_calls[0].function.arguments.city }}", "Łódź"),
        ("{{ '-' + messages[0].tool_calls[0].function.arguments }}", '-{"city": "Łódź"}'),
    ],
)
def test_arguments_reach_a_template_as_the_type_that_it_expects(
    tiny_tokenizer: Any, template: str, expected: str
) -> None:
    tiny_tokenizer.chat_template = template + "{# tools <tool_call> #}"
    assert rendered(tiny_tokenizer, chat(CALLED, tools=[WEATHER])) == expected


@pytest.mark.parametrize("arguments", ["Ulm", "[1]", '"{}"', '{"a": NaN}', '{"a": 1', "[" * 100_000, 5])
def test_earlier_arguments_that_are_no_object_are_refused(arguments: Any) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    with pytest.raises(ValidationError) as caught:
        chat(user("hi"), {"role": "assistant", "tool_calls": [call]})
    error = describe(caught.value)
    assert "messages[1].tool_calls[0].function.arguments" in error.message
    assert "object" in error.message or "dictionary" in error.message


@pytest.mark.parametrize("arguments", ["", None, {}, "{}", " { } "])
def test_earlier_calls_may_have_no_arguments(tiny_tokenizer: Any, arguments: Any) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    text = rendered(tiny_tokenizer, chat(user("hi"), {"role": "assistant", "tool_calls": [call]}))
    assert '{"name": "f", "arguments": {}}' in text


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **function}}


CITY = {"properties": {"city": {"type": "string"}}}


@pytest.mark.parametrize(
    ("function", "allowed", "forbidden"),
    [
        ({}, ["{}"], ['{"a": 1}', "[]", "null"]),
        ({"parameters": {}}, ["{}"], ['{"a": 1}', "1"]),
        ({"parameters": True}, ["{}", '{"a": 1}'], ["[]", "null"]),
        ({"parameters": {"type": "object"}}, ["{}", '{"a": 1}'], ["[]", "null"]),
        ({"parameters": {"type": "object", "properties": {}}}, ["{}"], ['{"a": 1}']),
        ({"parameters": {"type": "string"}}, ["{}", '{"a": 1}'], ['"a"']),
        ({"parameters": {"type": ["object", "null"]}}, ["{}"], ["null"]),
        ({"parameters": {"enum": ["a", {"b": 1}]}}, ['{"b": 1}'], ['"a"', "{}"]),
        ({"parameters": {"const": "a"}}, ["{}"], ['"a"']),
        ({"parameters": {"oneOf": [{"type": "string"}, {"type": "null"}]}}, ["{}"], ["null"]),
        ({"parameters": CITY}, ["{}", '{"city": "Ulm"}'], ['{"city": 1}', '{"town": "Ulm"}', '"Ulm"']),
        ({"parameters": {**CITY, "additionalProperties": True}}, ['{"town": 1}'], ["1"]),
        (
            {"parameters": {"anyOf": [{"type": "object", **CITY, "required": ["city"]}, {"type": "null"}]}},
            ['{"city": "Ulm"}'],
            ["null", "{}"],
        ),
        (
            {"parameters": {"$ref": "#/$defs/C", "$defs": {"C": {**CITY, "required": ["city"]}}}},
            ['{"city": "Ulm"}'],
            ["{}", '"Ulm"', '{"city": 1}'],
        ),
    ],
)
def test_forced_arguments_are_an_object(
    tiny_tokenizer: Any, function: dict[str, Any], allowed: list[str], forbidden: list[str]
) -> None:
    body = chat(user("hi"), tools=[tool(**function)], tool_choice="required")
    grammar = ChatTemplate(tiny_tokenizer).apply(body).grammar
    assert grammar is not None
    for arguments, right in [*((a, True) for a in allowed), *((f, False) for f in forbidden)]:
        text = f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call><|im_end|>'
        tokens = tiny_tokenizer.encode(text)
        assert (tiny_masks()(grammar).accepts(tokens) == len(tokens)) == right, arguments


def test_parameters_that_cannot_be_followed_are_named(tiny_tokenizer: Any) -> None:
    tools = [CLOCK, tool(parameters={"properties": {"l": {"type": "array", "uniqueItems": True}}})]
    body = chat(user("hi"), tools=tools, tool_choice={"type": "function", "function": {"name": "f"}})
    with pytest.raises(RequestError, match=r"tools\[1\]\.function\.parameters.*uniqueItems") as caught:
        ChatTemplate(tiny_tokenizer).apply(body)
    assert caught.value.param == "tools[1].function.parameters"
    ChatTemplate(tiny_tokenizer).apply(chat(user("hi"), tools=tools))


@lru_cache(maxsize=1)
def tiny_masks() -> GrammarMasks:
    tokenizer = load_tokenizer(ROOT / "models" / "orthrus-tiny")
    return GrammarMasks(tokenizer, 8192, [tokenizer.eos_token_id])


ULM = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
THOUGHT = "<think>\n{ not json\n</think>\n\n"
STRICT = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
OBJECT: dict[str, Any] = {"response_format": {"type": "json_object"}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.mark.parametrize(
    ("fields", "allowed", "forbidden"),
    [
        (OBJECT, ['{"a": 1}', THOUGHT + '{"a": 1}'], ["[1]", "Well", THOUGHT + "Well"]),
        (OBJECT | {"enable_thinking": False}, ['{"a": 1}'], ["<think>"]),
        (
            {"tools": [WEATHER], "tool_choice": "required"},
            [ULM, f"{ULM}\n{ULM}", THOUGHT + ULM],
            ["Well", "{"],
        ),
        ({"tools": [WEATHER], "tool_choice": NAMED}, [ULM], [f"{ULM}\n{ULM}", ULM.replace("city", "town")]),
        (
            {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False},
            [ULM],
            [f"{ULM}\n{ULM}"],
        ),
        (
            OBJECT,
            ['{"a": 1}', THOUGHT + '{"a": 1}', THOUGHT.rstrip() + '{"a": 1}'],
            [
                '\u00a0{"a": 1}',
                '    {"a": 1}',
                '\n{"a": 1}',
                THOUGHT + '\n{"a": 1}',
                THOUGHT + '\u00a0{"a": 1}',
            ],
        ),
        (OBJECT | {"tools": [WEATHER]}, ['{"a": 1}', ULM], ["Well"]),
        (
            {"tools": [STRICT, CLOCK]},
            [
                "Well.",
                "< tool_call >",
                f"Well.\n{ULM}\n{ULM}\n",
                THOUGHT + ULM,
                ULM.replace("get_weather", "clock"),
            ],
            [ULM.replace("city", "town"), f"Well. {ULM}{ULM.replace('Ulm', '')[:-20]}", f"<think>{ULM}"],
        ),
        ({"tools": [STRICT], "parallel_tool_calls": False}, ["Well.", f"Well.\n{ULM}."], [f"{ULM}\n{ULM}"]),
    ],
)
def test_answers_follow_what_was_asked_for(
    qwen3_tokenizer: Any, fields: dict[str, Any], allowed: list[str], forbidden: list[str]
) -> None:
    masks = qwen3_masks(qwen3_tokenizer)
    grammar = ChatTemplate(qwen3_tokenizer).apply(chat(user("hi"), **fields)).grammar
    assert grammar is not None
    for text in allowed:
        tokens = qwen3_tokenizer.encode(text + "<|im_end|>")
        assert masks(grammar).accepts(tokens) == len(tokens), text
    for text in forbidden:
        tokens = qwen3_tokenizer.encode(text + "<|im_end|>")
        assert masks(grammar).accepts(tokens) < len(tokens), text


@lru_cache(maxsize=1)
def qwen3_masks(tokenizer: Any) -> GrammarMasks:
    return GrammarMasks(tokenizer, 151936, [tokenizer.eos_token_id])


def test_thinking_in_ordinary_tokens_and_thinking_that_the_prompt_opened() -> None:
    """Grammars for a tokenizer without Qwen3's markers."""
    tokenizer = load_tokenizer(ROOT / "models" / "orthrus-tiny")
    masks = GrammarMasks(tokenizer, 8192, [tokenizer.eos_token_id])
    for inside, text in ((False, THOUGHT + "{}"), (True, THOUGHT.removeprefix("<think>") + "{}")):
        grammar = answer_grammar(chat(user("hi"), **OBJECT), tokenizer, thinks=True, inside_reasoning=inside)
        assert grammar is not None
        tokens = tokenizer.encode(text)
        assert masks(grammar).accepts(tokens) == len(tokens)
        free = tokenizer.encode("a</think>Well" if inside else "Well")
        assert masks(grammar).accepts(free) < len(free)


def test_free_answers_have_no_grammar(qwen3_tokenizer: Any) -> None:
    for fields in ({}, {"response_format": {"type": "text"}}, {"tools": [WEATHER]}):
        assert ChatTemplate(qwen3_tokenizer).apply(chat(user("hi"), **fields)).grammar is None
