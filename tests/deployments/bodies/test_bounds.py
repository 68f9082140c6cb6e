"""Bodies of 4 MiB, the largest that are read, whose checks could take minutes: each costs little, right or wrong."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from orthrus.deployments.bodies.completion_body import CompletionBody
from orthrus.deployments.chat.body import ChatBody
from orthrus.deployments.chat.grammar import answer_grammar
from orthrus.deployments.chat.tool_prompt import spelled_out
from orthrus.deployments.http.body import parse_body
from orthrus.deployments.ingress.docs import BODIES
from orthrus.deployments.messages.body import MessagesBody
from orthrus.deployments.responses.body import ResponsesBody
from orthrus.errors import RequestError
from orthrus.text.tokenizer import load_tokenizer
from tests.conftest import ROOT
from tests.hostile import bounded

SIZE = (4 << 20) - 1000
HI = [{"role": "user", "content": "hi"}]


def filled(before: str, piece: str | Callable[[int], str], after: str) -> bytes:
    """A body of about 4 MiB: pieces between commas."""
    make = (lambda _: piece) if isinstance(piece, str) else piece
    pieces: list[str] = []
    size = 0
    while size < SIZE:
        pieces.append(make(len(pieces)))
        size += len(pieces[-1]) + 1
    return f"{before}{','.join(pieces)}{after}".encode()


MODEL = '{"model": "m", "max_tokens": 1, '
COMPLETION = f'{MODEL}"prompt": "p", '
WRONG: dict[str, tuple[type[Any], bytes, str]] = {
    "prompts": (CompletionBody, filled(f'{MODEL}"prompt": [', "{}", "]}"), "prompt[0]"),
    "token ids": (CompletionBody, filled(f'{MODEL}"prompt": [[', '""', "]]}"), "prompt[0][0]"),
    "stop strings": (CompletionBody, filled(f'{COMPLETION}"stop": [', "0", "]}"), "stop[0]"),
    "biases": (CompletionBody, filled(f'{COMPLETION}"logit_bias": {{', lambda i: f'"{i}":""', "}}"), "logit_bias"),
    "unknown fields": (CompletionBody, filled(COMPLETION, lambda i: f'"f{i}":0', "}"), "fields"),
    "messages": (ChatBody, filled(f'{MODEL}"messages": [', "{}", "]}"), "messages[0]"),
    "parts": (ChatBody, filled(f'{MODEL}"messages": [{{"role": "user", "content": [', "{}", "]}]}"), "content[0]"),
    "items": (ResponsesBody, filled('{"model": "m", "input": [', "{}", "]}"), "input[0]"),
    "blocks": (MessagesBody, filled(f'{MODEL}"messages": [{{"role": "user", "content": [', "{}", "]}]}"), "content[0]"),
}  # fmt: skip


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("case", WRONG)
def test_a_body_full_of_faults_is_refused_by_one_of_them(case: str, ignore: bool) -> None:
    body, raw, said = WRONG[case]
    with bounded(), pytest.raises(RequestError) as caught:
        parse_body(raw, body, ignore_unknown=ignore)
    assert said in caught.value.message


def test_long_runs_of_digits_are_cheap() -> None:
    """No number of 199 digits overflows, but each digit could begin one that does."""
    raw = f'{MODEL}"prompt": "{("1" * 199 + " ") * (SIZE // 200)}"}}'.encode()
    with bounded():
        for _ in range(4):
            parse_body(raw, CompletionBody)


def test_an_unknown_name_is_compared_with_the_known_ones_up_to_its_64th_character() -> None:
    raw = f'{COMPLETION}"{"a" * SIZE}": 0}}'.encode()
    with bounded(), pytest.raises(RequestError, match="unknown field"):
        parse_body(raw, CompletionBody)


def test_every_list_of_a_body_stops_at_its_first_fault() -> None:
    def lists(schema: Any) -> list[dict[str, Any]]:
        parts = (
            schema.values()
            if isinstance(schema, dict)
            else schema
            if isinstance(schema, list | tuple)
            else ()
        )
        found = [found for part in parts for found in lists(part)]
        return [*found, schema] if isinstance(schema, dict) and schema.get("type") == "list" else found

    for body in BODIES.values():
        found = lists(body.__pydantic_core_schema__)
        assert found and all(schema.get("fail_fast") for schema in found), body


def tool(i: int) -> dict[str, Any]:
    return {"type": "function", "function": {"name": f"f{i}"}}


def test_many_tools() -> None:
    """A choice of all of them, and a grammar for all of them."""
    names = [tool(i) for i in range(10_000)]
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": names[::-1]}}
    with bounded():
        body, _ = parse_body(
            json.dumps({"model": "m", "messages": HI, "tools": names, "tool_choice": allowed}).encode(),
            ChatBody,
        )
    body = body.model_copy(update={"tools": (body.tools or [])[:2000], "tool_choice": "required"})
    tokenizer = load_tokenizer(ROOT / "models" / "orthrus-tiny")
    with bounded():
        grammar = answer_grammar(body, tokenizer, thinks=False, inside_reasoning=False)
    assert grammar is not None and "call_1999" in grammar


def test_many_tools_with_any_arguments() -> None:
    """The grammar of one is forty times as long as the tool."""
    tools = [
        {"type": "function", "function": {"name": f"f{i}", "parameters": {"additionalProperties": True}}}
        for i in range(200)
    ]
    body = ChatBody.model_validate({"model": "m", "messages": HI, "tools": tools, "tool_choice": "required"})
    tokenizer = load_tokenizer(ROOT / "models" / "orthrus-tiny")
    with pytest.raises(RequestError, match="offer fewer") as caught:
        answer_grammar(body, tokenizer, thinks=False, inside_reasoning=False)
    assert caught.value.param == "tools"


def test_many_lists_of_tools() -> None:
    lists = [
        {"type": "additional_tools", "tools": [{"type": "function", "name": f"f{i}"}]} for i in range(10_000)
    ]
    raw = json.dumps({"model": "m", "input": [*HI, *lists, *lists[:1]]}).encode()
    with bounded():
        offered = parse_body(raw, ResponsesBody)[0].offered()
    assert [tool.name for tool in offered][-2:] == ["f9999", "f0"] and len(offered) == 10_000


def test_many_texts_and_results() -> None:
    blocks = [{"type": "text", "text": "a"}] * 100_000
    raw = json.dumps(
        {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": blocks}]}
    ).encode()
    body, _ = parse_body(raw, MessagesBody)
    results = [{"role": "tool", "content": "x" * 40}] * 40_000
    with bounded():
        assert len(body.chat().messages[0].text) == 199_999
        [message] = spelled_out(results, [])
    assert message["content"].count("</tool_response>") == 40_000
