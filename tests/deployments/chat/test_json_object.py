"""JSON objects as they stream: their end is found, repeated keys are left out, and all else is passed on unchanged."""

import json
import random
from typing import Any

import pytest

from orthrus.deployments.chat.json_object import ObjectText, elements, members

KEYS = ["a", "b", "", '"', "\\", "}", "é", "\ud83c\udf27", "</tool_call>"]


def written(rng: random.Random, depth: int = 0) -> str:
    """The text of a random value in which keys come twice. At depth 0 it is an object."""
    blank = rng.choice(["", "", " ", "\n  "])
    kind = "object" if depth == 0 else rng.choice(["object", "array", "string", "number", "true", "null"])
    if depth > 3 and kind in ("object", "array"):
        kind = "null"
    inner = [written(rng, depth + 1) for _ in range(rng.randrange(5))] if kind in ("object", "array") else []
    if kind == "object":
        keys = [json.dumps(rng.choice(KEYS), ensure_ascii=rng.random() < 0.5) for _ in inner]
        pairs = [f"{key}{blank}:{value}" for key, value in zip(keys, inner, strict=True)]
        return f"{{{blank}{f',{blank}'.join(pairs)}{blank}}}"
    if kind == "array":
        return f"[{f'{blank},'.join(inner)}{blank}]"
    if kind == "string":
        return json.dumps("".join(rng.choices(KEYS, k=2)), ensure_ascii=rng.random() < 0.5)
    return rng.choice(["1", "-2.50e3", "12345678901234567890"]) if kind == "number" else kind


def first_counts(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return dict(reversed(pairs))


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len({key for key, _ in pairs}) == len(pairs)
    return dict(pairs)


def test_random_objects_come_out_without_keys_that_come_twice() -> None:
    rng = random.Random(0)
    changed = 0
    for _ in range(500):
        text = written(rng)
        stream, out, rest, size = ObjectText(), "", f"{text} and more", rng.choice([1, 2, 5, 1000])
        while not stream.over:
            piece, taken = stream.push(rest[:size])
            out, rest = out + piece, rest[taken:]
        assert stream.complete and rest == " and more"
        value = json.loads(text, object_pairs_hook=first_counts)
        assert json.loads(out, object_pairs_hook=no_key_twice) == value
        changed += out != text
        if out == text:
            assert {key: json.loads(part) for key, (_, part) in members(text).items()} == value
    assert 100 < changed < 400


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a"}', '{"a": 1,}', "{a: 1}", '{"a": 1 "b": 2}', "[" * 10**5]
)
def test_members_of_something_else_than_an_object_are_an_error(text: str) -> None:
    with pytest.raises((ValueError, RecursionError)):
        members(text)


def test_elements_are_texts() -> None:
    assert elements(' [ {"a": 1.0} , [2] ] ') == ['{"a": 1.0}', "[2]"]
    for text in ("", "[", "[]", "[1,]", "{}", "[1 2]"):
        with pytest.raises(ValueError, match=r"missing|Expecting"):
            elements(text)
