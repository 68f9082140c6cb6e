"""Chunks and choices in OpenAI's response JSON, for both endpoints, streamed and whole."""

import secrets
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from orthrus.deployments.bodies.body import AnswerOptions
from orthrus.deployments.chat.output import ChatDelta
from orthrus.deployments.generation.choices import Choice
from orthrus.deployments.generation.text_chunk import TextChunk
from orthrus.deployments.http.sse import encode_json, sse
from orthrus.deployments.openai.logprobs import Echo, TextLogprobs, chat_logprobs, prompt_logprobs, spell
from orthrus.requests.request import DRAWN_SEED_BITS, SEED_BITS, CycleReport, PromptLogprobs, RequestStats

_PADDED_TO = 64
"""Characters. The length of a padded event is a multiple of it, plus a constant."""


def usage(stats: Sequence[RequestStats], n: int, reasoning_tokens: int = 0) -> dict[str, Any]:
    """Token counts of a request's prompts (each counted once for its `n` choices) and choices."""
    prompt = sum(s.prompt_tokens for s in stats[::n])
    completion = sum(s.completion_tokens for s in stats)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": sum(s.cached_tokens for s in stats[::n]),
            "audio_tokens": 0,
        },
        "completion_tokens_details": {
            "reasoning_tokens": reasoning_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def cost(stats: RequestStats) -> dict[str, Any]:
    """The extension field `orthrus` of a finished choice."""
    return {
        "tokens_per_cycle": round(stats.tokens_per_cycle, 3),
        "cycles": stats.cycles,
        "passes": stats.passes,
        "seed": _json_seed(stats.seed),
    }


def _json_seed(seed: int) -> int:
    """A seed as a JSON number. A seed near 2**63 becomes the negative seed that it stands for, which a double holds exactly."""
    negative = seed - (1 << SEED_BITS)
    return negative if -negative < 1 << DRAWN_SEED_BITS else seed


@dataclass
class CompletionFormat:
    """One response, in JSON: whole, or event by event."""

    chat: bool
    """Whether the answer is a chat completion. If not, it is a completion."""
    model: str
    tokenizer: Any
    """Spells tokens for log-probabilities."""
    include_usage: bool = False
    """Whether every streamed event has the field `usage`, which is null in all but the last."""
    n: int = 1
    """Choices of each prompt."""
    echo: Sequence[Echo] = ()
    """For each prompt, what to put before its choices' own text."""
    logprobs: int | None = None
    """How many alternatives to report for each generated token; None to report no log-probabilities."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""
    skip_special_tokens: bool = True
    """Whether special tokens are left out of the text."""
    options: AnswerOptions = field(default_factory=AnswerOptions)
    prompts: Sequence[Sequence[int]] = ()
    """Token ids of the prompts."""
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    # By choice, for choices that have begun.
    _text_logprobs: dict[int, TextLogprobs] = field(default_factory=dict)
    # By prompt. The first chunk of its request has them.
    _scores: dict[int, PromptLogprobs | None] = field(default_factory=dict)
    # What stands before and after the text in events that carry nothing else, by choice and by the text's key.
    _around: dict[tuple[int, str], list[str]] = field(default_factory=dict)
    # Tokens streamed so far, and choices whose prompt's token ids have been sent.
    _tokens: int = 0
    _reasoning_tokens: int = 0
    _sent_prompts: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        kind = "chatcmpl" if self.chat else "cmpl"
        self.id = f"{kind}-{self.options.request_id or uuid.uuid4().hex}"

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The unstreamed response; choices of several prompts follow one another."""
        rendered = []
        for index, choice in enumerate(choices):
            entry: dict[str, Any] = {"index": index}
            if self.chat:
                entry["message"] = _message(self._shown(choice.message))
            else:
                entry["text"] = self._echoed(index) + choice.text
            entry["logprobs"] = self._logprobs(index, choice.chunks)
            entry["finish_reason"] = choice.finish_reason
            entry["orthrus"] = cost(choice.stats)
            if not self.chat and self.prompt_logprobs is not None:
                entry["prompt_logprobs"] = self._prompt_logprobs(index, choice.chunks[0])
            if self.options.return_token_ids:
                entry["token_ids"] = [token for item in choice.chunks for token in item.chunk.token_ids]
                if not self.chat:
                    entry["prompt_token_ids"] = self.prompts[index // self.n]
            rendered.append(entry)
        head = self._head("chat.completion" if self.chat else "text_completion")
        reasoning = sum(choice.reasoning_tokens for choice in choices)
        whole = {**head, "choices": rendered, "usage": usage([c.stats for c in choices], self.n, reasoning)}
        if self.chat and self.options.return_token_ids:
            whole["prompt_token_ids"] = self.prompts[0]
        if self.chat and self.prompt_logprobs is not None:
            whole["prompt_logprobs"] = self._prompt_logprobs(0, choices[0].chunks[0])
        return whole

    @property
    def scores_prompts(self) -> bool:
        """Whether the first event of each choice has a prompt's log-probabilities: much to render."""
        return bool(self.echo) and self.logprobs is not None

    def opening(self, index: int) -> dict[str, Any] | None:
        """The event before the first token of choice `index`: a chat's role, or the echoed prompt.

        Where the prompt has log-probabilities, it comes with the first token, as they do.
        """
        entry: dict[str, Any] = {"index": index}
        if self.chat:
            entry["delta"] = {"role": "assistant", "content": ""}
        elif self.echo and not self.scores_prompts:
            entry["text"] = self._echoed(index)
        else:
            return None
        event = {**self._event_head(), "choices": [{**entry, "logprobs": None, "finish_reason": None}]}
        if self.chat and self.options.return_token_ids:
            event["prompt_token_ids"] = self.prompts[0]
        return event

    def take(self, item: TextChunk) -> TextChunk | None:
        """Count the next chunk of a stream. Returns what the client gets of it, None for nothing."""
        self._tokens += len(item.chunk.token_ids)
        self._reasoning_tokens += len(item.reasoning)
        if item.delta is not None:
            item = replace(item, delta=self._shown(item.delta))
        if self.options.return_token_ids and item.chunk.token_ids:
            return item
        if item.chunk.cycles:
            return item
        return None if item.says_nothing else item

    def _shown(self, delta: ChatDelta) -> ChatDelta:
        return delta if self.options.include_reasoning else replace(delta, reasoning="")

    def _echoed(self, index: int) -> str:
        """The prompt's text before choice `index`."""
        return self.echo[index // self.n].text if self.echo else ""

    def event(self, item: TextChunk, index: int) -> dict[str, Any]:
        """One streamed event."""
        chunk = item.chunk
        entry: dict[str, Any] = {"index": index}
        if self.chat:
            entry["delta"] = _delta(item.delta or ChatDelta())
        else:
            begins = self.logprobs is not None and index not in self._text_logprobs
            entry["text"] = self._echoed(index) + item.text if begins else item.text
        entry["logprobs"] = self._logprobs(index, [item])
        entry["finish_reason"] = item.finish_reason
        if chunk.stats is not None:
            entry["orthrus"] = cost(chunk.stats)
        if self.options.return_drafts:
            entry["cycles"] = [self._cycle(cycle) for cycle in chunk.cycles]
        if self.options.return_token_ids:
            entry["token_ids"] = list(chunk.token_ids)
            if not self.chat and index not in self._sent_prompts:
                self._sent_prompts.add(index)
                entry["prompt_token_ids"] = self.prompts[index // self.n]
        return {**self._event_head(), "choices": [entry]}

    def stream(self, item: TextChunk, index: int) -> str:
        """`event` as a server-sent event. Most have only text, and what is around the text is rendered once and then reused."""
        options = self.options
        if (
            options.return_token_ids
            or options.return_drafts
            or options.continuous_usage
            or options.obfuscation
        ):
            return self.sse(self.event(item, index))
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
            around = sse(self.event(marked[key], index)).split(encode_json(marker))
            self._around[index, key] = around
        return f"{around[0]}{encode_json(text)}{around[1]}"

    def usage_event(self, stats: Sequence[RequestStats]) -> dict[str, Any]:
        """The last event where the client asked for usage."""
        return {
            **self._event_head(),
            "choices": [],
            "usage": usage(stats, self.n, self._reasoning_tokens),
        }

    def sse(self, event: dict[str, Any]) -> str:
        """A server-sent event. With the option `obfuscation` it is padded, to hide the length of its text."""
        if self.options.obfuscation:
            missing = -len(encode_json(event)) % _PADDED_TO
            event = {**event, "obfuscation": secrets.token_urlsafe(_PADDED_TO)[:missing]}
        return sse(event)

    def _logprobs(self, index: int, items: Sequence[TextChunk]) -> dict[str, Any] | None:
        """Log-probabilities of choice `index`'s next tokens, None where none are asked for."""
        if self.logprobs is None:
            return None
        scored = [scored for item in items for scored in item.chunk.logprobs or ()]
        if self.chat:
            return chat_logprobs(self.tokenizer, scored, by_id=self.options.return_tokens_as_token_ids)
        text, last = "".join([item.text for item in items]), items[-1].finish_reason is not None
        if (begun := self._text_logprobs.get(index)) is not None:
            return begun.event(text, scored, last)
        begun = TextLogprobs(
            self.tokenizer,
            self.logprobs,
            self.skip_special_tokens,
            self.options.return_tokens_as_token_ids,
        )
        self._text_logprobs[index] = begun
        if not self.echo:
            return begun.event(text, scored, last)
        return begun.event(
            text, scored, last, self.echo[index // self.n], self._prompt_scores(index, items[0])
        )

    def _cycle(self, cycle: CycleReport) -> dict[str, Any]:
        """A cycle of a choice: how many tokens it committed, its drafts as text, and how many of these were accepted."""
        drafts = [spell(self.tokenizer, token) for token in cycle.drafts]
        return {"tokens": cycle.num_tokens, "drafts": drafts, "accepted": cycle.num_accepted}

    def _prompt_logprobs(self, index: int, first: TextChunk) -> list[dict[str, Any] | None] | None:
        scores, top = self._prompt_scores(index, first), self.prompt_logprobs
        assert top is not None, "called only if prompt_logprobs is set"
        return prompt_logprobs(self.tokenizer, scores, top) if scores is not None else None

    def _prompt_scores(self, index: int, first: TextChunk) -> PromptLogprobs | None:
        """Log-probabilities of the prompt of choice `index`, whose first chunk this is.

        They come with the first choice of each prompt, which the others wait for.
        """
        return self._scores.setdefault(index // self.n, first.chunk.prompt_logprobs)

    def _event_head(self) -> dict[str, Any]:
        head = self._head("chat.completion.chunk" if self.chat else "text_completion")
        if self.options.continuous_usage:
            prompt = sum(map(len, self.prompts))
            counted = {"prompt_tokens": prompt, "completion_tokens": self._tokens}
            return {**head, "usage": {**counted, "total_tokens": prompt + self._tokens}}
        return {**head, "usage": None} if self.include_usage else head

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


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
    """A piece of a chat answer, with the fields that it has. If it has none, content is empty, since clients fail on `{}`."""
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
