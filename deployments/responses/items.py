"""The items of OpenAI's Responses API that an input may have, and the chat messages that they stand for."""

import base64
import binascii
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from orthrus.deployments.bodies.strict_model import StrictModel
from orthrus.deployments.chat.messages import read_arguments
from orthrus.deployments.responses.tools import ResponsesTool, custom_arguments, qualified

_OWN = "orthrus:"
"""The beginning of each `encrypted_content` that this server has made."""
_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
    "reasoning": "rs",
    "additional_tools": "at",
}
"""The beginnings of the ids of items, by type."""


class _Item(StrictModel):
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class TextPart(StrictModel):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None


class RefusalPart(StrictModel):
    type: Literal["refusal"]
    refusal: str


Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


class MessageItem(_Item):
    """A turn of either side; the type may be left out."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part]
    phase: str | None = None


def _is_an_object(arguments: str) -> str:
    read_arguments(arguments)
    return arguments


class FunctionCallItem(_Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    namespace: str | None = None
    arguments: Annotated[str, AfterValidator(_is_an_object)]
    caller: dict[str, Any] | None = None


class _CallOutput(_Item):
    type: str
    call_id: str
    output: str | list[Part]
    name: str | None = None
    namespace: str | None = None
    caller: dict[str, Any] | None = None


class FunctionCallOutputItem(_CallOutput):
    type: Literal["function_call_output"]


class CustomToolCallItem(_Item):
    type: Literal["custom_tool_call"]
    call_id: str
    name: str
    namespace: str | None = None
    input: str
    caller: dict[str, Any] | None = None

    @property
    def arguments(self) -> str:
        """The same as the arguments of a function."""
        return custom_arguments(self.input)


class CustomToolCallOutputItem(_CallOutput):
    type: Literal["custom_tool_call_output"]


class SummaryPart(StrictModel):
    type: Literal["summary_text"]
    text: str


class ReasoningPart(StrictModel):
    type: Literal["reasoning_text", "text"]
    text: str


class ReasoningItem(_Item):
    """What the model thought. encrypted_content: the same in a form that clients hand on unread (`seal`)."""

    type: Literal["reasoning"]
    summary: list[SummaryPart] = Field(default_factory=list)
    content: list[ReasoningPart] | None = None
    encrypted_content: str | None = None

    @property
    def text(self) -> str:
        """The thoughts as they were, as far as the client has kept them."""
        if self.content:
            return "".join(part.text for part in self.content)
        return unseal(self.encrypted_content) or "\n".join(part.text for part in self.summary)


class AdditionalToolsItem(_Item):
    """Tools that are offered from here on, besides those of the body's `tools`: Codex sends all of its tools this way."""

    type: Literal["additional_tools"]
    role: Literal["developer", "system", "user"] | None = None
    tools: list[ResponsesTool]


def _type(item: Any) -> Any:
    return item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutputItem, Tag("function_call_output")]
    | Annotated[CustomToolCallItem, Tag("custom_tool_call")]
    | Annotated[CustomToolCallOutputItem, Tag("custom_tool_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[AdditionalToolsItem, Tag("additional_tools")],
    Discriminator(_type),
]


def seal(reasoning: str) -> str:
    """Reasoning as `encrypted_content`. It is only encoded: the client has the text already, so there is nothing to hide."""
    return _OWN + base64.b64encode(reasoning.encode(errors="replace")).decode()


def unseal(content: str | None) -> str:
    """The reasoning in `encrypted_content`, "" if another server has made it."""
    if content is None or not content.startswith(_OWN):
        return ""
    try:
        return base64.b64decode(content.removeprefix(_OWN), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""


def chat_messages(items: Sequence[Item]) -> list[dict[str, Any]]:
    """The items as chat messages. Consecutive reasoning, text and calls of the assistant are one message."""
    messages: list[dict[str, Any]] = []
    turn: dict[str, Any] = {}

    def assistant(key: str) -> dict[str, Any]:
        """The assistant's message that is under way, or a new one if `key` would come too late in it."""
        nonlocal turn
        too_late = {"reasoning_content": ("content", "tool_calls"), "content": ("content", "tool_calls")}
        if not turn or any(turn.get(name) for name in too_late.get(key, ())):
            turn = {"role": "assistant", "content": ""}
            messages.append(turn)
        return turn

    for item in items:
        match item:
            case ReasoningItem():
                message = assistant("reasoning_content")
                before = message.get("reasoning_content")
                message["reasoning_content"] = f"{before}\n{item.text}" if before else item.text
            case MessageItem(role="assistant"):
                assistant("content")["content"] = text_of(item.content)
            case FunctionCallItem() | CustomToolCallItem():
                function = {"name": qualified(item.name, item.namespace), "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                assistant("tool_calls").setdefault("tool_calls", []).append(call)
            case FunctionCallOutputItem() | CustomToolCallOutputItem():
                turn = {}
                messages.append(
                    {"role": "tool", "tool_call_id": item.call_id, "content": text_of(item.output)}
                )
            case MessageItem():
                turn = {}
                messages.append({"role": item.role, "content": text_of(item.content)})
    return messages


def text_of(content: str | list[Part]) -> str:
    """The text of a message or of a call's output."""
    if isinstance(content, str):
        return content
    return "".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)


def listed(item: Item) -> dict[str, Any]:
    """An input item as the API lists it: with an id, and with its text in parts."""
    given = item.model_dump(exclude_none=True, mode="json")
    given.setdefault("id", f"{_PREFIXES[item.type]}_{uuid.uuid4().hex}")
    given.setdefault("status", "completed")
    if isinstance(item, MessageItem):
        mine = item.role == "assistant"
        part: dict[str, Any] = {
            "type": "output_text" if mine else "input_text",
            "text": text_of(item.content),
        }
        given["content"] = [{**part, "annotations": []} if mine else part]
    return given
