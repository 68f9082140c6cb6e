"""What every client's script shares. Standard library only: each script runs in its client's own environment."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

URL = os.environ["ORTHRUS_URL"]
"""The server's address, without `/v1`."""
BASE = f"{URL}/v1"
MODEL = os.environ["ORTHRUS_MODEL"]
PROMPT = "def add(a, b):\n"
QUESTION = "What is the weather in Paris?"
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather of a city.", "parameters": PARAMETERS},
}


@contextmanager
def step(name: str) -> Iterator[None]:
    """One thing that the client does. What goes wrong in it is raised, after its name."""
    print(f"{name} ...", flush=True)
    yield


def check_weather(arguments: str | dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call of WEATHER: an object that its schema allows."""
    given = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert set(given) == {"city", "days"}, given
    assert isinstance(given["city"], str) and len(given["city"]) <= 20, given
    assert isinstance(given["days"], int), given
    return given


def refused(kind: type[Exception], work: Callable[[], object]) -> Any:
    """The error of this kind that `work` ends with."""
    try:
        work()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}: it was taken")
