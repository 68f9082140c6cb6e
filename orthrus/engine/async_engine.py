"""The engine in a thread of its own, fed through a queue: a slow client never stalls a pass.

asyncio code calls `run`. The thread runs passes while there is work, and sleeps on its inbox while there is none. All chunks
of a pass go to each event loop in one call, and to each sink in one call.
"""

import asyncio
import logging
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from orthrus.engine.engine import Engine
from orthrus.engine.stats import EngineStats
from orthrus.errors import RequestError
from orthrus.kernels.ranks import RankError
from orthrus.requests.request import Chunk, Request
from orthrus.text.token_mask import TokenMask

logger = logging.getLogger(__name__)

_TELL_SECONDS = 1.0
"""How long to wait for an event loop to report the engine's failure to its requests."""

Sink = Callable[[list[Chunk]], None]
"""Takes the chunks of one or more requests, those of each request in order. Called on the event loop of their callers."""


@dataclass(frozen=True)
class _Listener:
    """A request, and where its chunks go."""

    request: Request
    masks: list[TokenMask | None]
    """What `Engine.prepare` returned for the request."""
    sink: Sink
    """Where the chunks go."""
    loop: asyncio.AbstractEventLoop
    """The event loop that `sink` and `ended` belong to."""
    ended: "asyncio.Future[None]"
    """Done when there are no more chunks."""


@dataclass(frozen=True)
class _Cancel:
    listener: _Listener


class AsyncEngine:
    """Runs `engine` until `close`. All methods may be called from any thread; `run` from any event loop."""

    def __init__(self, engine: Engine, on_failure: Callable[[Exception], None] = lambda error: None) -> None:
        """on_failure: called on the engine's thread with the error that stopped the engine, after all requests have ended.

        It may end the process. Requests that come before it returns wait for it, and then fail.
        """
        self.engine = engine
        self._error: Exception | None = None
        self._on_failure = on_failure
        self._stopped = False
        self._inbox: queue.SimpleQueue[_Listener | _Cancel | RankError | None] = queue.SimpleQueue()
        self._listeners: dict[str, _Listener] = {}
        self._thread = threading.Thread(target=self._run, name="orthrus-engine", daemon=True)
        self._thread.start()
        engine.ranks.watch(self._inbox.put)  # Into the inbox, because the thread may be waiting on it.

    @property
    def stats(self) -> EngineStats:
        """As of the engine's last step."""
        return self.engine.stats

    async def run(self, request: Request, sink: Sink) -> None:
        """Run `request` to its end, and give its chunks to `sink`. If requests share a sink, one call has all chunks of a pass.

        If one choice ends with an error, the others end too. Cancelling the call cancels the request. Raises RequestError
        before anything runs, and RuntimeError if the engine has stopped.
        """
        params = request.params
        if params.grammar is None and not params.has_word_rules:
            masks = self.engine.prepare(request)
        else:  # A new grammar takes up to a second to compile.
            masks = await asyncio.to_thread(self.engine.prepare, request)
        loop = asyncio.get_running_loop()
        listener = _Listener(request, masks, sink, loop, loop.create_future())
        self._inbox.put(listener)
        # Checked after the put: the thread empties its inbox once more after it has set the flag.
        if self._stopped:
            raise RuntimeError(f"the engine has stopped: {self._error or 'it was closed'}")
        try:
            await listener.ended
        except asyncio.CancelledError:
            self._inbox.put(_Cancel(listener))
            raise

    def close(self) -> None:
        """Stop after the pass under way; unfinished requests end with an error chunk."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            self.engine.use_device()
            while self._take_messages():
                self._deliver(self.engine.step())
        except BaseException as raised:  # A panic of Rust code is no Exception.
            logger.exception("the engine failed")
            error = raised
            if not isinstance(error, Exception):
                error = RuntimeError(f"{type(raised).__name__}: {raised}")
            self._error = error
            try:
                _wait_for(self._fail_all(_failed(error)))
            finally:
                self._on_failure(error)
        self._stopped = True
        self._fail_all(_failed(self._error) if self._error else "the engine was closed")

    def _take_messages(self) -> bool:
        """Handle all messages in the inbox. If the engine has no work, wait for one. Returns False if the engine is to close."""
        while True:
            try:
                message = self._inbox.get(block=not self.engine.has_work)
            except queue.Empty:
                return True
            if message is None:
                return False
            if isinstance(message, RankError):
                raise message
            if isinstance(message, _Cancel):
                request_id = message.listener.request.request_id
                # Another call may have the id by now, or may have had it first.
                if self._listeners.get(request_id) is message.listener:
                    self.engine.cancel(request_id)
                    del self._listeners[request_id]
                continue
            request = message.request
            try:
                self.engine.submit(request, message.masks)
            except RequestError as error:
                # `run` has checked the request. Since then, only another request with its id can have started.
                _post(message.loop, {message.sink: [_failure(request.request_id, error.message)]}, [message])
            else:
                self._listeners[request.request_id] = message

    def _deliver(self, chunks: list[Chunk]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, dict[Sink, list[Chunk]]] = defaultdict(
            lambda: defaultdict(list)
        )
        ended: dict[asyncio.AbstractEventLoop, list[_Listener]] = defaultdict(list)
        for chunk in chunks:
            listener = self._listeners.get(chunk.request_id)
            if listener is not None:
                by_loop[listener.loop][listener.sink].append(chunk)
                if chunk.finish_reason == "error":
                    self.engine.cancel(chunk.request_id)
        # After all chunks: several choices of a request may end in one pass.
        for request_id in {chunk.request_id for chunk in chunks if chunk.finish_reason is not None}:
            if not self.engine.is_live(request_id) and request_id in self._listeners:
                listener = self._listeners.pop(request_id)
                ended[listener.loop].append(listener)
        for loop, by_sink in by_loop.items():
            _post(loop, by_sink, ended[loop])

    def _fail_all(self, message: str) -> set[asyncio.AbstractEventLoop]:
        """End every request with an error chunk, those in the inbox included. Returns the event loops of their callers."""
        listeners = list(self._listeners.values())
        self._listeners.clear()
        while not self._inbox.empty():
            waiting = self._inbox.get()
            if isinstance(waiting, _Listener):
                listeners.append(waiting)
        for listener in listeners:
            request_id = listener.request.request_id
            self.engine.cancel(request_id)
            chunk = replace(_failure(request_id, message), engine_failed=self._error is not None)
            _post(listener.loop, {listener.sink: [chunk]}, [listener])
        return {listener.loop for listener in listeners}


def _failed(error: Exception) -> str:
    return str(error) if isinstance(error, RankError) else f"the engine failed: {error}"


def _failure(request_id: str, message: str) -> Chunk:
    return Chunk(request_id, 0, (), finish_reason="error", error=message)


def _post(loop: asyncio.AbstractEventLoop, by_sink: dict[Sink, list[Chunk]], ended: list[_Listener]) -> None:
    """On `loop`, give chunks to their sinks, and then end the calls of `ended`. Does nothing if the loop is closed."""

    def hand_over() -> None:
        for sink, chunks in by_sink.items():
            sink(chunks)
        for listener in ended:
            if not listener.ended.done():
                listener.ended.set_result(None)

    try:
        loop.call_soon_threadsafe(hand_over)
    except RuntimeError:
        logger.debug("event loop closed before its chunks arrived")


def _wait_for(loops: Iterable[asyncio.AbstractEventLoop]) -> None:
    """Wait until the loops have run what was posted to them. A loop may hang, so wait at most `_TELL_SECONDS` for each."""
    for loop in loops:
        done = threading.Event()
        try:
            # Scheduled twice, to run one round of callbacks later: some loops write to sockets only at the end of a round.
            loop.call_soon_threadsafe(loop.call_soon, done.set)
        except RuntimeError:
            continue
        done.wait(_TELL_SECONDS)
