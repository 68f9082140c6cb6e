"""Turns pydantic's errors about a request body into a RequestError that says what to change."""

import difflib
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ValidationError

from orthrus.deployments.bodies.unsupported_fields import UNSUPPORTED
from orthrus.errors import RequestError

# pydantic's paths name the branch of a union ("str", "list[ContentPart]", "NamedToolChoice"), which is no field of the body.
_BRANCH = re.compile(r".*\[|(str|int|float|bool|dict|none)$|[A-Z]")
_LONGEST_NAME = 64
"""Characters of an unknown name that are compared with the known ones. The client may send millions."""


def describe(error: ValidationError, body: type[BaseModel] | None = None) -> RequestError:
    """One of the errors, with the path of its field ("messages[0].content"). body: its fields are suggested for unknown ones."""
    # Every branch of a union has an error. The one that got furthest into the value is what the caller meant.
    first = max(error.errors(), key=lambda complaint: len(complaint["loc"]))
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, RequestError):
        return cause
    if first["type"] == "extra_forbidden":
        return _unknown(_unknown_path(first["loc"]), str(first["loc"][-1]), body)
    path = field_path(first["loc"])
    match first["type"]:
        case "model_type" | "dict_type" if not path:
            return RequestError("the body must be a JSON object")
        case "union_tag_invalid":
            context = first["ctx"]
            said = f"type '{context['tag']}' is not supported here: send {context['expected_tags']}"
        case _:
            said = first["msg"].removeprefix("Value error, ")
    return RequestError(f"{path}: {said}" if path else said, path or None)


def field_path(loc: Sequence[int | str]) -> str:
    """Where in the body a complaint is: ("messages", 0, "content", "str") is "messages[0].content"."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not _BRANCH.match(part):
            path += f".{part}" if path else part
    return path


def unknown_fields(error: ValidationError) -> list[str] | None:
    """The paths of the fields that are unknown, None if anything else is wrong as well."""
    complaints = error.errors(include_url=False, include_context=False, include_input=False)
    if any(complaint["type"] != "extra_forbidden" for complaint in complaints):
        return None
    return [_unknown_path(complaint["loc"]) for complaint in complaints]


def _unknown_path(loc: Sequence[int | str]) -> str:
    """Where an unknown field is. Its own name is the client's, and may look like that of a branch."""
    *above, name = loc
    return f"{field_path(above)}.{name}".removeprefix(".")


def _unknown(path: str, name: str, body: type[BaseModel] | None) -> RequestError:
    if advice := UNSUPPORTED.get(path):
        return RequestError(f"{path} is not supported: {advice}", path)
    known = _names(body) if body is not None else ((), ())
    top, nested = known
    close = difflib.get_close_matches(name[:_LONGEST_NAME], top if path == name else nested, 1, cutoff=0.7)
    meant = f"did you mean {close[0]!r}?" if close else "remove it or correct its name"
    return RequestError(f"unknown field {path!r}: {meant}", path)


@lru_cache(maxsize=32)
def _names(body: type[BaseModel]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of a body's own fields, and of all fields within them."""
    schema = body.model_json_schema()
    return tuple(schema.get("properties", ())), tuple(
        {name: None for part in _objects(schema.get("$defs", {})) for name in part}
    )


def _objects(definitions: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for definition in definitions.values():
        yield definition.get("properties", {})
