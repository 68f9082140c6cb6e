"""What all models of request bodies have in common."""

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class StrictModel(BaseModel):
    """Unknown fields are refused, and "0.5" is not 0.5. A field that is null is as good as not given."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, data: Any) -> Any:
        """Clients that dump their own models send null for what they leave out, fields that we lack included."""
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None}


class ModelBody(StrictModel):
    """A body that names the model which it asks for. Most bodies have to."""

    model: str | None = None
