"""Admits calls by their API keys and rate limits."""

import re
from collections.abc import Mapping
from typing import Any

from ray.serve.handle import DeploymentHandle

from orthrus.deployments.access.call import Call, session_name
from orthrus.deployments.access.keys import ApiKey, KeyRing
from orthrus.deployments.access.rate_limits import Limits, Quotas
from orthrus.deployments.access.request_metrics import RequestMetrics
from orthrus.deployments.config.api import ApiConfig
from orthrus.deployments.failures.errors import InvalidKey, RateLimited
from orthrus.errors import RequestError

# Serve takes a client's request id from these, over HTTP and gRPC. It logs the id and sends it back.
_REQUEST_ID = ("x-request-id", "request_id")
_SESSION = "x-session-id"
# Anthropic's clients send the key in this header.
_API_KEY = "x-api-key"
# Endpoints that answer without an engine.
_WITHOUT_TOKENS = ("tokenize", "detokenize", "messages.count_tokens")
_SAFE_ID = re.compile(r"[!-~]{1,128}")


class Gate:
    """Admits calls by their headers alone, before their bodies are read."""

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
        """Admit the call, and take one request from its key's limits. Sets the call's key, session and limits.

        Raises RateLimited, and what `identify` raises.
        """
        if call.endpoint not in _WITHOUT_TOKENS:
            call.metrics = self._metrics
        call.key = key = self.identify(metadata)
        call.session = session_name(metadata.get(_SESSION, ""))
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
