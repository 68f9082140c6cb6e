"""A chat's chunks in the shapes of Anthropic's Messages API: the message, the events of a stream, and errors."""

import base64
import hashlib
import json
import uuid
from collections.abc import Iterator
from typing import Any

from pydantic_core import from_json

from orthrus.deployments.chat.parts import Part, PartStream, Step
from orthrus.deployments.failures.failure import Failure
from orthrus.deployments.generation.choices import Choice
from orthrus.deployments.generation.text_chunk import TextChunk
from orthrus.deployments.openai.format import cost
from orthrus.requests.request import RequestStats

_OVERLOADED = 529
_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    _OVERLOADED: "overloaded_error",
}
_NO_CACHE = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
Event = dict[str, Any]


def is_messages_path(path: str) -> bool:
    """Whether errors on this path have Anthropic's shape."""
    return "/v1/messages" in path


def error_status(failure: Failure) -> int:
    """The HTTP status: Anthropic has one of its own for a server that can't take the request now."""
    return _OVERLOADED if failure.status == 503 or failure.code == "queue_full" else failure.status


def error_body(failure: Failure) -> dict[str, Any]:
    """Anthropic's error object."""
    kind = _ERROR_TYPES.get(error_status(failure), "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": failure.message}}


class MessageFormat:
    """One answer. What it streams adds up to `whole`.

    prompt_tokens: tokens of the prompt, including cached ones. max_tokens: the client's limit.
    """

    def __init__(self, model: str, prompt_tokens: int, max_tokens: int) -> None:
        self.id = f"msg_{uuid.uuid4().hex}"
        self._model = model
        self._prompt_tokens = prompt_tokens
        self._max_tokens = max_tokens
        self._parts = PartStream()
        self._reasoning_tokens = 0

    def whole(self, choice: Choice) -> dict[str, Any]:
        """The unstreamed message."""
        for _ in self._parts.push(choice.message):
            pass
        self._reasoning_tokens = choice.reasoning_tokens
        return {
            **self._head(),
            "content": [_block(part) for part in self._parts.parts],
            **self._stop(choice.chunks[-1]),
            "usage": self._usage(choice.stats),
            "orthrus": cost(choice.stats),
        }

    def opening(self) -> list[Event]:
        """The events before the first chunk's."""
        usage = {"input_tokens": self._prompt_tokens, **_NO_CACHE, "output_tokens": 0}
        message = {**self._head(), "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        return [{"type": "message_start", "message": message}]

    def events(self, item: TextChunk) -> list[Event]:
        """The events of one chunk; of the last one, the end of the stream too."""
        self._reasoning_tokens += len(item.reasoning)
        happened = list(self._parts.push(item.delta)) if item.delta else []
        if (stats := item.chunk.stats) is None:
            return [event for step in happened for event in self._block_events(*step)]
        happened += self._parts.finish()
        return [
            *(event for step in happened for event in self._block_events(*step)),
            {
                "type": "message_delta",
                "delta": self._stop(item),
                "usage": self._usage(stats),
                "orthrus": cost(stats),
            },
            {"type": "message_stop"},
        ]

    def failed(self, failure: Failure) -> list[Event]:
        """The event that ends a stream which can't go on."""
        return [error_body(failure)]

    def _block_events(self, step: Step, part: Part, text: str) -> Iterator[Event]:
        index = part.index
        match step, part.kind:
            case "start", _:
                yield {"type": "content_block_start", "index": index, "content_block": _empty_block(part)}
                if index == 0:
                    yield {"type": "ping"}
            case "more", kind:
                yield {"type": "content_block_delta", "index": index, "delta": _delta(kind, text)}
            case "end", kind:
                if kind == "reasoning":
                    signed = {"type": "signature_delta", "signature": _signature(part.text)}
                    yield {"type": "content_block_delta", "index": index, "delta": signed}
                yield {"type": "content_block_stop", "index": index}

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self._model}

    def _stop(self, last: TextChunk) -> dict[str, Any]:
        """Why the answer ended."""
        stopped = last.chunk.stop_reason
        stats = last.chunk.stats
        assert stats is not None, "a choice's last chunk has stats"
        match last.finish_reason:
            case "tool_calls":
                reason = "tool_use"
            case "length" if stats.completion_tokens < self._max_tokens:
                reason = "model_context_window_exceeded"
            case "length":
                reason = "max_tokens"
            case _:
                reason = "stop_sequence" if isinstance(stopped, str) else "end_turn"
        return {"stop_reason": reason, "stop_sequence": stopped if reason == "stop_sequence" else None}

    def _usage(self, stats: RequestStats) -> dict[str, Any]:
        """Anthropic counts cached tokens apart: input_tokens are those that were computed."""
        return {
            "input_tokens": stats.prompt_tokens - stats.cached_tokens,
            **_NO_CACHE,
            "cache_read_input_tokens": stats.cached_tokens,
            "output_tokens": stats.completion_tokens,
            "output_tokens_details": {"thinking_tokens": self._reasoning_tokens},
        }


def _empty_block(part: Part) -> dict[str, Any]:
    """The block as it begins."""
    match part.kind:
        case "reasoning":
            return {"type": "thinking", "thinking": "", "signature": ""}
        case "text":
            return {"type": "text", "text": ""}
        case _:
            return {"type": "tool_use", "id": part.id, "name": part.name, "input": {}}


def _block(part: Part) -> dict[str, Any]:
    """The whole block."""
    match part.kind:
        case "reasoning":
            return {"type": "thinking", "thinking": part.text, "signature": _signature(part.text)}
        case "text":
            return {"type": "text", "text": part.text}
        case _:
            return {**_empty_block(part), "input": _arguments(part.text)}


def _delta(kind: str, text: str) -> dict[str, str]:
    match kind:
        case "reasoning":
            return {"type": "thinking_delta", "thinking": text}
        case "text":
            return {"type": "text_delta", "text": text}
        case _:
            return {"type": "input_json_delta", "partial_json": text}


def _signature(thinking: str) -> str:
    """Clients send thinking back only with a signature. Nothing here depends on it, so it is a plain digest."""
    return base64.b64encode(hashlib.sha256(thinking.encode(errors="replace")).digest()).decode()


def _arguments(text: str) -> dict[str, Any]:
    """A call's arguments. If the token limit has cut them, they are what had come until then, as in a stream."""
    try:
        arguments = from_json(text, allow_partial=True) if text else {}
        json.dumps(arguments, allow_nan=False)
    except ValueError:
        arguments = text
    # In a call that was not forced, the model may write something else than a JSON object. It must not be lost.
    return arguments if isinstance(arguments, dict) else {"arguments": text}
