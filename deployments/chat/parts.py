"""A chat answer as the parts that follow one another in it: reasoning, text, tool calls.

OpenAI's Responses API and Anthropic's Messages API both have an answer as a list of such parts, and stream each from its start
to its end before the next one begins.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from orthrus.deployments.chat.call_text import ToolCallDelta
from orthrus.deployments.chat.output import ChatDelta

Kind = Literal["reasoning", "text", "call"]
Step = Literal["start", "more", "end"]


@dataclass
class Part:
    """Part number `index` of an answer."""

    index: int
    kind: Kind
    text: str = ""
    """Its text so far. For a call, the JSON of its arguments."""
    id: str = ""
    """The id of a call."""
    name: str = ""
    """The name of the function that a call calls."""


class PartStream:
    """Puts the deltas of one answer in order. `parts` are those that have begun, the last of them perhaps still open."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self._open: Part | None = None
        self._call = -1

    def push(self, delta: ChatDelta) -> Iterator[tuple[Step, Part, str]]:
        """Add a delta. Yields what happens, to which part, and for "more" the text that is added to it."""
        if delta.reasoning:
            yield from self._add("reasoning", delta.reasoning)
        told = 0
        for call in delta.tool_calls:
            if text := delta.content[told : call.at]:
                yield from self._add("text", text)
            told = call.at
            yield from self._add_call(call)
        if text := delta.content[told:]:
            yield from self._add("text", text)

    def push_empty_text(self) -> Iterator[tuple[Step, Part, str]]:
        """Begin an empty text. Yields as `push` does."""
        yield from self._begin(Part(len(self.parts), "text"))

    def finish(self) -> Iterator[tuple[Step, Part, str]]:
        """End the open part. Call this once, when the answer is over. Yields as `push` does."""
        if self._open is not None:
            yield "end", self._open, ""
        self._open = None

    def _add(self, kind: Kind, text: str) -> Iterator[tuple[Step, Part, str]]:
        if self._open is None or self._open.kind != kind:
            yield from self._begin(Part(len(self.parts), kind))
        yield self._more(text)

    def _add_call(self, call: ToolCallDelta) -> Iterator[tuple[Step, Part, str]]:
        if call.index != self._call:
            self._call = call.index
            yield from self._begin(Part(len(self.parts), "call", id=call.id or "", name=call.name or ""))
        if call.arguments:
            yield self._more(call.arguments)

    def _begin(self, part: Part) -> Iterator[tuple[Step, Part, str]]:
        yield from self.finish()
        self._open = part
        self.parts.append(part)
        yield "start", part, ""

    def _more(self, text: str) -> tuple[Step, Part, str]:
        assert self._open is not None, "a part has begun"
        self._open.text += text
        return "more", self._open, text
