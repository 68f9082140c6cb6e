"""The messages of a conversation, as OpenAI's API has them."""

import json
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from orthrus.deployments.bodies.strict_model import StrictModel


class ContentPart(StrictModel):
    """A piece of a message's text. OpenAI's refusals, which an assistant's message may have, are text as well."""

    type: Literal["text", "refusal"]
    text: str = ""
    refusal: str = ""
    prompt_cache_breakpoint: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _has_what_its_type_says(self) -> "ContentPart":
        if self.type not in self.model_fields_set:
            raise ValueError(f"a part of type {self.type} has {self.type}")
        return self


def read_arguments(given: Any) -> Any:
    """A call's arguments, parsed if they are JSON text. Raises ValueError."""
    if not isinstance(given, str):
        return given
    try:
        arguments = json.loads(given, parse_constant=_refuse_constant) if given.strip() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"must be the text of a JSON object, but is not JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise ValueError("must be the text of a JSON object, but is other JSON")
    return arguments


def _refuse_constant(name: str) -> None:
    raise ValueError(f"JSON has no {name}")


class CalledFunction(StrictModel):
    """arguments: clients send JSON text, as the API returned it. It is parsed, because chat templates expect an object."""

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)

    _read = field_validator("arguments", mode="before")(read_arguments)


class MessageToolCall(StrictModel):
    """A call that an earlier answer made."""

    model_config = ConfigDict(extra="allow")

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(StrictModel):
    """One turn. Keys that OpenAI doesn't have go to the chat template as they are."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    reasoning_content: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text + part.refusal for part in self.content or ())

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it: plain text content; "developer" is OpenAI's newer name for "system"."""
        role = "system" if self.role == "developer" else self.role
        return {**self.model_dump(exclude_none=True), "role": role, "content": self.text}
