"""Constraints on answers, in the fields of both protocols."""

from typing import Any

import pytest

from orthrus.deployments.bodies.completion_body import CompletionBody
from orthrus.deployments.chat.body import ChatBody
from orthrus.deployments.grpc.format import chat_body
from orthrus.deployments.proto import orthrus_pb2 as pb
from orthrus.errors import RequestError
from orthrus.text.grammar import json_grammar

MESSAGES = [{"role": "user", "content": "hi"}]


def asked(schema: str) -> ChatBody:
    return chat_body(
        pb.ChatRequest(model="m", messages=[pb.ChatMessage(role="user", content="hi")], json_schema=schema)
    )


@pytest.mark.parametrize(
    ("schema", "meant"), [("{}", {}), ("true", True), (' {"type": "null"}', {"type": "null"})]
)
def test_grpc_schemas(schema: str, meant: Any) -> None:
    constraint = asked(schema).constraint
    assert constraint is not None
    assert constraint.lark == json_grammar(meant)
    assert asked("").constraint is None


@pytest.mark.parametrize("schema", ["null", "[]", '"object"', "5", "{", "{}{}", "[" * 5000])
def test_grpc_texts_that_are_no_schema_are_refused(schema: str) -> None:
    with pytest.raises(RequestError, match="json_schema must be") as caught:
        asked(schema)
    assert caught.value.param == "json_schema"


@pytest.mark.parametrize("schema", [{}, True, {"type": "integer"}])
def test_completions_have_a_response_format_too(schema: Any) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    params = CompletionBody.model_validate(
        {"model": "m", "prompt": "x", "response_format": wanted}
    ).sampling()
    assert params.grammar == json_grammar(schema)
    plain = CompletionBody.model_validate(
        {"model": "m", "prompt": "x", "response_format": {"type": "text"}}
    ).sampling()
    assert plain.grammar is None


def test_a_schema_that_cannot_be_followed_is_refused_by_its_field() -> None:
    schema = {"type": "array", "items": {}, "uniqueItems": True}
    for field, value in (
        ("response_format", {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}),
        ("guided_json", schema),
    ):
        constraint = ChatBody.model_validate({"model": "m", "messages": MESSAGES, field: value}).constraint
        assert constraint is not None
        with pytest.raises(RequestError, match=f"{field}: #: uniqueItems") as caught:
            _ = constraint.rule
        assert caught.value.param == field
