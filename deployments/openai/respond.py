"""An answer as an HTTP response in OpenAI's form, whole or streamed."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

from fastapi.responses import JSONResponse, Response
from pydantic_core import to_json

from orthrus.deployments.access.call import Call
from orthrus.deployments.failures.failure import describe_failure
from orthrus.deployments.generation.handler import Answer
from orthrus.deployments.generation.text_chunk import TextChunk
from orthrus.deployments.http.events import event_stream
from orthrus.deployments.http.sse import sse
from orthrus.deployments.openai.format import CompletionFormat
from orthrus.requests.request import RequestStats


async def respond(call: Call, answer: Answer, out: CompletionFormat, *, stream: bool) -> Response:
    """The response to a call. Raises what `generate` raises, as long as no status has been sent."""
    if stream:
        # Awaited here, while a refusal can still be an HTTP status.
        first = await anext(answer.chunks)
        return event_stream(_events(call, answer, out, first))
    choices = await answer.choices()
    call.outcome = "ok"
    if answer.params.prompt_logprobs is None:
        return JSONResponse(out.whole(choices))
    # With a prompt's log-probabilities the answer may be long. It is made in a thread, so that other streams go on meanwhile, and
    # encoded by to_json, which blocks the event loop for a seventh of the time that JSONResponse would.
    encoded = await asyncio.to_thread(lambda: to_json(out.whole(choices)))
    return Response(encoded, media_type="application/json")


async def _events(
    call: Call, answer: Answer, out: CompletionFormat, first: tuple[int, TextChunk]
) -> AsyncIterator[str]:
    """Server-sent events. An error after the first chunk is an event too, since the status has been sent."""
    stats: dict[int, RequestStats] = {}

    async def event(index: int, item: TextChunk) -> str:
        """The event of a chunk, "" if there is none."""
        if item.chunk.stats is not None:
            stats[index] = item.chunk.stats
        told = out.take(item)
        if told is None:
            return ""
        if out.scores_prompts:
            return await asyncio.to_thread(out.stream, told, index)
        return out.stream(told, index)

    try:
        async with aclosing(answer.chunks):
            for index in range(answer.num_choices):
                if (opening := out.opening(index)) is not None:
                    yield out.sse(opening)
            if text := await event(*first):
                yield text
            async for index, item in answer.chunks:
                if text := await event(index, item):
                    yield text
        if out.include_usage:
            yield out.sse(out.usage_event([stats[i] for i in sorted(stats)]))
        call.outcome = "ok"
    except Exception as error:
        call.outcome = type(error).__name__
        yield sse(describe_failure(error, call.sent_as).body)
    yield "data: [DONE]\n\n"
