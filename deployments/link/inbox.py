"""Where the chunks of one request wait until they are taken."""

import asyncio

from orthrus.requests.request import Chunk


class Inbox:
    """The chunks of one request that have come and have not been taken yet."""

    def __init__(self) -> None:
        self._chunks: list[Chunk] = []
        self._error: BaseException | None = None
        self._arrival: asyncio.Future[None] | None = None

    def put(self, chunk: Chunk) -> None:
        """Add a chunk."""
        self._chunks.append(chunk)
        self._wake()

    def fail(self, error: BaseException) -> None:
        """No more chunks will come. Those that have come can still be taken."""
        self._error = self._error or error
        self._wake()

    async def take(self) -> list[Chunk]:
        """All chunks that have come since the last call, at least one. Raises what `fail` was given."""
        while not self._chunks:
            if self._error is not None:
                raise self._error
            self._arrival = asyncio.get_running_loop().create_future()
            await self._arrival
        chunks, self._chunks = self._chunks, []
        return chunks

    def _wake(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)
