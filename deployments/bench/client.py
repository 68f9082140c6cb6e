"""The clients of `orthrus bench serve`: plain sockets, so light that they hardly take CPU from what they measure."""

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

_EVENT = b"data: "
_DONE = b"data: [DONE]"
_LAST_CHUNK = b"0\r\n\r\n"
_TAIL_BYTES = 2048


class StreamFailed(Exception):
    """An answer that is not what was asked for: an error status, an error event, or too few tokens."""


class Connection(asyncio.Protocol):
    """A keep-alive HTTP connection that streams one completion after the other."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._received = b""
        self._first: float | None = None
        self._ended: asyncio.Future[float] | None = None

    @classmethod
    async def open(cls, host: str, port: int) -> "Connection":
        _, connection = await asyncio.get_running_loop().create_connection(cls, host, port)
        return connection

    async def stream(self, host: str, path: str, body: dict[str, Any]) -> float:
        """Send a request and read its answer to the end. Returns the seconds until the first text. Raises StreamFailed."""
        payload = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(payload)}\r\n\r\n"
        )
        self._received, self._first = b"", None
        self._ended = asyncio.get_running_loop().create_future()
        begin = time.perf_counter()
        self._transport.write(head.encode() + payload)
        first = await self._ended
        usage = [line for line in self._received.split(b"\n") if line.startswith(_EVENT + b"{")][-1]
        if json.loads(usage.removeprefix(_EVENT))["usage"]["completion_tokens"] != body["max_tokens"]:
            raise StreamFailed(f"the answer is not complete: {usage!r}")
        return first - begin

    def close(self) -> None:
        self._transport.close()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(StreamFailed(f"the connection was closed: {error}: {self._received!r}"))

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._first is None:
            if any(_has_text(line) for line in self._received.split(b"\n")[:-1]):
                self._first = time.perf_counter()
        else:
            self._received = self._received[-_TAIL_BYTES:]
        if self._received.endswith(_LAST_CHUNK) and self._ended is not None and not self._ended.done():
            if _DONE in self._received and self._first is not None:
                self._ended.set_result(self._first)
            else:
                self._ended.set_exception(StreamFailed(f"no stream with text: {self._received!r}"))


def _has_text(line: bytes) -> bool:
    if not line.startswith(_EVENT + b"{"):
        return False
    choices = json.loads(line.removeprefix(_EVENT)).get("choices")
    return bool(choices and choices[0]["text"])


def first_token_seconds(host: str, port: int, path: str, body: dict[str, Any]) -> float:
    """Seconds from sending a request to the first text of its answer, over a connection that is open already."""

    async def run() -> float:
        connection = await Connection.open(host, port)
        try:
            return await connection.stream(host, path, body)
        finally:
            connection.close()

    return asyncio.run(run())


def total_seconds(
    host: str, port: int, path: str, streams: Sequence[Sequence[dict[str, Any]]], viewers: int = 0
) -> float:
    """Seconds that the requests take when each of `streams` sends its own one after the other.

    viewers: how many open pages show the cluster meanwhile.
    """

    async def run() -> float:
        watched = [await _watch(host, port) for _ in range(viewers)]
        connections = await asyncio.gather(*(Connection.open(host, port) for _ in streams))

        async def one(connection: Connection, bodies: Sequence[dict[str, Any]]) -> None:
            for body in bodies:
                await connection.stream(host, path, body)

        begin = time.perf_counter()
        try:
            await asyncio.gather(*map(one, connections, streams))
        finally:
            for connection in connections:
                connection.close()
            for viewer in watched:
                viewer.cancel()
        return time.perf_counter() - begin

    return asyncio.run(run())


async def _watch(host: str, port: int) -> asyncio.Task[None]:
    """Read the cluster's events as an open page does, in the returned task. The first has come already. Raises StreamFailed."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(f"GET /page/cluster HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n")[0]:
        raise StreamFailed(f"no page to look at the cluster with: {head!r}")
    await reader.readuntil(_EVENT)

    async def read() -> None:
        try:
            while await reader.read(1 << 16):
                pass
        finally:
            writer.close()

    return asyncio.create_task(read())
