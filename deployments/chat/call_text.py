"""Tool calls in a model's text, in the format of Qwen3's template: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

Models get this format wrong in many ways. Text that can only be meant as a call is read as one, and its arguments are passed on
as they were written. All else stays text.
"""

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from orthrus.deployments.chat.json_object import ObjectText, elements, members

TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
# Text that is held back is read again with each new piece, so its length is bounded.
_MOST_BLANKS = 999
_BLANKS = rf"\s{{0,{_MOST_BLANKS}}}"
# A name without escapes. A call in any other form is read when it is complete.
_NAME = r'"([^"\\\x00-\x1f]{1,999})"'
_HEAD = (r"\{", '"name"', ":", _NAME, ",", '"(?:arguments|parameters)"', ":", r"(?=\{)")
_CALL_HEAD = re.compile(_BLANKS + _BLANKS.join(_HEAD))
_FIRST = re.compile(rf"{_BLANKS}(\S?)")


@dataclass(frozen=True)
class ToolCallDelta:
    """The next piece of tool call number `index`. `id` and `name` come with the first piece only.

    at: how many characters of the text that comes with it stand before it.
    """

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None
    at: int = 0


class TrimmedText:
    """Drops blanks next to markers at either end of a text. Blanks between two pieces of text are kept."""

    def __init__(self, *, after_marker: bool = False) -> None:
        self._blanks = ""
        self._at_marker = after_marker
        self._begun = False

    def add(self, text: str) -> str:
        """Add a piece of text. Returns what is certain now: blanks at the end are held back, because a marker may follow."""
        body = text.rstrip()
        if not body:
            self._blanks += text
            return ""
        certain = self._blanks + body
        if self._at_marker and not self._begun:
            certain = certain.lstrip()
        self._blanks, self._at_marker, self._begun = text[len(body) :], False, True
        return certain

    def mark(self) -> None:
        """Note that there is a marker at this point of the text."""
        self._at_marker = True

    def end(self) -> str:
        """End the text. Returns the blanks that were held back, unless there is a marker next to them."""
        blanks, self._blanks = self._blanks, ""
        return "" if self._at_marker else blanks


def cut(text: str, markers: Sequence[str], final: bool) -> tuple[str, str | None, str]:
    """Cut `text` at the first of `markers`. Returns the text before it, the marker (None if there is none), and the rest.

    Without a marker, the rest is an end of `text` that may still become one, unless `final`. A marker begins with `<`, and has no
    other `<`.
    """
    last = text.rfind("<")
    if last < 0:
        return text, None, ""
    begins = {text.find(marker): marker for marker in markers}
    begins.pop(-1, None)
    if begins:
        at = min(begins)
        return text[:at], begins[at], text[at + len(begins[at]) :]
    if not final and any(marker.startswith(text[last:]) for marker in markers):
        return text[:last], None, text[last:]
    return text, None, ""


def _first(text: str) -> str:
    """The first character that is no blank, "" if there is none."""
    found = _FIRST.match(text)
    return found[1] if found else ""


class _State(Enum):
    TEXT = "outside of calls"
    CALL = "before a call's arguments"
    ARGUMENTS = "inside a call's arguments"
    TAIL = "after the arguments, inside the call's object"
    BLOCK = "between the calls of a block, or before its end"


class CallSplitter:
    """Separates the calls of a text from the rest. The result does not depend on how the text is cut into pieces.

    one_call: calls after the first are dropped. until: a marker that ends the text, if it is outside of calls; with it, the text
    also ends at the marker of a call that turns out to be none, if no call came before. after_marker: whether the text follows
    a marker.
    """

    def __init__(
        self, *, one_call: bool = False, until: str | None = None, after_marker: bool = False
    ) -> None:
        self.calls = 0
        self.ended = False
        self.came_to_until = False
        # Whether the text ended inside a call's object.
        self.cut_short = False
        # Text that is not decided yet. Once `ended`, the text after the end.
        self.held = ""
        self._one_call = one_call
        self._until = until
        self._markers = [TOOL_CALL] if until is None else [TOOL_CALL, until]
        self._text = TrimmedText(after_marker=after_marker)
        self._state = _State.TEXT
        # The marker before the object that is being read, if it is the first of its block.
        self._marker = ""
        self._object = ObjectText()
        self._scanned = 0
        self._out: list[str] = []
        self._pieces: dict[int, ToolCallDelta] = {}

    def push(self, text: str, final: bool = False) -> tuple[str, tuple[ToolCallDelta, ...]]:
        """Add a piece of text. Returns the text, and at most one piece of each call, that are certain now; with `final`, all."""
        self.held += text
        self._out, self._pieces = [], {}
        before = None
        while self._state is not before and not self.ended:
            before = self._state
            match before:
                case _State.TEXT:
                    self._read_text(final)
                case _State.CALL:
                    self._read_call(final)
                case _State.ARGUMENTS:
                    self._read_arguments(final)
                case _State.TAIL:
                    self._read_tail(final)
                case _State.BLOCK:
                    self._read_block(final)
        if final and not self.ended:
            self._out.append(self._text.end())
        return "".join(self._out), tuple(self._pieces.values())

    def _read_text(self, final: bool) -> None:
        piece, marker, self.held = cut(self.held, self._markers, final)
        self._out.append(self._text.add(piece))
        if marker == TOOL_CALL:
            self._begin(marker)
        elif marker is not None:
            self.ended = self.came_to_until = True

    def _no_call(self, text: str) -> None:
        """`text` began like a call but is not one, so it is text."""
        self._out.append(self._text.add(text))
        self._state = _State.TEXT
        self.ended = self._until is not None and not self.calls

    def _begin(self, marker: str) -> None:
        self._state, self._marker = _State.CALL, marker
        self._object, self._scanned = ObjectText(), 0

    def _read_call(self, final: bool) -> None:
        """Read a call up to its arguments. A call that begins in another way is read when it is complete."""
        if head := _CALL_HEAD.match(self.held):
            self.held = self.held[head.end() :]
            self._open(head[1])
            self._state, self._object = _State.ARGUMENTS, ObjectText()
            return
        first = _first(self.held)
        if (first and first not in "{[") or (not first and len(self.held) > _MOST_BLANKS):
            self._no_call(self._marker)
        elif (body := self._scan(final)) is not None:
            try:
                calls = _read_calls(body)
            except (ValueError, RecursionError):
                self._no_call(self._marker + body)
                return
            for name, arguments in calls:
                self._open(name)
                self._add(arguments)
            self._state = _State.BLOCK

    def _scan(self, final: bool) -> str | None:
        """Take the object's text off what is held. None while the object is not complete."""
        self._scanned += self._object.push(self.held[self._scanned :])[1]
        if not self._object.over:
            if not final:
                return None
            self.cut_short = True
        body, self.held = self.held[: self._scanned], self.held[self._scanned :]
        self._scanned = 0
        return body

    def _read_arguments(self, final: bool) -> None:
        """Pass the arguments on as they come."""
        piece, length = self._object.push(self.held)
        self.held = self.held[length:]
        self._add(piece)
        if final and not self._object.over:
            self.cut_short = True
            self._add(self._object.rest())
        if self._object.over:
            self._state = _State.TAIL if self._object.complete else _State.BLOCK
            # The rest of the call's object is read as an object that is open already.
            self._object, self._scanned = ObjectText(), 0
            self._object.push("{")

    def _read_tail(self, final: bool) -> None:
        """Drop the rest of the call's object: other keys, and the closing bracket."""
        first = _first(self.held)
        if first and first not in ",}":
            self._state = _State.BLOCK
        elif (body := self._scan(final)) is not None:
            if not self._object.complete:
                self._out.append(self._text.add(body))
            self._state = _State.BLOCK

    def _read_block(self, final: bool) -> None:
        if not _first(self.held) and len(self.held) > _MOST_BLANKS:
            self._state = _State.TEXT
            return
        body = self.held.lstrip()
        if body.startswith(END_TOOL_CALL):
            self.held = body.removeprefix(END_TOOL_CALL)
            self._state = _State.TEXT
        elif END_TOOL_CALL.startswith(body):
            if final:
                self.held = ""
        elif body.startswith("{"):
            self._begin("")
        else:
            self._state = _State.TEXT

    def _open(self, name: str) -> None:
        self._text.mark()
        self.calls += 1
        index = self.calls - 1
        if not (self._one_call and index):
            at = sum(map(len, self._out))
            self._pieces[index] = ToolCallDelta(index, "", f"call_{uuid.uuid4().hex[:24]}", name, at)

    def _add(self, arguments: str) -> None:
        """More of the last call's arguments."""
        index = self.calls - 1
        if arguments and not (self._one_call and index):
            begun = self._pieces.get(index)
            self._pieces[index] = (
                replace(begun, arguments=begun.arguments + arguments)
                if begun
                else ToolCallDelta(index, arguments)
            )


def _read_calls(text: str) -> list[tuple[str, str]]:
    """Names and arguments of the calls that a JSON object or array is. Raises ValueError, RecursionError."""
    objects = elements(text) if text.lstrip().startswith("[") else [text]
    return [_call_in(each) for each in objects]


def _call_in(text: str) -> tuple[str, str]:
    """Name and arguments of the call that a JSON object is. Raises ValueError, RecursionError."""
    found: dict[str, tuple[Any, str]] = members(text)
    name, _ = found.get("name", (None, ""))
    if not isinstance(name, str) or not name:
        raise ValueError("a call has a name")
    name.encode()  # Fails on half a surrogate pair, which is valid JSON and no text.
    value, written = found.get("arguments") or found.get("parameters") or (None, "")
    if value is None:
        return name, "{}"
    if isinstance(value, str):
        written = value.strip()
        written.encode()
        members(written)
    elif not isinstance(value, dict):
        raise ValueError("arguments are an object")
    arguments, length = ObjectText().push(written)
    if length < len(written):
        raise ValueError("arguments are one object")
    return name, arguments
