"""The data of the page's cluster view, as one stream of events that all viewers share.

Without viewers, nothing is collected. With viewers, there is one event each second. Parts that cost more come in fewer events
(`Cluster.parts`).
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from orthrus.deployments.http.sse import sse

PERIOD_S = 1.0
MAX_STREAM_S = 30.0
"""A stream ends after this time, and the page opens another. An update lets requests finish, so an open page holds it up for this
time at most."""

Part = Callable[[], Awaitable[dict[str, Any]]]
"""Gives fields of an event. If it fails, the event lacks them."""


class ClusterFeed:
    """One producer of events for any number of viewers. It runs while there are viewers."""

    def __init__(self, parts: Sequence[tuple[Part, int]], period_s: float = PERIOD_S) -> None:
        """parts: each with how many events apart it is collected."""
        self._parts = parts
        self._period = period_s
        self._viewers = 0
        self._producer: asyncio.Task[None] | None = None
        self._changed = asyncio.Condition()
        self._number = 0
        self._event = ""
        # The last value of each field: a new viewer's first event has all of them.
        self._known: dict[str, Any] = {}

    async def events(self, seconds: float = MAX_STREAM_S) -> AsyncIterator[str]:
        """Server-sent events for one viewer, for so many seconds. A slow viewer misses some."""
        self._viewers += 1
        if self._producer is None:
            self._known, self._event = {}, ""
            self._producer = asyncio.create_task(self._produce())
        end, seen = time.monotonic() + seconds, self._number
        try:
            if self._event:
                yield sse(self._known)
            while time.monotonic() < end:
                async with self._changed:
                    while self._number == seen:
                        await self._changed.wait()
                    seen, event = self._number, self._event
                yield event
        finally:
            self._viewers -= 1
            if not self._viewers and self._producer is not None:
                self._producer.cancel()
                self._producer = None

    async def _produce(self) -> None:
        tick = 0
        while True:
            started = time.monotonic()
            due = [part for part, every in self._parts if tick % every == 0]
            told: dict[str, Any] = {"at": time.time()}
            for fields in await asyncio.gather(*(part() for part in due), return_exceptions=True):
                if isinstance(fields, dict):
                    told |= fields
            self._known |= told
            async with self._changed:
                self._event, self._number = sse(told), self._number + 1
                self._changed.notify_all()
            tick += 1
            await asyncio.sleep(max(0.0, self._period - (time.monotonic() - started)))
