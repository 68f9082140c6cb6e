"""Turns pydantic's errors about a config into lines that say where the fault is and what to change."""

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from orthrus.yaml_file import Keys, YamlFile, reading, spell_path


def describe_faults(
    error: ValidationError, model: type[BaseModel], where: Keys = (), file: YamlFile | None = None
) -> str:
    """A line for each fault that validation by `model` found: its path, beginning with `where`, and what to change.

    file: the validated file; each line then begins with file, line and column.
    """
    return "\n".join(_describe(dict(fault), model, where, file) for fault in error.errors(include_url=False))


def _describe(fault: Mapping[str, Any], model: Any, where: Keys, file: YamlFile | None) -> str:
    keys = (*where, *fault["loc"])
    path = spell_path(keys)
    place = f"{file.place(keys)}: " if file is not None else ""
    if fault["type"] != "extra_forbidden":
        said = fault["msg"].removeprefix("Value error, ")
        plain = file.plain.get(keys) if file is not None else None
        if fault["type"] == "string_type" and plain is not None:
            said += f": {reading(plain)}"
        # The messages of validators of whole models begin with a path of their own.
        between = "." if keys == where else ": "
        return f"{place}{path}{between if path else ''}{said}"
    *parents, unknown = (part for part in fault["loc"] if isinstance(part, str))
    for part in parents:
        model = _model_of(model.model_fields[part].annotation)
    close = difflib.get_close_matches(unknown, model.model_fields, n=1)
    return f"{place}{path}: unknown key, " + (f"did you mean {close[0]!r}?" if close else "remove it")


def _model_of(annotation: Any) -> Any:
    """The model in an annotation such as `Model | None` or `list[Model]`."""
    return next((part for part in getattr(annotation, "__args__", ()) if part is not type(None)), annotation)
