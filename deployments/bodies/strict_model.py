"""What all models of request bodies have in common."""

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class StrictModel(BaseModel):
    """Unknown fields are refused, and types are not converted: "0.5" is not 0.5. A null field counts as absent."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, data: Any) -> Any:
        """Drop null fields, known or not: clients that serialise their own models send null for what they leave out."""
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None}


class ModelBody(StrictModel):
    """A body that may name the model. Most subclasses require the name."""

    model: str | None = None
