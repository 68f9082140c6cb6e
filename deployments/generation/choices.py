"""The chunks of several prompts and choices, as one stream and as whole choices."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from orthrus.deployments.chat.output import ChatDelta, joined
from orthrus.deployments.generation.text_chunk import TextChunk
from orthrus.requests.request import RequestStats

_MOST_PROMPTS_AT_ONCE = 128
"""How many prompts of one call run at a time: far fewer than may wait for a replica."""


@dataclass
class Choice:
    """A whole choice: the sum of its chunks."""

    chunks: list[TextChunk] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The choice's text."""
        return "".join([item.text for item in self.chunks])

    @property
    def message(self) -> ChatDelta:
        """The answer's message, in a chat."""
        return joined(item.delta for item in self.chunks if item.delta is not None)

    @property
    def finish_reason(self) -> str | None:
        """Why the choice ended: "stop", "length" or "tool_calls"."""
        return self.chunks[-1].finish_reason

    @property
    def reasoning_tokens(self) -> int:
        """How many of a chat's tokens are reasoning."""
        return sum(len(item.reasoning) for item in self.chunks)

    @property
    def stats(self) -> RequestStats:
        """The statistics that came with the last chunk."""
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
    """The chunks of several prompts' streams as they come, each with the index of its choice. n: choices of each prompt."""
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
