"""Rate limits of keys: requests and tokens a minute, counted in one place for all ingress replicas.

Each limit is a token bucket, which holds a minute's worth and refills steadily. A request is admitted, before its body is read,
if one request is left and the bucket of tokens is not empty. How many tokens it will use is not known then. Prompt and generated
tokens are taken as they come. They may overdraw the bucket, which then has to refill before the next request. So no answer is
cut, a key never gets more than its rate in the long run, and nobody has to guess `max_tokens`.

One `RateLimiter` keeps the buckets of an application. Ingress replicas ask it about every request of a key with limits, so the
limit of requests is exact. They report served tokens in these calls, and every `SETTLE_SECONDS`. While the limiter can't be
reached, they admit all requests: a lost counter must not stop the service. A new limiter starts with full buckets.
"""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger("ray.serve")

SETTLE_SECONDS = 1.0
_ANSWER_SECONDS = 1.0
"""How long an ingress waits for the limiter."""


@dataclass(frozen=True)
class Limits:
    """The limits of one key. None is unlimited."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    def __bool__(self) -> bool:
        return self.requests_per_minute is not None or self.tokens_per_minute is not None


class Bucket:
    """Holds up to `per_minute`, and refills at that rate. Its level may be below zero. Times (`now`) are in seconds."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def level(self, now: float) -> float:
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / 60)
        self._at = now
        return self._level

    def take(self, amount: int, now: float) -> None:
        self._level = self.level(now) - amount

    def seconds_to(self, level: float, now: float) -> float:
        """Seconds until it holds `level`, 0 if it does."""
        missing = level - self.level(now)
        # A rounding error of many small additions is not missing.
        return missing * 60 / self.per_minute if missing > 1e-6 else 0.0


@dataclass(frozen=True)
class Quota:
    """What is left of one limit."""

    limit: int
    remaining: int
    reset: float
    """Seconds until the bucket is full again."""


@dataclass(frozen=True)
class Standing:
    """Where a key stands with its limits."""

    quotas: Mapping[str, Quota]
    """By what the limit counts: "requests" or "tokens"."""
    retry_after: float = 0.0
    """Seconds until the next request is admitted, 0 if this one was."""
    exhausted: str = ""
    """The key in `quotas` of the limit that refused this request, "" if none did."""

    @property
    def headers(self) -> dict[str, str]:
        """OpenAI's rate limit headers."""
        headers = {}
        for what, quota in self.quotas.items():
            headers[f"x-ratelimit-limit-{what}"] = str(quota.limit)
            headers[f"x-ratelimit-remaining-{what}"] = str(quota.remaining)
            headers[f"x-ratelimit-reset-{what}"] = duration(quota.reset)
        return headers


def duration(seconds: float) -> str:
    """Seconds as OpenAI writes them: 6m0s, 1.5s."""
    minutes, rest = divmod(math.ceil(seconds * 1000), 60_000)
    return f"{minutes}m{rest // 1000}s" if minutes else f"{rest / 1000:g}s"


class RateLimiter:
    """The buckets of all keys. `clock`: seconds, for tests."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, str], Bucket] = {}

    async def admit(self, key: str, limits: Limits, spent: Mapping[str, int]) -> Standing:
        """Take one request from the key's limits, unless one of them is exhausted. spent: as in `spend`, and taken first."""
        await self.spend(spent)
        now = self._clock()
        requests = self._bucket(key, "requests", limits.requests_per_minute, now)
        tokens = self._bucket(key, "tokens", limits.tokens_per_minute, now)
        buckets = {what: b for what, b in (("requests", requests), ("tokens", tokens)) if b is not None}
        # One token must be left. How many the request will use is not known yet.
        waits = {what: bucket.seconds_to(1, now) for what, bucket in buckets.items()}
        exhausted = max(waits, key=lambda what: waits[what])
        if waits[exhausted] == 0 and requests is not None:
            requests.take(1, now)
        quotas = {
            what: Quota(
                bucket.per_minute,
                max(0, int(bucket.level(now) + 1e-6)),
                bucket.seconds_to(bucket.per_minute, now),
            )
            for what, bucket in buckets.items()
        }
        return Standing(quotas, waits[exhausted], exhausted if waits[exhausted] else "")

    async def spend(self, spent: Mapping[str, int]) -> None:
        """Take tokens, by key, from the buckets of keys that have a token limit."""
        for key, amount in spent.items():
            if (bucket := self._buckets.get((key, "tokens"))) is not None:
                bucket.take(amount, self._clock())

    def _bucket(self, key: str, what: str, per_minute: int | None, now: float) -> Bucket | None:
        """The key's bucket, None without a limit. Where the limit has changed, it is a new one, which is full."""
        if per_minute is None:
            self._buckets.pop((key, what), None)
            return None
        bucket = self._buckets.get((key, what))
        if bucket is None or bucket.per_minute != per_minute:
            bucket = self._buckets[key, what] = Bucket(per_minute, now)
        return bucket


class Quotas:
    """An ingress replica's client of the limiter: asks about each request, and reports tokens in batches."""

    def __init__(self, limiter: Any) -> None:
        """limiter: handle of a `RateLimiter` deployment."""
        self._limiter = limiter
        self._spent: Counter[str] = Counter()
        self._settling: asyncio.Task[None] | None = None

    async def admit(self, key: str, limits: Limits) -> Standing:
        """Take one request from the key's limits, unless one of them is exhausted. If the limiter can't be asked, admit."""
        try:
            answer = self._limiter.admit.remote(key, limits, self._take_spent())
            return await asyncio.wait_for(answer, _ANSWER_SECONDS)
        except Exception as error:
            logger.warning("the rate limiter does not answer, a request is admitted unseen: %r", error)
            return Standing({})

    def spend(self, key: str, tokens: int) -> None:
        """Count tokens that the key has been served."""
        self._spent[key] += tokens
        if self._settling is None or self._settling.done():
            self._settling = asyncio.create_task(self._settle())

    async def _settle(self) -> None:
        while self._spent:
            await asyncio.sleep(SETTLE_SECONDS)
            try:
                await self._limiter.spend.remote(self._take_spent())
            except Exception as error:
                logger.warning("the rate limiter does not answer, tokens are not counted: %r", error)

    def _take_spent(self) -> dict[str, int]:
        spent, self._spent = self._spent, Counter()
        return dict(spent)
