"""The messages of a conversation, as OpenAI's API has them."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator


class ContentPart(BaseModel):
    """A piece of a message's text. OpenAI's refusals, which an assistant's message may have, are text as well."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "refusal"]
    text: str = ""
    refusal: str = ""
    prompt_cache_breakpoint: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _has_what_its_type_says(self) -> "ContentPart":
        if self.type not in self.model_fields_set:
            raise ValueError(f"a part of type {self.type} has {self.type}")
        return self


class CalledFunction(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    arguments: str


class MessageToolCall(BaseModel):
    """A call that an earlier answer made; its arguments are JSON text, as the API gave them."""

    model_config = ConfigDict(extra="allow", strict=True)

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(BaseModel):
    """One turn. Keys that OpenAI doesn't have go to the chat template as they are."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    reasoning_content: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it: plain text content; "developer" is OpenAI's newer name for "system"."""
        content = self.content
        text = (
            content
            if isinstance(content, str)
            else "".join(part.text + part.refusal for part in content or ())
        )
        role = "system" if self.role == "developer" else self.role
        return {**self.model_dump(exclude_none=True), "role": role, "content": text}
