"""A cache for answers that are costly and that anyone may ask for: each is made at most once a second."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Answer = TypeVar("Answer")

_SECONDS = 1.0


class Recent(Generic[Answer]):
    """Caches the result of `ask` for a second. Concurrent callers share one call of `ask`. Errors are not cached."""

    def __init__(
        self, ask: Callable[[], Awaitable[Answer]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """clock: seconds, for tests."""
        self._ask, self._clock = ask, clock
        self._lock = asyncio.Lock()
        self._known: tuple[float, Answer] | None = None

    async def __call__(self) -> Answer:
        async with self._lock:
            if self._known is None or self._clock() - self._known[0] >= _SECONDS:
                self._known = self._clock(), await self._ask()
            return self._known[1]
