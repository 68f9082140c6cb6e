"""Bodies of requests that are valid except for what a test puts in."""

import json
from typing import Any

from tests.serving import MODEL


def completion(**fields: Any) -> bytes:
    return json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 2, **fields}).encode()


def chat(**fields: Any) -> bytes:
    messages = [{"role": "user", "content": "x"}]
    return json.dumps({"model": MODEL, "messages": messages, "max_tokens": 2, **fields}).encode()


def with_raw(raw: str) -> bytes:
    """A completion body with a field whose JSON is given as text."""
    return completion(it=0).replace(b'"it": 0', raw.encode())


def schema(given: Any, **fields: Any) -> bytes:
    wanted = {"type": "json_schema", "json_schema": {"schema": given}}
    return chat(response_format=wanted, **fields)


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth
