"""A chat answer's text taken apart while it streams: reasoning, content, and tool calls in Qwen3's format.

Qwen3 writes `<think>...</think>` first, if it thinks, and calls as `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.
What comes out does not depend on how the text was cut into pieces; text that may still become a marker is held back.
"""

import json
import re
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import accumulate

THINK, END_THINK = "<think>", "</think>"
TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
# Plain names only: one with escapes is read when the call is complete.
_CALL_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"arguments"\s*:\s*(?=\{)')


@dataclass(frozen=True)
class ToolCallDelta:
    """The next piece of tool call number `index`. `id` and `name` come with the first piece only."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class ChatDelta:
    """What one more piece of text adds to the message."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.tool_calls)


def joined(deltas: Iterable[ChatDelta]) -> ChatDelta:
    """All of a message: texts joined, the pieces of each tool call put together."""
    content, reasoning = "", ""
    calls: list[ToolCallDelta] = []
    for delta in deltas:
        content += delta.content
        reasoning += delta.reasoning
        for call in delta.tool_calls:
            if call.index == len(calls):
                calls.append(call)
            else:
                whole = calls[call.index]
                calls[call.index] = replace(whole, arguments=whole.arguments + call.arguments)
    return ChatDelta(content, reasoning, tuple(calls))


class _State(Enum):
    START = "before anything but whitespace"
    REASONING = "inside <think>"
    CONTENT = "text"
    CALL = "inside <tool_call>, its arguments not reached"
    ARGUMENTS = "inside a call's arguments"
    CALL_END = "after a call's arguments"
    OVER = "after the only call that is wanted"


class ChatSplitter:
    """Splits one choice's text.

    thinks: the model may open with `<think>`. calls: `<tool_call>` is a call, not text. one_call: what follows the first is
    dropped. inside_reasoning: the prompt has ended with `<think>` already.
    """

    def __init__(
        self,
        *,
        thinks: bool = False,
        calls: bool = False,
        one_call: bool = False,
        inside_reasoning: bool = False,
    ) -> None:
        self._calls = calls
        self._after_call = _State.OVER if one_call else _State.CONTENT
        self._state = _State.START if thinks else _State.CONTENT
        self._held = ""
        self._strip = False
        if inside_reasoning:
            self._enter(_State.REASONING)
        # Of the call under way: its number, and how deep in its arguments' brackets and strings the scan is.
        self._call = -1
        self._depth = 0
        self._in_string = False
        self._escaped = False

    @property
    def called(self) -> bool:
        """Whether the answer has a tool call."""
        return self._call >= 0

    def _enter(self, state: _State, strip: bool = True) -> None:
        """strip: whitespace right after the marker is no part of what follows."""
        self._state, self._strip = state, strip

    def push(self, text: str, final: bool = False) -> ChatDelta:
        """The parts that are certain after `text`; with `final`, the last, all of what was held back."""
        self._held += text
        content: list[str] = []
        reasoning: list[str] = []
        calls: list[ToolCallDelta] = []
        while True:
            before = (self._state, self._held)
            match self._state:
                case _State.START:
                    self._start(final)
                case _State.REASONING:
                    piece, found = self._until(END_THINK, final)
                    reasoning.append(piece)
                    if found:
                        self._enter(_State.CONTENT)
                case _State.CONTENT:
                    piece, found = self._until(TOOL_CALL if self._calls else None, final)
                    content.append(piece)
                    if found:
                        self._enter(_State.CALL, strip=False)
                case _State.CALL:
                    self._call_head(content, calls, final)
                case _State.ARGUMENTS:
                    if piece := self._arguments():
                        calls.append(ToolCallDelta(self._call, piece))
                case _State.CALL_END:
                    _, found = self._until(END_TOOL_CALL, final)
                    if found:
                        self._enter(self._after_call)
                case _State.OVER:
                    self._held = ""
            if (self._state, self._held) == before:
                break
        return ChatDelta("".join(content), "".join(reasoning), tuple(calls))

    def reasoning_tokens(self, pieces: Sequence[str]) -> int:
        """How many of the next tokens, each given as the text that it made certain, begin inside the reasoning.

        Its end marker counts, its beginning does not. Call it before the same text is pushed.
        """
        if self._state not in (_State.START, _State.REASONING):
            return 0
        text = self._held + "".join(pieces)
        begin = 0
        if self._state is _State.START:
            body = text.lstrip()
            if not body.startswith(THINK):
                return 0
            begin = len(text) - len(body) + len(THINK)
        found = text.find(END_THINK, begin)
        end = found + len(END_THINK) if found >= 0 else len(text) + 1
        starts = accumulate(map(len, pieces), initial=len(self._held))
        return sum(begin <= start < end for start, _ in zip(starts, pieces, strict=False))

    def _start(self, final: bool) -> None:
        body = self._held.lstrip()
        if body.startswith(THINK):
            self._held = body[len(THINK) :]
            self._enter(_State.REASONING)
        elif final or not THINK.startswith(body):
            self._enter(_State.CONTENT, strip=False)

    def _until(self, marker: str | None, final: bool) -> tuple[str, bool]:
        """Take held text up to `marker`, and whether it came. Whitespace before a marker is no part of the text."""
        if self._strip:
            self._held = self._held.lstrip()
            self._strip = not self._held
        if marker is None:
            return self._take(len(self._held)), False
        text, found, rest = self._held.partition(marker)
        if found:
            self._held = rest
            return text.rstrip(), True
        if final:
            return self._take(len(text)), False
        return self._take(len(text[: len(text) - _overlap(text, marker)].rstrip())), False

    def _call_head(self, content: list[str], calls: list[ToolCallDelta], final: bool) -> None:
        """Wait for the call's name; a call that is put otherwise is read when it is complete, or is just text."""
        if head := _CALL_HEAD.match(self._held):
            self._open_call(head[1], "", calls)
            self._held = self._held[head.end() :]
            self._enter(_State.ARGUMENTS, strip=False)
            return
        body, found, rest = self._held.partition(END_TOOL_CALL)
        if not found and not final:
            return
        self._held = rest
        self._enter(self._after_call, strip=bool(found))
        try:
            call = json.loads(body)
            arguments = call.get("arguments", {})
            text = arguments if isinstance(arguments, str) else json.dumps(arguments)
            (call["name"] + text).encode()  # Half a surrogate pair is valid JSON and no text.
            self._open_call(call["name"], text, calls)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            content.append(f"{TOOL_CALL}{body}{found}")
            self._enter(_State.CONTENT, strip=False)

    def _open_call(self, name: str, arguments: str, calls: list[ToolCallDelta]) -> None:
        self._call += 1
        calls.append(ToolCallDelta(self._call, arguments, f"call_{uuid.uuid4().hex[:24]}", name))

    def _arguments(self) -> str:
        """Take held text up to the end of the arguments' JSON object, keeping count of its brackets."""
        for position, character in enumerate(self._held):
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_string = not self._in_string
            elif not self._in_string and character in "{[":
                self._depth += 1
            elif not self._in_string and character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._enter(_State.CALL_END)
                    return self._take(position + 1)
        return self._take(len(self._held))

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        return taken


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that begins `marker`, which is not in `text` whole."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if text.endswith(marker[:n])), 0)
