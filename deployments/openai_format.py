"""Chunks and choices in OpenAI's response JSON, for both endpoints, streamed and whole."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from deployments.chat_output import ChatDelta
from deployments.generation import Choice, TextChunk
from orthrus.request import DRAWN_SEED_BITS, SEED_BITS, RequestStats, TokenLogprob
from orthrus.text import token_bytes

# Compact, as OpenAI's own events are. Made once: json.dumps makes one at each call that has options.
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def usage(stats: Sequence[RequestStats], n: int) -> dict[str, Any]:
    """Token counts of a request's prompts (each counted once for its `n` choices) and choices."""
    prompt = sum(s.prompt_tokens for s in stats[::n])
    completion = sum(s.completion_tokens for s in stats)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(s.cached_tokens for s in stats[::n])},
    }


def cost(stats: RequestStats) -> dict[str, Any]:
    """The extension field `orthrus` of a finished choice."""
    return {
        "tokens_per_cycle": round(stats.tokens_per_cycle, 3),
        "cycles": stats.cycles,
        "passes": stats.passes,
        "seed": _told_seed(stats.seed),
    }


def _told_seed(seed: int) -> int:
    """A seed as a JSON number. Those near 2**63 are told as the negative ones that they stand for: doubles hold these."""
    negative = seed - (1 << SEED_BITS)
    return negative if -negative < 1 << DRAWN_SEED_BITS else seed


@dataclass
class ResponseFormat:
    """One response. `chat` chooses the endpoint's dialect; `tokenizer` spells tokens for log-probabilities.

    include_usage: every streamed event has the field `usage`, null but in the last. echo: for each prompt the text to put
    before its choices' own.
    """

    chat: bool
    model: str
    tokenizer: Any
    include_usage: bool = False
    echo: Sequence[str] = ()
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    # Where in its text each choice's next token begins, for `text_offset`.
    _offsets: dict[int, int] = field(default_factory=dict)
    # What stands before and after the text in events that carry nothing else, by choice and by the text's key.
    _around: dict[tuple[int, str], list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"

    def whole(self, choices: Sequence[Choice], n: int) -> dict[str, Any]:
        """The unstreamed response; choices of several prompts follow one another."""
        rendered = []
        for index, choice in enumerate(choices):
            scored = [item.chunk.logprobs for item in choice.chunks if item.chunk.logprobs is not None]
            entry: dict[str, Any] = {"index": index}
            if self.chat:
                entry["message"] = _message(choice.message)
            else:
                entry["text"] = self._echoed(index, n) + choice.text
            entry["logprobs"] = (
                self._logprobs(index, [s for part in scored for s in part]) if scored else None
            )
            entry["finish_reason"] = choice.finish_reason
            entry["orthrus"] = cost(choice.stats)
            rendered.append(entry)
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": rendered, "usage": usage([c.stats for c in choices], n)}

    def opening(self, index: int, n: int) -> dict[str, Any] | None:
        """The event before the first token of choice `index`: a chat's role, or the echoed prompt."""
        entry: dict[str, Any] = {"index": index}
        if self.chat:
            entry["delta"] = {"role": "assistant", "content": ""}
        elif self.echo:
            entry["text"] = self._echoed(index, n)
        else:
            return None
        return {**self._event_head(), "choices": [{**entry, "logprobs": None, "finish_reason": None}]}

    def _echoed(self, index: int, n: int) -> str:
        """The prompt's text before choice `index`, which its tokens' offsets then start from."""
        text = self.echo[index // n] if self.echo else ""
        self._offsets[index] = len(text)
        return text

    def event(self, item: TextChunk, index: int) -> dict[str, Any]:
        """One streamed event."""
        chunk = item.chunk
        entry: dict[str, Any] = {"index": index}
        if self.chat:
            entry["delta"] = _delta(item.delta or ChatDelta())
        else:
            entry["text"] = item.text
        entry["logprobs"] = self._logprobs(index, chunk.logprobs) if chunk.logprobs is not None else None
        entry["finish_reason"] = item.finish_reason
        if chunk.stats is not None:
            entry["orthrus"] = cost(chunk.stats)
        return {**self._event_head(), "choices": [entry]}

    def stream(self, item: TextChunk, index: int) -> str:
        """`event` as a server-sent event. Most carry text alone, and of those the rest is rendered once."""
        delta, chunk = item.delta, item.chunk
        text, key = item.text, "text"
        if delta is not None:
            text, key = (delta.content, "content") if delta.content else (delta.reasoning, "reasoning")
            if not text or delta.tool_calls or (delta.content and delta.reasoning):
                return sse(self.event(item, index))
        if item.finish_reason or chunk.logprobs is not None or chunk.stats is not None:
            return sse(self.event(item, index))
        around = self._around.get((index, key))
        if around is None:
            marker = "\x00"  # No other string in an event has it.
            marked = {
                "text": replace(item, text=marker),
                "content": replace(item, delta=ChatDelta(content=marker)),
                "reasoning": replace(item, delta=ChatDelta(reasoning=marker)),
            }
            around = sse(self.event(marked[key], index)).split(_encode(marker))
            self._around[index, key] = around
        return f"{around[0]}{_encode(text)}{around[1]}"

    def usage_event(self, stats: Sequence[RequestStats], n: int) -> dict[str, Any]:
        """The last event where the client asked for usage."""
        return {**self._event_head(), "choices": [], "usage": usage(stats, n)}

    def _event_head(self) -> dict[str, Any]:
        head = self._head("chat.completion.chunk" if self.chat else "text_completion")
        return {**head, "usage": None} if self.include_usage else head

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, index: int, items: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Log-probabilities of choice `index`'s next tokens."""
        if self.chat:
            content = [
                {
                    **self._scored(item.token_id, item.logprob),
                    "top_logprobs": [self._scored(*alternative) for alternative in item.top],
                }
                for item in items
            ]
            return {"content": content, "refusal": None}
        tokens = [self._spell(item.token_id) for item in items]
        offsets = list(accumulate(map(len, tokens), initial=self._offsets.get(index, 0)))
        self._offsets[index] = offsets.pop()
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(item.logprob) for item in items],
            "top_logprobs": [{self._spell(t): _finite(p) for t, p in item.top} for item in items],
            "text_offset": offsets,
        }

    def _scored(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = list(token_bytes(self.tokenizer)[token_id])
        return {"token": self._spell(token_id), "logprob": _finite(logprob), "bytes": raw}

    def _spell(self, token_id: int) -> str:
        return spell(self.tokenizer, token_id)


def spell(tokenizer: Any, token_id: int) -> str:
    """A token as text; bytes that are no whole character become U+FFFD."""
    return token_bytes(tokenizer)[token_id].decode(errors="replace")


def _message(message: ChatDelta) -> dict[str, Any]:
    """A whole chat answer. Content is null where there are only tool calls."""
    rendered: dict[str, Any] = {"role": "assistant", "content": message.content, "refusal": None}
    if message.reasoning:
        rendered["reasoning_content"] = message.reasoning
    if message.tool_calls:
        rendered["content"] = message.content or None
        rendered["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    return rendered


def _delta(delta: ChatDelta) -> dict[str, Any]:
    """A piece of a chat answer: only what it has, and empty content where it has nothing, since clients trip over `{}`."""
    rendered: dict[str, Any] = {}
    if delta.content or not delta:
        rendered["content"] = delta.content
    if delta.reasoning:
        rendered["reasoning_content"] = delta.reasoning
    if delta.tool_calls:
        rendered["tool_calls"] = [
            {
                "index": call.index,
                **({"id": call.id, "type": "function"} if call.id else {}),
                "function": {**({"name": call.name} if call.name else {}), "arguments": call.arguments},
            }
            for call in delta.tool_calls
        ]
    return rendered


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for it."""
    return max(logprob, -9999.0)


def sse(event: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {_encode(event)}\n\n"


def named_sse(event: dict[str, Any]) -> str:
    """A server-sent event that bears its type as its name too, as the clients of newer APIs expect."""
    return f"event: {event['type']}\n{sse(event)}"
