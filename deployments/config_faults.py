"""What pydantic found wrong with a config, as lines that say where and what to change."""

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError


def describe_faults(error: ValidationError, model: type[BaseModel], where: str = "") -> str:
    """A line for each fault that validation by `model` found: the path from `where` on, and what to do about it."""
    return "\n".join(_describe(dict(fault), model, where) for fault in error.errors(include_url=False))


def _describe(fault: Mapping[str, Any], model: Any, where: str) -> str:
    path = where
    for part in fault["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    if fault["type"] != "extra_forbidden":
        said = fault["msg"].removeprefix("Value error, ")
        # Faults of a combination begin with their own path.
        return f"{path}.{said}" if path == where and path else f"{path}: {said}" if path else said
    *parents, unknown = (part for part in fault["loc"] if isinstance(part, str))
    for part in parents:
        model = _model_of(model.model_fields[part].annotation)
    close = difflib.get_close_matches(unknown, model.model_fields, n=1)
    return f"{path}: unknown key, " + (f"did you mean {close[0]!r}?" if close else "remove it")


def _model_of(annotation: Any) -> Any:
    """The model in an annotation such as `Model | None` or `list[Model]`."""
    return next((part for part in getattr(annotation, "__args__", ()) if part is not type(None)), annotation)
