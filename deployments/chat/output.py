"""Splits a chat answer's text, while it streams, into reasoning, content and tool calls.

If Qwen3 thinks, it writes `<think>...</think>` first. Its calls have the form that deployments/chat/call_text.py reads. The
result does not depend on how the text is cut into pieces: text that may still become a marker is held back.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import accumulate

from orthrus.deployments.chat.call_text import (
    END_TOOL_CALL,
    TOOL_CALL,
    CallSplitter,
    ToolCallDelta,
    TrimmedText,
    cut,
)

THINK, END_THINK = "<think>", "</think>"


@dataclass(frozen=True)
class ChatDelta:
    """What a piece of text adds to the message: at most one piece of each tool call."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.tool_calls)


def joined(deltas: Iterable[ChatDelta]) -> ChatDelta:
    """A whole message: all texts joined, and the pieces of each tool call."""
    content, reasoning = "", ""
    calls: dict[int, ToolCallDelta] = {}
    for delta in deltas:
        for call in delta.tool_calls:
            whole = calls.get(call.index)
            calls[call.index] = (
                replace(whole, arguments=whole.arguments + call.arguments)
                if whole
                else replace(call, at=call.at + len(content))
            )
        content += delta.content
        reasoning += delta.reasoning
    return ChatDelta(content, reasoning, tuple(calls.values()))


class _State(Enum):
    START = "before anything but whitespace"
    REASONING = "inside <think>"
    REASONED_CALL = "inside <think>, after <tool_call>"
    CONTENT = "after any reasoning"


class ChatSplitter:
    """Splits one choice's text.

    thinks: the model may open with `<think>`. calls: `<tool_call>` is a call, not text. one_call: calls after the first are
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
        self.called = False
        """Whether the answer has a tool call."""
        self.markers = frozenset(
            ((THINK, END_THINK) if thinks else ()) + ((TOOL_CALL, END_TOOL_CALL) if calls else ())
        )
        """The markers that are looked for. Their tokens must be part of the text, even if they are special tokens."""
        self._state = _State.REASONING if inside_reasoning else _State.START if thinks else _State.CONTENT
        self._calls = calls
        self._one_call = one_call
        self._held = ""
        self._reasoning = TrimmedText(after_marker=True)
        self._content = TrimmedText()
        self._call_splitter = CallSplitter(one_call=one_call)
        # A call inside <think> counts only if </think> never comes. Until that is known, these hold the call and its text.
        self._reasoned = self._call_splitter
        self._reasoned_text = ""
        self._reasoned_parts: list[ChatDelta] = []

    def push(self, text: str, final: bool = False) -> ChatDelta:
        """Add a piece of text. Returns the parts that are certain now; with `final`, also all that was held back."""
        self._held += text
        delta = ChatDelta()
        before = None
        while self._state is not before:
            before = self._state
            match before:
                case _State.START:
                    self._start(final)
                    continue
                case _State.REASONING:
                    part = self._reason(final)
                case _State.REASONED_CALL:
                    part = self._reason_about_calls(final)
                case _State.CONTENT:
                    part = self._answer(final)
            delta = joined((delta, part)) if delta else part
        self.called = self.called or bool(delta.tool_calls)
        return delta

    def reasoning_span(self, pieces: Sequence[str]) -> range:
        """Which of the next tokens, each given as the text that it made certain, begin inside the reasoning.

        The end marker counts as reasoning, the opening one does not. Call this before the same text is pushed.
        """
        if self._state is _State.CONTENT:
            return range(0)
        undecided = self._reasoned_text if self._state is _State.REASONED_CALL else self._held
        text = undecided + "".join(pieces)
        begin = 0
        if self._state is _State.START:
            body = text.lstrip()
            if not body.startswith(THINK):
                return range(0)
            begin = len(text) - len(body) + len(THINK)
        found = text.find(END_THINK, begin)
        end = found + len(END_THINK) if found >= 0 else len(text) + 1
        starts = accumulate(map(len, pieces), initial=len(undecided))
        inside = [i for i, (start, _) in enumerate(zip(starts, pieces, strict=False)) if begin <= start < end]
        return range(inside[0], inside[-1] + 1) if inside else range(0)

    def _start(self, final: bool) -> None:
        body = self._held.lstrip()
        if body.startswith(THINK):
            self._held = body.removeprefix(THINK)
            self._state = _State.REASONING
        elif final or not THINK.startswith(body):
            self._state = _State.CONTENT

    def _reason(self, final: bool) -> ChatDelta:
        markers = [END_THINK, TOOL_CALL] if self._calls else [END_THINK]
        piece, marker, self._held = cut(self._held, markers, final)
        certain = self._reasoning.add(piece)
        if marker == END_THINK:
            self._end_reasoning()
        elif marker is not None:
            self._reasoned = CallSplitter(one_call=self._one_call, until=END_THINK)
            self._reasoned_text, self._reasoned_parts = "", []
            self._held = marker + self._held
            self._state = _State.REASONED_CALL
        elif final:
            certain += self._reasoning.end()
        return ChatDelta(reasoning=certain)

    def _end_reasoning(self) -> None:
        self._state = _State.CONTENT
        self._content = TrimmedText(after_marker=True)
        self._call_splitter = CallSplitter(one_call=self._one_call, after_marker=True)

    def _reason_about_calls(self, final: bool) -> ChatDelta:
        """Hold back what may be calls until the reasoning ends, which makes it reasoning, or the answer."""
        calls = self._reasoned
        text, pieces = calls.push(self._held, final)
        self._reasoned_parts.append(ChatDelta(reasoning=text, tool_calls=pieces))
        self._reasoned_text += self._held
        self._held = ""
        if calls.cut_short:
            # An open string may have hidden the end of the reasoning.
            _, end, rest = self._reasoned_text.partition(END_THINK)
            return self._give_back(rest, ended=bool(end))
        if calls.ended:
            return self._give_back(calls.held, ended=calls.came_to_until)
        if not final:
            return ChatDelta()
        found = joined(self._reasoned_parts)
        self._reasoning.mark()
        return replace(found, reasoning=self._reasoning.add(found.reasoning))

    def _give_back(self, rest: str, *, ended: bool) -> ChatDelta:
        """Treat what was held back as reasoning, except `rest`, which is read next."""
        held = self._reasoned_text[: len(self._reasoned_text) - len(rest)]
        self._held = rest
        if not ended:
            self._state = _State.REASONING
            return ChatDelta(reasoning=self._reasoning.add(held))
        self._end_reasoning()
        return ChatDelta(reasoning=self._reasoning.add(held.removesuffix(END_THINK)))

    def _answer(self, final: bool) -> ChatDelta:
        text, self._held = self._held, ""
        if self._calls:
            content, pieces = self._call_splitter.push(text, final)
            return ChatDelta(content, tool_calls=pieces)
        return ChatDelta(self._content.add(text) + self._content.end())
