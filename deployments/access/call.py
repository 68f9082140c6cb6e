"""One call of the API, over HTTP or gRPC: what it has used, for limits, log, metrics and traces."""

import hashlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from opentelemetry import context, trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from ray.serve.context import _get_serve_request_context

from orthrus.deployments.access.keys import ApiKey
from orthrus.deployments.access.rate_limits import Quotas
from orthrus.deployments.access.request_metrics import RequestMetrics
from orthrus.deployments.bodies.body import Body
from orthrus.requests.request import Chunk, RequestStats

logger = logging.getLogger("ray.serve")

_LONGEST_SESSION = 256
"""Characters. The name goes to a replica with each of the call's prompts, and is hashed for each replica."""


def session_name(given: str) -> str:
    """What a session is called here: the client's name for it, or the digest of a longer one."""
    if len(given) <= _LONGEST_SESSION:
        return given
    return hashlib.blake2b(given.encode(errors="surrogatepass"), digest_size=16).hexdigest()


@dataclass
class Call:
    """One call under way, and what it has used. `Gate.admit` fills in who makes it; `end` must be called whatever happens."""

    endpoint: str
    key: ApiKey | None = None
    """Whose call it is, None where no keys are needed."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Headers of the answer: what is left of the key's limits, and which fields were ignored."""
    prompts: list[str] | None = None
    """The prompts' texts for the log, None to keep them out of it."""
    quotas: Quotas | None = None
    """Where the call's tokens are spent, if the key has a limit of tokens."""
    outcome: str = "cancelled"
    """"ok", "cancelled", or the name of the exception that ended the call."""
    session: str = ""
    """The client's name of the conversation that the call belongs to (deployments/router.py), "" for none."""
    metrics: RequestMetrics | None = None
    """Where the call is counted, if it asks for tokens."""
    priority: int = 0
    """Priority of the call's engine requests."""
    cache_salt: str = ""
    """Prefix-cache salt of the call's engine requests."""
    sent_as: Mapping[str, str] = field(default_factory=dict)
    """Maps names of fields, as errors have them, to the names that the client used."""
    span: trace.Span = field(init=False)
    """The trace's span of the call. What is done for the call belongs to it."""
    _started: float = field(default_factory=time.monotonic)
    _first_token_s: float | None = None
    _last_chunk_at: dict[tuple[str, int], float] = field(default_factory=dict)
    _prompt_tokens: dict[str, int] = field(default_factory=dict)
    _cached_tokens: int = 0
    _completion_tokens: int = 0
    _finish_reasons: list[str] = field(default_factory=list)
    _stats: list[RequestStats] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Serve knows the trace that the call belongs to, but does not make it the current one.
        carrier = _get_serve_request_context()._ray_trace_ctx
        parent = TraceContextTextMapPropagator().extract(carrier) if carrier else None
        self.span = trace.get_tracer("orthrus").start_span(self.endpoint, context=parent)
        # It is never detached: a call has a task of its own, and so a context of its own.
        context.attach(trace.set_span_in_context(self.span))

    def read(self, body: Body) -> None:
        """Take session, priority, cache salt and field names from the body. Names that are in `sent_as` already stay."""
        self.session = self.session or session_name(body.prompt_cache_key or "")
        self.priority, self.cache_salt = body.priority or 0, body.cache_salt or ""
        self.sent_as = {**body.sent_as, **self.sent_as}

    def add(self, chunk: Chunk, prompt_tokens: int) -> None:
        """Count a chunk of an engine request whose prompt has `prompt_tokens`."""
        self.add_prompt(chunk.request_id, prompt_tokens)
        tokens = len(chunk.token_ids)
        self._completion_tokens += tokens
        if tokens:
            self._note_tokens((chunk.request_id, chunk.index), tokens)
        if chunk.finish_reason is not None:
            self._finish_reasons.append(chunk.finish_reason)
        if chunk.stats is not None:
            self._stats.append(chunk.stats)
            self._observe("request_queue_time_seconds", chunk.stats.queue_seconds)
            if chunk.index == 0:
                # A prompt counts once, however many choices it has.
                self._cached_tokens += chunk.stats.cached_tokens
        self._spend(tokens)

    def _note_tokens(self, choice: tuple[str, int], tokens: int) -> None:
        """Measure the latency of a choice's tokens, which have just come."""
        now = time.monotonic()
        if self._first_token_s is None:
            self._first_token_s = now - self._started
            self._observe("time_to_first_token_seconds", self._first_token_s)
            self.span.add_event("first token")
        before = self._last_chunk_at.get(choice)
        if before is not None:
            self._observe("inter_token_latency_seconds", (now - before) / tokens)
        self._last_chunk_at[choice] = now

    def _observe(self, name: str, value: float) -> None:
        if self.metrics is not None:
            self.metrics.observe(name, value)

    def add_prompt(self, request_id: str, tokens: int) -> None:
        """Count the prompt of an engine request, once."""
        if request_id not in self._prompt_tokens:
            self._prompt_tokens[request_id] = tokens
            self._spend(tokens)

    def _spend(self, tokens: int) -> None:
        if self.quotas is not None and self.key is not None:
            self.quotas.spend(self.key.name, tokens)

    def end(self) -> None:
        """End the call: log what it used (as fields, if the log is JSON), count it in the metrics, and end its span."""
        seconds = time.monotonic() - self._started
        prompt, completion = sum(self._prompt_tokens.values()), self._completion_tokens
        cycles = sum(stats.cycles for stats in self._stats)
        fields: dict[str, Any] = {
            "endpoint": self.endpoint,
            "outcome": self.outcome,
            "key": self.key.name if self.key is not None else None,
            "prompt_tokens": prompt,
            "cached_tokens": self._cached_tokens,
            "completion_tokens": completion,
            "cycles": cycles,
            "passes": sum(stats.passes for stats in self._stats),
            "finish_reasons": self._finish_reasons,
            "first_token_s": self._first_token_s and round(self._first_token_s, 4),
            "duration_s": round(seconds, 4),
        }
        if self.prompts is not None:
            fields["prompts"] = self.prompts
        if self.metrics is not None:
            self.metrics.count(self.endpoint, self.outcome)
            if self._prompt_tokens:
                self._observe("e2e_request_latency_seconds", seconds)
                self._observe("request_prompt_tokens", prompt)
                self._observe("request_generation_tokens", completion)
        logger.info(
            "%s %s: %d + %d tokens in %.3f s",
            self.endpoint,
            self.outcome,
            prompt,
            completion,
            seconds,
            extra=fields,
        )
        if self.span.is_recording():
            self.span.set_attributes(
                {
                    "gen_ai.usage.input_tokens": prompt,
                    "gen_ai.usage.output_tokens": completion,
                    "gen_ai.response.finish_reasons": self._finish_reasons,
                    "orthrus.outcome": self.outcome,
                    "orthrus.cycles": cycles,
                }
            )
        self.span.end()
