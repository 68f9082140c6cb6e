"""Tool calls in a model's text, in the format of Qwen3's template: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

Models get it wrong in many ways. What can only be meant as a call is read as one, with the arguments as they were written; all
else stays text.
"""

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from orthrus.deployments.chat.json_object import ObjectText, elements, members

TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
# What is held back is looked at again with each piece, so it is bounded.
_MOST_BLANKS = 999
_BLANKS = rf"\s{{0,{_MOST_BLANKS}}}"
# Plain names only: a call that is put otherwise is read when it is complete.
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
    """Text without the blanks beside its markers, except between two pieces of text."""

    def __init__(self, *, after_marker: bool = False) -> None:
        self._blanks = ""
        self._at_marker = after_marker
        self._begun = False

    def add(self, text: str) -> str:
        """What is certain with `text`: blanks at its end are not, for a marker may follow."""
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
        """A marker stands here."""
        self._at_marker = True

    def end(self) -> str:
        """What was held back, where no marker follows."""
        blanks, self._blanks = self._blanks, ""
        return "" if self._at_marker else blanks


def cut(text: str, markers: Sequence[str], final: bool) -> tuple[str, str | None, str]:
    """`text` up to the first of `markers`, that marker, and the rest. What may yet become a marker is rest, unless `final`.

    Markers begin with `<`, and have no other.
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
    """Takes calls out of a text. What comes out does not depend on how the text was cut into pieces.

    one_call: calls after the first are dropped. until: a marker that ends the text, where it stands outside of calls; then a
    text that begins with the marker of a call, but with no call, ends there too.
    """

    def __init__(
        self, *, one_call: bool = False, until: str | None = None, after_marker: bool = False
    ) -> None:
        self.calls = 0
        self.ended = False
        self.came_to_until = False
        # Whether the text's end has come inside a call's object.
        self.cut_short = False
        # What is not decided yet, and once `ended`, what follows.
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
        """The text and the pieces of calls, one at most of each, that are certain with `text`; all of them if it is the last."""
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
        """`text` began as a call and is none."""
        self._out.append(self._text.add(text))
        self._state = _State.TEXT
        self.ended = self._until is not None and not self.calls

    def _begin(self, marker: str) -> None:
        self._state, self._marker = _State.CALL, marker
        self._object, self._scanned = ObjectText(), 0

    def _read_call(self, final: bool) -> None:
        """Wait for the call's name and arguments; what is put otherwise is read when it is complete."""
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
        """Take the held object's text off, None while it goes on."""
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
            # What follows is read as an object that has been opened.
            self._object, self._scanned = ObjectText(), 0
            self._object.push("{")

    def _read_tail(self, final: bool) -> None:
        """Leave out the call's closing bracket, and other keys before it."""
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
