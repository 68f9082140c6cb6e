"""A chat's chunks in the shapes of OpenAI's Responses API: the response, its items, and the events of a stream."""

import re
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from orthrus.deployments.chat.call_text import TOOL_CALL
from orthrus.deployments.chat.parts import Part, PartStream, Step
from orthrus.deployments.failures.failure import Failure
from orthrus.deployments.generation.choices import Choice
from orthrus.deployments.generation.text_chunk import TextChunk
from orthrus.deployments.openai.format import cost
from orthrus.deployments.openai.logprobs import chat_logprobs
from orthrus.deployments.responses.body import ENCRYPTED_REASONING, ResponsesBody
from orthrus.deployments.responses.items import Item, seal
from orthrus.deployments.responses.tools import FunctionTool, HostedTool, custom_input
from orthrus.requests.request import RequestStats
from orthrus.text.stream import token_bytes

Event = dict[str, Any]
_PREFIXES = {"reasoning": "rs", "text": "msg", "call": "fc", "custom": "ctc"}
_ERROR_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}


class ResponsesFormat:
    """One response. What it streams adds up to `whole`.

    tokenizer: spells tokens for log-probabilities. stored: whether the response can be asked for again. before: the items of
    earlier turns.
    """

    def __init__(
        self, body: ResponsesBody, tokenizer: Any, *, stored: bool, before: Sequence[Item] = ()
    ) -> None:
        self.id = f"resp_{uuid.uuid4().hex}"
        self.response: dict[str, Any] = {}
        """The finished response, empty until then."""
        self._body = body
        self._tokenizer = tokenizer
        self._asked = {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            **_asked(body, stored),
        }
        self._tools = {tool.function["name"]: tool for tool in body.offered(before)}
        self._parts = PartStream()
        self._ids: list[str] = []
        self._output: list[dict[str, Any]] = []
        self._reasoning_tokens = 0
        self._next_event = 0
        # The part of the open call's input that events have had, if the call is of a custom tool.
        self._input = ""
        # Log-probabilities of the tokens before any call, and how many of them events have had.
        self._logprobs: list[dict[str, Any]] = []
        self._sent = 0
        # If the model may call: the end of these tokens' text, and how many of them come before each marker of a call in it.
        self._scored = b"" if self._tools and body.tool_choice != "none" else None
        self._marks: list[int] = []

    def whole(self, choice: Choice) -> dict[str, Any]:
        """The unstreamed response."""
        for item in choice.chunks:
            self._count(item)
        last = choice.chunks[-1]
        for step in [*self._parts.push(choice.message), *self._end_parts(last)]:
            for _ in self._part_events(*step, last):
                pass
        return self._finish(last)

    def opening(self) -> list[Event]:
        """The events before the first chunk's."""
        response = self._response("in_progress")
        return [self._event(f"response.{what}", response=response) for what in ("created", "in_progress")]

    def events(self, item: TextChunk) -> list[Event]:
        """The events of one chunk; of the last one, the end of the stream too."""
        self._count(item)
        happened = list(self._parts.push(item.delta)) if item.delta else []
        last = item.finish_reason is not None
        if last:
            happened += self._end_parts(item)
        events = [event for step in happened for event in self._part_events(*step, item)]
        if last:
            response = self._finish(item)
            events.append(self._event(f"response.{response['status']}", response=response))
        return events

    def failed(self, failure: Failure) -> list[Event]:
        """The events that end a stream which can't go on."""
        code = _ERROR_CODES.get(failure.status, "server_error")
        error = {"code": code, "message": failure.message}
        return [
            self._event("error", **error, param=failure.param),
            self._event("response.failed", response={**self._response("failed"), "error": error}),
        ]

    def _event(self, kind: str, **fields: Any) -> Event:
        self._next_event += 1
        return {"type": kind, "sequence_number": self._next_event - 1, **fields}

    def _count(self, item: TextChunk) -> None:
        """Count the chunk's reasoning, and keep the log-probabilities of the tokens of the text before any call."""
        self._reasoning_tokens += len(item.reasoning)
        if item.chunk.logprobs is None or any(part.kind == "call" for part in self._parts.parts):
            return
        if item.reasoning:
            self._logprobs.clear()  # Tokens before the reasoning are its opening marker.
            self._scored = self._scored and b""
            self._marks.clear()
        of_text = item.chunk.logprobs[item.reasoning.stop :]
        self._logprobs += chat_logprobs(self._tokenizer, of_text)["content"]
        if self._scored is not None:
            spelt = token_bytes(self._tokenizer)
            self._find_marks(b"".join(spelt[scored.token_id] for scored in of_text))

    def _find_marks(self, text: bytes) -> None:
        """Find the markers of calls that end in the text of the newest tokens."""
        assert self._scored is not None
        self._scored += text
        place, begin = len(self._logprobs), len(self._scored)
        marks = []
        for found in reversed(list(re.finditer(TOOL_CALL.encode(), self._scored))):
            while place and begin - len(self._logprobs[place - 1]["bytes"]) >= found.start():
                place -= 1
                begin -= len(self._logprobs[place]["bytes"])
            marks.append(place)
        self._marks += reversed(marks)
        # A marker may have begun in no more than this.
        self._scored = self._scored[1 - len(TOOL_CALL) :]

    def _end_parts(self, last: TextChunk) -> Iterator[tuple[Step, Part, str]]:
        # An answer that is not cut has at least one text, if only an empty one.
        if last.finish_reason == "stop" and all(part.kind == "reasoning" for part in self._parts.parts):
            yield from self._parts.push_empty_text()
        yield from self._parts.finish()

    def _part_events(self, step: Step, part: Part, text: str, item: TextChunk) -> Iterator[Event]:
        """The events of a step. item: the chunk that it came with."""
        if step == "start":
            self._ids.append(f"{_PREFIXES[self._kind(part)]}_{uuid.uuid4().hex}")
            self._input = ""
        at = {"item_id": self._ids[part.index], "output_index": part.index}
        match step:
            case "start":
                empty = {**self._item(part, "in_progress"), **_EMPTY[self._kind(part)]}
                yield self._event("response.output_item.added", output_index=part.index, item=empty)
                if part.kind != "call":
                    yield self._content_event("added", at, part, "")
            case "more":
                if self._kind(part) == "custom":
                    told, self._input = self._input, custom_input(part.text)
                    text = self._input[len(told) :]
                    if not text:
                        return
                name, place = self._place(part)
                extra = {"logprobs": self._new_logprobs(part)} if part.kind == "text" else {}
                yield self._event(f"response.{name}.delta", **at, **place, delta=text, **extra)
            case "end":
                name, place = self._place(part)
                yield self._event(f"response.{name}.done", **at, **place, **self._said(part))
                if part.kind != "call":
                    yield self._content_event("done", at, part, part.text)
                cut = item.finish_reason == "length" and part is self._parts.parts[-1]
                self._output.append(self._item(part, "incomplete" if cut else "completed"))
                yield self._event("response.output_item.done", output_index=part.index, item=self._output[-1])

    def _place(self, part: Part) -> tuple[str, dict[str, int]]:
        """The name of a part's events, and the fields that give its place within the item."""
        match self._kind(part):
            case "text":
                return "output_text", {"content_index": 0}
            case "call":
                return "function_call_arguments", {}
            case "custom":
                return "custom_tool_call_input", {}
            case _ if self._body.summarises:
                return "reasoning_summary_text", {"summary_index": 0}
            case _:
                return "reasoning_text", {"content_index": 0}

    def _said(self, part: Part) -> dict[str, Any]:
        """A part's whole text, as the event at its end has it."""
        match self._kind(part):
            case "call":
                return {"arguments": part.text, "name": self._called(part)["name"]}
            case "custom":
                return {"input": custom_input(part.text)}
            case "text":
                return {"text": part.text, "logprobs": self._logprobs_of(part)}
            case _:
                return {"text": part.text}

    def _content_event(self, what: str, at: dict[str, Any], part: Part, text: str) -> Event:
        _, place = self._place(part)
        if part.kind == "reasoning" and self._body.summarises:
            summary = {"type": "summary_text", "text": text}
            return self._event(f"response.reasoning_summary_part.{what}", **at, **place, part=summary)
        return self._event(f"response.content_part.{what}", **at, **place, part=self._content(part, text))

    def _content(self, part: Part, text: str) -> dict[str, Any]:
        if part.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {
            "type": "output_text",
            "text": text,
            "annotations": [],
            "logprobs": self._logprobs_of(part) if text else [],
        }

    def _item(self, part: Part, status: str) -> dict[str, Any]:
        """The item of a part, with the part's text so far."""
        item = {"id": self._ids[part.index], "status": status}
        match self._kind(part):
            case "call":
                call = {"call_id": part.id, **self._called(part), "arguments": part.text}
                return {**item, "type": "function_call", **call}
            case "custom":
                call = {"call_id": part.id, **self._called(part), "input": custom_input(part.text)}
                return {**item, "type": "custom_tool_call", **call}
            case "text":
                content = [self._content(part, part.text)]
                return {**item, "type": "message", "role": "assistant", "content": content}
            case _:
                summary = [{"type": "summary_text", "text": part.text}]
                content = [{"type": "reasoning_text", "text": part.text}]
                told = {"summary": summary} if self._body.summarises else {"summary": [], "content": content}
                if ENCRYPTED_REASONING in self._body.includes:
                    told["encrypted_content"] = seal(part.text)  # type: ignore[assignment]
                return {**item, "type": "reasoning", **told}

    def _kind(self, part: Part) -> str:
        """The part's kind, "custom" for the call of a custom tool."""
        tool = self._tools.get(part.name)
        return "custom" if tool is not None and tool.custom else part.kind

    def _called(self, part: Part) -> dict[str, str]:
        """The name and namespace of the tool that is called, as the client gave them."""
        tool = self._tools.get(part.name)
        if tool is None:
            return {"name": part.name}  # The model has made the name up.
        return {"name": tool.name, **({"namespace": tool.namespace} if tool.namespace else {})}

    def _logprobs_of(self, part: Part) -> list[dict[str, Any]]:
        """Log-probabilities of a text's tokens: none of a text that follows a call."""
        if any(before.kind == "call" for before in self._parts.parts[: part.index]):
            return []
        # Markers that are in the text began no call. The next one ends the text.
        in_text = part.text.count(TOOL_CALL) if self._marks else 0
        return self._logprobs[: self._marks[in_text]] if in_text < len(self._marks) else self._logprobs

    def _new_logprobs(self, part: Part) -> list[dict[str, Any]]:
        """Log-probabilities of a text's tokens that no event has had yet."""
        logprobs = self._logprobs_of(part)
        sent, self._sent = self._sent, max(self._sent, len(logprobs))
        return logprobs[sent:]

    def _finish(self, last: TextChunk) -> dict[str, Any]:
        stats = last.chunk.stats
        assert stats is not None, "a finished choice has stats"
        self.response = self._response("incomplete" if last.finish_reason == "length" else "completed")
        if last.finish_reason == "length":
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self.response["completed_at"] = int(time.time())
        self.response["usage"] = self._usage(stats)
        self.response["orthrus"] = cost(stats)
        return self.response

    def _response(self, status: str) -> dict[str, Any]:
        nothing = {"error": None, "incomplete_details": None, "completed_at": None, "usage": None}
        return {**self._asked, "status": status, **nothing, "output": list(self._output)}

    def _usage(self, stats: RequestStats) -> dict[str, Any]:
        return {
            "input_tokens": stats.prompt_tokens,
            "input_tokens_details": {"cached_tokens": stats.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": stats.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
            "total_tokens": stats.prompt_tokens + stats.completion_tokens,
        }


_EMPTY: dict[str, dict[str, Any]] = {
    "text": {"content": []},
    "call": {"arguments": ""},
    "custom": {"input": ""},
    "reasoning": {"summary": [], "content": []},
}
"""Fields of an item that has just begun, by the kind of its part."""


def _asked(body: ResponsesBody, stored: bool) -> dict[str, Any]:
    """The request's fields as a response repeats them, with defaults filled in."""
    reasoning, text = body.reasoning, body.text
    format_ = text.format if text is not None else None
    tools = [
        {**({"parameters": None, "strict": True} if isinstance(tool, FunctionTool) else {}), **_dump(tool)}
        for tool in body.tools or ()
        if not isinstance(tool, HostedTool)
    ]
    choice = body.tool_choice or "auto"
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "model": body.model,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {
            "effort": reasoning.effort if reasoning is not None else None,
            "summary": (reasoning.summary or reasoning.generate_summary) if reasoning is not None else None,
        },
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": stored,
        "temperature": body.temperature,
        "text": {
            "format": _dump(format_) if format_ is not None else {"type": "text"},
            "verbosity": (text.verbosity if text is not None else None) or "medium",
        },
        "tool_choice": choice if isinstance(choice, str) else _dump(choice),
        "tools": tools,
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _dump(given: Any) -> dict[str, Any]:
    """As the client sent it."""
    dumped: dict[str, Any] = given.model_dump(exclude_none=True, by_alias=True, mode="json")
    return dumped
