"""An answer as server-sent events, for the APIs whose events have a `type`."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Protocol

from fastapi.responses import StreamingResponse

from orthrus.deployments.access.call import Call
from orthrus.deployments.failures.failure import Failure, describe_failure
from orthrus.deployments.generation.handler import Answer
from orthrus.deployments.generation.text_chunk import TextChunk
from orthrus.deployments.http.sse import named_sse


def event_stream(events: AsyncIterator[str]) -> StreamingResponse:
    """The response that streams encoded events."""
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


class EventFormat(Protocol):
    """How an API streams an answer: as events that have a `type`."""

    def opening(self) -> list[dict[str, Any]]:
        """The events before the first chunk's."""
        ...

    def events(self, item: TextChunk) -> list[dict[str, Any]]:
        """The events of one chunk. Those of the last chunk include the end of the stream."""
        ...

    def failed(self, failure: Failure) -> list[dict[str, Any]]:
        """The events that end a stream after an error."""
        ...


async def stream_answer(
    call: Call,
    answer: Answer,
    out: EventFormat,
    before_end: Callable[[], Awaitable[None]] | None = None,
) -> StreamingResponse:
    """An answer of one choice as server-sent events.

    before_end: awaited before the client is told of the end.
    Raises what `generate` raises before the first chunk. A later error is an event, since the status has been sent.
    """
    chunks = answer.chunks
    # Awaited here, while a refusal can still be an HTTP status.
    first = await anext(chunks)

    async def events() -> AsyncIterator[str]:
        try:
            async with aclosing(chunks):
                yield "".join(map(named_sse, out.opening()))
                entry: tuple[int, TextChunk] | None = first
                while entry is not None:
                    _, item = entry
                    happened = out.events(item)
                    if item.finish_reason is not None and before_end is not None:
                        await before_end()
                    if happened:
                        yield "".join(map(named_sse, happened))
                    entry = await anext(chunks, None)
            call.outcome = "ok"
        except Exception as error:
            call.outcome = type(error).__name__
            yield "".join(map(named_sse, out.failed(describe_failure(error, call.sent_as))))

    return event_stream(events())
