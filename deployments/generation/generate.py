"""The way of a request through the ingress, the same for HTTP and gRPC: token ids to a replica, chunks back, text out."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.access.calls import Call
from deployments.chat.output import ChatDelta, ChatSplitter, joined
from deployments.failures.failures import EXPECTED, GenerationFailed, unwrap
from deployments.generation.failover import generate_on_replica
from deployments.link.chunk_link import ChunkReceiver
from orthrus.errors import RequestError
from orthrus.requests.request import Chunk, Request, RequestStats, SamplingParams, joined_chunks
from orthrus.text.stream import TextStream

MAX_STOP_CHARACTERS = 1 << 16
MAX_SCORES = 1 << 18
"""Log-probabilities of prompts in one answer: some 20 MB of JSON."""
_MOST_PROMPTS_AT_ONCE = 128
"""Of one request: far fewer than may wait for a replica."""


@dataclass(frozen=True)
class TextChunk:
    """A chunk of choice `index` with the text that has become certain; in a chat, taken apart as `delta`.

    finish_reason: "stop", "length" or "tool_calls" in a choice's last chunk. reasoning: which of the chunk's tokens
    are a chat's reasoning.
    """

    index: int
    text: str
    chunk: Chunk
    delta: ChatDelta | None = None
    finish_reason: str | None = None
    reasoning: range = range(0)

    @property
    def says_nothing(self) -> bool:
        """Whether a client need not hear of it: its text is held back, and nothing else has happened."""
        said = self.text if self.delta is None else self.delta
        return not (said or self.chunk.logprobs or self.finish_reason)


def check_scores(prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
    """Raise RequestError if the log-probabilities of `prompts` would be too many for one answer."""
    if params.prompt_logprobs is None:
        return
    scores = sum(map(len, prompts)) * (params.prompt_logprobs + 1)
    if scores > MAX_SCORES:
        raise RequestError(
            f"prompt tokens times alternatives + 1 may be {MAX_SCORES} in one request, and are {scores}: ask for fewer "
            "log-probabilities or send fewer prompts",
            "prompt_logprobs",
        )


async def generate(
    replica: DeploymentHandle,
    receiver: ChunkReceiver,
    tokenizer: Any,
    call: Call,
    prompt: list[int],
    params: SamplingParams,
    splitter: Callable[[], ChatSplitter] | None = None,
) -> AsyncGenerator[TextChunk]:
    """Run one request on a replica. Raises RequestError and GenerationFailed; closing the iterator cancels the request.

    call: what the request belongs to and is counted for. splitter: makes what takes a choice's text apart, for chats.
    """
    if sum(map(len, params.stop)) > MAX_STOP_CHARACTERS:
        raise RequestError(
            f"stop strings may have {MAX_STOP_CHARACTERS} characters in all: send fewer", "stop"
        )
    check_scores([prompt], params)
    request = Request(uuid.uuid4().hex, prompt, params, call.priority, call.cache_salt)
    splitters = [splitter() if splitter is not None else None for _ in range(params.n)]
    texts = [
        TextStream(
            tokenizer,
            params.stop,
            params.skip_special_tokens,
            params.min_tokens,
            taken.markers if taken else (),
        )
        for taken in splitters
    ]
    stream = generate_on_replica(replica.options(session_id=call.session), receiver, request)
    unlogged, begun = call.prompts, False
    try:
        async for chunks in stream:
            for chunk in _by_choice(chunks):
                if chunk.finish_reason == "error":
                    message, param = chunk.error or "", chunk.error_param
                    raise RequestError(message, param) if param else GenerationFailed(message)
                call.add(chunk, len(prompt))
                begun = True
                if unlogged is not None:
                    # Only now is it certain that the ids are tokens.
                    unlogged.append(await asyncio.to_thread(tokenizer.decode, prompt))
                    unlogged = None
                yield _text_chunk(chunk, params, texts[chunk.index], splitters[chunk.index])
    except (asyncio.CancelledError, GeneratorExit):
        if not begun:
            call.add_prompt(request.request_id, len(prompt))  # Some of its rows may have been computed.
        raise
    except Exception as error:
        cause = unwrap(error)
        if isinstance(cause, EXPECTED):
            raise cause from None
        raise
    finally:
        await stream.aclose()


def _text_chunk(
    chunk: Chunk, params: SamplingParams, text: TextStream, splitter: ChatSplitter | None
) -> TextChunk:
    """A chunk with what has become certain of its choice's text."""
    tokens = chunk.token_ids
    # A stop token ends the text and is no part of it, even where it is an ordinary word.
    if chunk.finish_reason == "stop" and not isinstance(chunk.stop_reason, str):
        tokens = tokens[:-1]
    last = chunk.finish_reason is not None
    pieces = [text.push(token) for token in tokens]
    certain = "".join(pieces)
    if last:
        certain += text.finish()
        if params.include_stop_str_in_output:
            certain += text.stopped or ""
    if splitter is None:
        return TextChunk(chunk.index, certain, chunk, finish_reason=chunk.finish_reason)
    reasoning = splitter.reasoning_span(pieces)
    delta = splitter.push(certain, final=last)
    reason = "tool_calls" if chunk.finish_reason == "stop" and splitter.called else chunk.finish_reason
    return TextChunk(chunk.index, certain, chunk, delta, reason, reasoning)


def _by_choice(chunks: list[Chunk]) -> list[Chunk]:
    """Chunks that came together as one for each choice."""
    if len(chunks) == 1:
        return chunks
    of_choice: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        of_choice.setdefault(chunk.index, []).append(chunk)
    return [joined_chunks(parts) for parts in of_choice.values()]


@dataclass
class Choice:
    """All of one choice: its chunks added up."""

    chunks: list[TextChunk] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join([item.text for item in self.chunks])

    @property
    def message(self) -> ChatDelta:
        """Of a chat."""
        return joined(item.delta for item in self.chunks if item.delta is not None)

    @property
    def finish_reason(self) -> str | None:
        return self.chunks[-1].finish_reason

    @property
    def reasoning_tokens(self) -> int:
        """Of a chat."""
        return sum(len(item.reasoning) for item in self.chunks)

    @property
    def stats(self) -> RequestStats:
        stats = self.chunks[-1].chunk.stats
        assert stats is not None, "a finished choice has stats"
        return stats


async def collect(merged: AsyncGenerator[tuple[int, TextChunk]], count: int) -> list[Choice]:
    """Wait for all `count` choices that `merge` brings."""
    choices = [Choice() for _ in range(count)]
    async with aclosing(merged) as items:
        async for index, item in items:
            choices[index].chunks.append(item)
    return choices


async def merge(streams: list[AsyncGenerator[TextChunk]], n: int) -> AsyncGenerator[tuple[int, TextChunk]]:
    """The chunks of several prompts' streams as they come, each with its choice's index among all of them."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as items:
            async for item in items:
                yield item.index, item
        return
    queue: asyncio.Queue[tuple[int, TextChunk] | BaseException | None] = asyncio.Queue()
    room = asyncio.Semaphore(_MOST_PROMPTS_AT_ONCE)

    async def pump(number: int, stream: AsyncGenerator[TextChunk]) -> None:
        try:
            async with room:
                async for item in stream:
                    await queue.put((number * n + item.index, item))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(pump(i, stream)) for i, stream in enumerate(streams)]
    try:
        open_streams = len(tasks)
        while open_streams:
            got = await queue.get()
            if isinstance(got, BaseException):
                raise got
            if got is None:
                open_streams -= 1
            else:
                yield got
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
