"""How much a key may use: requests and tokens a minute, counted in one place for all ingress replicas.

Each limit is a bucket that holds a minute's worth and fills steadily. A request is admitted, before its body is read, if there
is a request left and the token bucket is not empty. Its tokens are not known then: they are taken as they come, prompt and
answer, and may overdraw the bucket, which has to fill again before the next request. So no answer is cut, a key
never gets more than its rate in the long run, and `max_tokens` need not be guessed.

One `RateLimiter` keeps the buckets of an application. Ingress replicas ask it for every request of a key with limits, which
makes the request limit exact, and send it the tokens they have served with that and every `SETTLE_SECONDS`. While it can't
be reached, they admit: a lost counter must not stop the service. It starts with full buckets.
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
    """Of one key; None is unlimited."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    def __bool__(self) -> bool:
        return self.requests_per_minute is not None or self.tokens_per_minute is not None


class Bucket:
    """Fills steadily with `per_minute` a minute up to as much. Its level may be below zero."""

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
        """Until it holds `level`; 0 if it does."""
        missing = level - self.level(now)
        # What a sum of many small parts is short by is not waited for.
        return missing * 60 / self.per_minute if missing > 1e-6 else 0.0


@dataclass(frozen=True)
class Quota:
    """What is left of one limit."""

    limit: int
    remaining: int
    reset: float
    """Seconds until all of the limit is there again."""


@dataclass(frozen=True)
class Standing:
    """Where a key stands with its limits."""

    quotas: Mapping[str, Quota]
    """By what is counted: "requests", "tokens"."""
    retry_after: float = 0.0
    """Seconds until the next request is admitted, 0 if this one was."""
    exhausted: str = ""
    """The limit that refused this request, if one did."""

    @property
    def headers(self) -> dict[str, str]:
        """OpenAI's, named after the quotas: "requests", "tokens"."""
        headers = {}
        for what, quota in self.quotas.items():
            headers[f"x-ratelimit-limit-{what}"] = str(quota.limit)
            headers[f"x-ratelimit-remaining-{what}"] = str(quota.remaining)
            headers[f"x-ratelimit-reset-{what}"] = duration(quota.reset)
        return headers


def duration(seconds: float) -> str:
    """As OpenAI writes it: 6m0s, 1.5s."""
    minutes, rest = divmod(math.ceil(seconds * 1000), 60_000)
    return f"{minutes}m{rest // 1000}s" if minutes else f"{rest / 1000:g}s"


class RateLimiter:
    """The buckets of all keys. `clock`: seconds, for tests."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, str], Bucket] = {}

    async def admit(self, key: str, limits: Limits, spent: Mapping[str, int]) -> Standing:
        """Take one request from the key's limits, unless they are exhausted; `spent` as `spend` has it."""
        await self.spend(spent)
        now = self._clock()
        requests = self._bucket(key, "requests", limits.requests_per_minute, now)
        tokens = self._bucket(key, "tokens", limits.tokens_per_minute, now)
        buckets = {what: b for what, b in (("requests", requests), ("tokens", tokens)) if b is not None}
        # One token, for what a request costs is not known yet.
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
        """The key's bucket; a fresh one, full, where its limit has changed."""
        if per_minute is None:
            self._buckets.pop((key, what), None)
            return None
        bucket = self._buckets.get((key, what))
        if bucket is None or bucket.per_minute != per_minute:
            bucket = self._buckets[key, what] = Bucket(per_minute, now)
        return bucket


class Quotas:
    """An ingress replica's side: asks the limiter for each request, and tells it of tokens in batches."""

    def __init__(self, limiter: Any) -> None:
        """limiter: handle of a `RateLimiter` deployment."""
        self._limiter = limiter
        self._spent: Counter[str] = Counter()
        self._settling: asyncio.Task[None] | None = None

    async def admit(self, key: str, limits: Limits) -> Standing:
        """Where the key stands, with one request taken unless it has to wait."""
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
