"""The calls of the API, HTTP and gRPC alike: who may make them, and what each one did, for limits, log and traces."""

import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from opentelemetry import context, trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from ray.exceptions import TaskCancelledError
from ray.serve.context import _get_serve_request_context
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.access.keys import ApiKey, KeyRing
from deployments.access.rate_limits import Limits, Quotas
from deployments.access.request_metrics import RequestMetrics
from deployments.bodies.body import Body
from deployments.config.api import ApiConfig
from deployments.failures.failures import InvalidKey, RateLimited
from orthrus.errors import RequestError
from orthrus.requests.request import Chunk, RequestStats

logger = logging.getLogger("ray.serve")

# Where Serve takes a client's request id from, over HTTP and gRPC; it logs the id and sends it back.
_REQUEST_ID = ("x-request-id", "request_id")
_SESSION = "x-session-id"
# Where Anthropic's clients have it.
_API_KEY = "x-api-key"
# Endpoints that answer without an engine.
_WITHOUT_TOKENS = ("tokenize", "detokenize", "messages.count_tokens")
_SAFE_ID = re.compile(r"[!-~]{1,128}")


@dataclass
class Call:
    """One call under way, and what it has used; `Gate.admit` fills in whose it is. Ends with `end`, whatever its end.

    headers: what the answer says of the key's limits. prompts: their texts for the log, None to keep them out of it.
    outcome: "ok", "cancelled", or the name of the exception that ended it. span: what is done for the call belongs to it.
    session: what the client calls the conversation that the call belongs to (deployments/router.py), "" for none.
    metrics: where it is counted, if it asks for tokens.
    priority, cache_salt: of the call's engine requests. sent_as: the client's names of fields that errors name otherwise.
    """

    endpoint: str
    key: ApiKey | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    prompts: list[str] | None = None
    quotas: Quotas | None = None
    outcome: str = "cancelled"
    session: str = ""
    metrics: RequestMetrics | None = None
    priority: int = 0
    cache_salt: str = ""
    sent_as: Mapping[str, str] = field(default_factory=dict)
    span: trace.Span = field(init=False)
    _started: float = field(default_factory=time.monotonic)
    _first_token_s: float | None = None
    _last_chunk_at: dict[tuple[str, int], float] = field(default_factory=dict)
    _prompt_tokens: dict[str, int] = field(default_factory=dict)
    _cached_tokens: int = 0
    _completion_tokens: int = 0
    _finish_reasons: list[str] = field(default_factory=list)
    _stats: list[RequestStats] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Serve has the trace that the call belongs to, and does not make it current for the code that it runs.
        carrier = _get_serve_request_context()._ray_trace_ctx
        parent = TraceContextTextMapPropagator().extract(carrier) if carrier else None
        self.span = trace.get_tracer("orthrus").start_span(self.endpoint, context=parent)
        # Never detached: a call has a task, and so a context, of its own.
        context.attach(trace.set_span_in_context(self.span))

    def read(self, body: Body) -> None:
        """Note what the body says of the call itself."""
        self.session = self.session or body.prompt_cache_key or ""
        self.priority, self.cache_salt = body.priority or 0, body.cache_salt or ""
        self.sent_as = body.sent_as

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
        """Measure how long a choice's tokens, which have just come, were waited for."""
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
        """Write what the call did into the log, as fields where the log is JSON, and onto its trace."""
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


class Gate:
    """Lets calls in: by their headers alone, before anything else of them is read."""

    def __init__(
        self, config: ApiConfig, limiter: DeploymentHandle | None, metrics: RequestMetrics | None = None
    ) -> None:
        """limiter: a `RateLimiter`, where there are keys. metrics: where calls for tokens are counted.

        Raises ConfigError if the keys can't be read.
        """
        self._config = config
        self._keys = KeyRing(config) if config.has_keys else None
        self._quotas = Quotas(limiter) if limiter is not None else None
        self._metrics = metrics

    def identify(self, metadata: Mapping[str, Any]) -> ApiKey | None:
        """The key of a call with this metadata (names in lower case), None where none is needed.

        Raises InvalidKey, and RequestError for a request id that can't be logged safely.
        """
        for name in _REQUEST_ID:
            if (given := metadata.get(name)) and not _SAFE_ID.fullmatch(given):
                raise RequestError(f"{name} must be 1 to 128 ASCII characters without spaces", name)
        if self._keys is None:
            return None
        scheme, _, secret = str(metadata.get("authorization", "")).partition(" ")
        if scheme.lower() != "bearer":
            secret = str(metadata.get(_API_KEY, ""))
        if not secret:
            raise InvalidKey(f"no API key: send it as Authorization: Bearer KEY, or as {_API_KEY}: KEY")
        key = self._keys.find(secret.strip())
        if key is None:
            raise InvalidKey("this API key is not known here")
        if key.expired:
            raise InvalidKey(f"this API key has expired, on {key.expires:%Y-%m-%d at %H:%M UTC}")
        return key

    async def admit(self, call: Call, metadata: Mapping[str, Any]) -> None:
        """Let the call go ahead, one request of its key's limits taken. Raises RateLimited, and as `identify` does."""
        if call.endpoint not in _WITHOUT_TOKENS:
            call.metrics = self._metrics
        call.key = key = self.identify(metadata)
        call.session = metadata.get(_SESSION, "")
        if self._config.log_prompts:
            call.prompts = []
        if key is None or self._quotas is None:
            return
        limits = Limits(
            key.requests_per_minute or self._config.requests_per_minute,
            key.tokens_per_minute or self._config.tokens_per_minute,
        )
        if not limits:
            return
        standing = await self._quotas.admit(key.name, limits)
        call.headers = standing.headers
        if standing.exhausted:
            limit = standing.quotas[standing.exhausted].limit
            raise RateLimited(
                f"key {key.name} has used its {limit} {standing.exhausted} a minute: try again in "
                f"{standing.retry_after:.1f} s",
                standing.retry_after,
            )
        if limits.tokens_per_minute is not None:
            call.quotas = self._quotas


class CallMiddleware:
    """Ends the calls that HTTP endpoints have left in `request.state.call`, and puts their headers on the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.setdefault("state", {})

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start" and "call" in state:
                MutableHeaders(scope=message).update(state["call"].headers)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except (ClientDisconnect, TaskCancelledError):
            pass  # The client has gone, and Serve with it: there is nobody to tell.
        except Exception as error:
            if "call" in state:
                state["call"].outcome = type(error).__name__
            raise
        finally:
            if "call" in state:
                state["call"].end()
