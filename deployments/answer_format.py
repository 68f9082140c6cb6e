"""`response_format`, as OpenAI's API has it."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from orthrus.errors import RequestError


class JSONSchemaFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)

    name: str | None = None
    description: str | None = None
    definition: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class AnswerFormat(BaseModel):
    """`response_format`: free text, any JSON object, or JSON under a schema."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_goes_with_its_type(self) -> "AnswerFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise RequestError(
                "response_format has json_schema if, and only if, its type is json_schema", "response_format"
            )
        return self
