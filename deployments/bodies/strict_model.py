"""What all models of request bodies have in common."""

from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema

_MOST_UNKNOWN = 100
"""Unknown fields that one object may have. More are refused even where unknown fields are ignored."""


def _stop_lists_at_first_fault(schema: Any) -> None:
    """Set `fail_fast` on each list in a schema of pydantic's, in place."""
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        for part in schema.values():
            _stop_lists_at_first_fault(part)
    elif isinstance(schema, list | tuple):
        for part in schema:
            _stop_lists_at_first_fault(part)


class StrictModel(BaseModel):
    """Unknown fields are refused, and types are not converted: "0.5" is not 0.5. A null field counts as absent.

    Each list reports its first wrong item only. A body of 4 MiB has room for millions of wrong items, and reports of all of
    them would take a minute and gigabytes.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _stop_lists_at_first_fault(schema)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, data: Any) -> Any:
        """Drop null fields, known or not: clients that serialise their own models send null for what they leave out."""
        if not isinstance(data, dict):
            return data
        given = {key: value for key, value in data.items() if value is not None}
        most = len(cls.model_fields) + _MOST_UNKNOWN
        if len(given) > most and cls.model_config.get("extra") != "allow":
            raise ValueError(f"an object may have {most} fields here, and has {len(given)}")
        return given


class ModelBody(StrictModel):
    """A body that may name the model. Most subclasses require the name."""

    model: str | None = None
