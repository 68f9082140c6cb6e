"""The engine in a thread of its own, fed through a queue: a slow client never stalls a pass.

asyncio code calls `generate`; the thread runs passes while there is work and sleeps on its inbox while there is none. The
chunks of a pass cross to each event loop in one call.
"""

import asyncio
import logging
import queue
import threading
from collections import defaultdict
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from orthrus.engine import Engine, EngineStats
from orthrus.errors import RequestError
from orthrus.request import Chunk, Request

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Listener:
    """Where a request's chunks go: a queue that belongs to `loop`."""

    request: Request
    loop: asyncio.AbstractEventLoop
    chunks: "asyncio.Queue[Chunk]"


@dataclass(frozen=True)
class _Cancel:
    request_id: str


class AsyncEngine:
    """Runs `engine` until `close`. All methods may be called from any thread; `generate` from any event loop."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.error: BaseException | None = None
        self._stopped = False
        self._inbox: queue.SimpleQueue[_Listener | _Cancel | None] = queue.SimpleQueue()
        self._listeners: dict[str, _Listener] = {}
        self._thread = threading.Thread(target=self._run, name="orthrus-engine", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        return not self._stopped

    @property
    def stats(self) -> EngineStats:
        return self.engine.stats

    async def generate(self, request: Request) -> AsyncGenerator[Chunk]:
        """Chunks of all choices of `request` as passes commit them. Closing the iterator cancels the request.

        Raises RequestError before anything runs, and RuntimeError if the engine has failed.
        """
        self.engine.check(request)
        listener = _Listener(request, asyncio.get_running_loop(), asyncio.Queue())
        self._inbox.put(listener)
        # Asked after the put: the thread empties its inbox once more after it has set the flag.
        if self._stopped:
            raise RuntimeError(f"the engine has stopped: {self.error or 'it was closed'}")
        unfinished = request.params.n
        try:
            while unfinished:
                chunk = await listener.chunks.get()
                if chunk.finish_reason == "error":
                    yield chunk
                    return  # One choice's end ends them all.
                unfinished -= chunk.finish_reason is not None
                yield chunk
        finally:
            if unfinished:
                self._inbox.put(_Cancel(request.request_id))

    def close(self) -> None:
        """Stop after the pass under way; unfinished requests end with an error chunk."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_messages():
                self._deliver(self.engine.step())
        except Exception as error:
            logger.exception("the engine failed")
            self.error = error
        self._stopped = True
        self._fail_all(f"the engine failed: {self.error}" if self.error else "the engine was closed")

    def _take_messages(self) -> bool:
        """Handle what is in the inbox, waiting for a message if there is nothing else to do. False: close."""
        while True:
            try:
                message = self._inbox.get(block=not self.engine.has_work)
            except queue.Empty:
                return True
            if message is None:
                return False
            if isinstance(message, _Cancel):
                self.engine.cancel(message.request_id)
                self._listeners.pop(message.request_id, None)
                continue
            request = message.request
            try:
                self.engine.submit(request)
            except RequestError as error:
                # `generate` has checked it; only a request id in use again can have come between.
                self._post(
                    message, [Chunk(request.request_id, 0, (), finish_reason="error", error=error.message)]
                )
            else:
                self._listeners[request.request_id] = message

    def _deliver(self, chunks: list[Chunk]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Listener, Chunk]]] = defaultdict(list)
        for chunk in chunks:
            listener = self._listeners.get(chunk.request_id)
            if listener is not None:
                by_loop[listener.loop].append((listener, chunk))
        for loop, deliveries in by_loop.items():
            _call(loop, deliveries)
        for request_id in {c.request_id for c in chunks if c.finish_reason is not None}:
            if not self.engine.is_live(request_id):
                self._listeners.pop(request_id, None)

    def _post(self, listener: _Listener, chunks: list[Chunk]) -> None:
        _call(listener.loop, [(listener, chunk) for chunk in chunks])

    def _fail_all(self, message: str) -> None:
        """Tell every request, also those still in the inbox, that it will not finish."""
        while not self._inbox.empty():
            waiting = self._inbox.get()
            if isinstance(waiting, _Listener):
                self._listeners[waiting.request.request_id] = waiting
        for request_id, listener in self._listeners.items():
            self.engine.cancel(request_id)
            self._post(listener, [Chunk(request_id, 0, (), finish_reason="error", error=message)])
        self._listeners.clear()


def _call(loop: asyncio.AbstractEventLoop, deliveries: list[tuple[_Listener, Chunk]]) -> None:
    """Put the chunks into their queues on `loop`; a loop that has been closed has nobody left to tell."""

    def put() -> None:
        for listener, chunk in deliveries:
            listener.chunks.put_nowait(chunk)

    try:
        loop.call_soon_threadsafe(put)
    except RuntimeError:
        logger.debug("event loop closed before its chunks arrived")
