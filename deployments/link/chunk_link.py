"""The way of chunks from a replica to an ingress: one connection for all requests between the two, one message a pass.

A Serve stream costs each of its messages half a millisecond on both sides, and a pass has one for every request that it moves.
So a request's own call (`OrthrusReplica.generate`) carries the request, its cancellation, its errors and its end, and stays
open as long as it runs: routing, limits, draining and retries are Serve's. The chunks come over a `ChunkLink` that the
replica opens to the `ChunkReceiver` of the ingress.

Nothing waits for a timer, and a message holds whatever there is: while the connection or the ingress can't keep up, the chunks
of several passes join, and the cost of a token falls.

A message is a pickle. The receiver reads none from a connection that has not begun with its secret, which only calls through Ray
carry; under `RAY_USE_TLS` the connection is encrypted with Ray's certificates.
"""

import asyncio
import hmac
import logging
import os
import pickle
import secrets
import ssl
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any

import ray

from orthrus.requests.request import Chunk

logger = logging.getLogger("ray.serve")

_SECRET_BYTES = 32
_NAME_BYTES = 16
_LENGTH = struct.Struct("<I")
_values = attrgetter(*(field.name for field in fields(Chunk)))


class LinkLost(Exception):
    """The connection between a replica and an ingress has ended under a request."""


@dataclass(frozen=True)
class Address:
    """Where an ingress takes chunks, and what a connection must begin with."""

    host: str
    port: int
    secret: bytes = field(repr=False)


# --- the replica's side


class ChunkLink(asyncio.Protocol):
    """A replica's connection to one ingress. `name` tells the ingress which connection a request's chunks take."""

    def __init__(self, secret: bytes) -> None:
        self.name = secrets.token_bytes(_NAME_BYTES)
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._secret = secret
        self._transport: Any = None
        self._waiting: list[Chunk] = []
        self._writable = False

    def send(self, chunks: list[Chunk]) -> None:
        """Send chunks, now or together with later ones as soon as the connection takes more."""
        self._waiting += chunks
        if self._writable:
            self._flush()

    def _flush(self) -> None:
        if self._waiting and not self.lost.done():
            payload = pickle.dumps(
                [_values(chunk) for chunk in self._waiting], protocol=pickle.HIGHEST_PROTOCOL
            )
            self._waiting = []
            self._transport.write(_LENGTH.pack(len(payload)) + payload)

    def close(self) -> None:
        self._transport.abort()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.write(self._secret + self.name)
        self.resume_writing()

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self._flush()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)


class ChunkLinks:
    """A replica's links, one to each ingress that sends it requests."""

    def __init__(self) -> None:
        self._links: dict[Address, asyncio.Task[ChunkLink]] = {}

    async def to(self, address: Address) -> ChunkLink:
        """The link to an ingress, opened if there is none. Raises LinkLost if the ingress can't be reached."""
        opening = self._links.get(address)
        if opening is None:
            opening = self._links[address] = asyncio.create_task(self._open(address))
        try:
            # Shielded: a request that is cancelled must not take the link from the others that wait for it.
            return await asyncio.shield(opening)
        except OSError as error:
            self._links.pop(address, None)
            raise LinkLost(
                f"the ingress at {address.host}:{address.port} can't be reached: {error}"
            ) from error

    def close(self) -> None:
        """End all links, and with them the requests that use them."""
        for opening in list(self._links.values()):
            if opening.done() and not opening.cancelled() and opening.exception() is None:
                opening.result().close()

    async def _open(self, address: Address) -> ChunkLink:
        _, link = await asyncio.get_running_loop().create_connection(
            lambda: ChunkLink(address.secret), address.host, address.port, ssl=_tls(ssl.Purpose.SERVER_AUTH)
        )
        link.lost.add_done_callback(lambda _: self._links.pop(address, None))
        return link


# --- the ingress's side


class Inbox:
    """The chunks of one request that have come and that nobody has taken yet."""

    def __init__(self) -> None:
        self._chunks: list[Chunk] = []
        self._error: BaseException | None = None
        self._arrival: asyncio.Future[None] | None = None

    def put(self, chunk: Chunk) -> None:
        self._chunks.append(chunk)
        self._wake()

    def fail(self, error: BaseException) -> None:
        """No more will come; what has come can still be taken."""
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


class ChunkReceiver:
    """Where an ingress takes the chunks of its requests, from all replicas. Used on one event loop."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(_SECRET_BYTES)
        self._inboxes: dict[str, Inbox] = {}
        self._links: dict[bytes, _Incoming] = {}
        self._listening: asyncio.Task[asyncio.Server] | None = None
        self._host = ray.util.get_node_ip_address()

    async def address(self) -> Address:
        """Where replicas connect to; the first call starts listening."""
        if self._listening is None:
            listen = asyncio.get_running_loop().create_server(
                lambda: _Incoming(self), self._host, 0, ssl=_tls(ssl.Purpose.CLIENT_AUTH)
            )
            self._listening = asyncio.create_task(listen)
        listening = self._listening
        try:
            server = await asyncio.shield(listening)
        except OSError:
            if self._listening is listening:
                self._listening = None  # The next call tries again.
            raise
        return Address(self._host, server.sockets[0].getsockname()[1], self._secret)

    def close(self) -> None:
        """Listen no more, and end the connections there are."""
        if self._listening is not None and self._listening.done():
            self._listening.result().close()
        for incoming in list(self._links.values()):
            incoming.close()

    def open(self, request_id: str) -> Inbox:
        """Begin to take a request's chunks, until `forget`."""
        inbox = self._inboxes[request_id] = Inbox()
        return inbox

    def forget(self, request_id: str) -> None:
        """Drop what may still come for a request."""
        self._inboxes.pop(request_id, None)
        for incoming in self._links.values():
            incoming.expected.discard(request_id)

    def expect_rest(self, request_id: str, link: bytes) -> None:
        """The replica has sent all of a request over `link`: what has not come yet is lost if the link is."""
        inbox = self._inboxes.get(request_id)
        if inbox is None:
            return
        incoming = self._links.get(link)
        if incoming is None:
            inbox.fail(LinkLost("the connection to the replica has ended"))
        else:
            incoming.expected.add(request_id)

    # Called by the connections.

    def admit(self, secret: bytes, name: bytes, incoming: "_Incoming") -> bool:
        if not hmac.compare_digest(secret, self._secret):
            return False
        self._links[name] = incoming
        return True

    def deliver(self, chunks: Sequence[tuple[Any, ...]]) -> None:
        for values in chunks:
            inbox = self._inboxes.get(values[0])
            if inbox is not None:
                inbox.put(Chunk(*values))

    def lose(self, name: bytes, expected: set[str]) -> None:
        self._links.pop(name, None)
        for request_id in expected:
            inbox = self._inboxes.get(request_id)
            if inbox is not None:
                inbox.fail(LinkLost("the connection to the replica has ended"))


class _Incoming(asyncio.Protocol):
    """A replica's connection as the ingress sees it. expected: requests that only this connection has the rest of."""

    def __init__(self, receiver: ChunkReceiver) -> None:
        self.expected: set[str] = set()
        self._receiver = receiver
        self._name = b""
        self._received = bytearray()
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        at = 0
        if not self._name:
            at = _SECRET_BYTES + _NAME_BYTES
            if len(received) < at:
                return
            secret, name = bytes(received[:_SECRET_BYTES]), bytes(received[_SECRET_BYTES:at])
            if not self._receiver.admit(secret, name, self):
                logger.warning("a connection that did not know the secret was refused")
                self.close()
                return
            self._name = name
        while len(received) >= at + _LENGTH.size:
            (length,) = _LENGTH.unpack_from(received, at)
            end = at + _LENGTH.size + length
            if len(received) < end:
                break
            self._receiver.deliver(pickle.loads(memoryview(received)[at + _LENGTH.size : end]))
            at = end
        del received[:at]

    def close(self) -> None:
        self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._receiver.lose(self._name, self.expected)


def _tls(purpose: ssl.Purpose) -> ssl.SSLContext | None:
    """Ray's own certificates where `RAY_USE_TLS` asks for them; both ends must have one that Ray's authority has signed."""
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return None
    context = ssl.create_default_context(purpose, cafile=os.environ["RAY_TLS_CA_CERT"])
    context.load_cert_chain(os.environ["RAY_TLS_SERVER_CERT"], os.environ["RAY_TLS_SERVER_KEY"])
    context.check_hostname = False  # Nodes are known by address, and their certificates name no host.
    context.verify_mode = ssl.CERT_REQUIRED
    return context
