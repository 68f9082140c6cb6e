"""The ingress's end of the link: takes the chunks of its requests from all replicas (see sender.py)."""

import asyncio
import hmac
import logging
import ssl
from typing import Any

import ray

from orthrus.deployments.link.errors import LinkLost, ReplicaFailed
from orthrus.deployments.link.framing import Address, Decoder, new_secret
from orthrus.deployments.link.inbox import Inbox
from orthrus.deployments.link.tls import tls_context
from orthrus.requests.request import Chunk

logger = logging.getLogger("ray.serve")


class ChunkReceiver:
    """Receives the chunks of an ingress's requests from all replicas. All calls must be on one event loop."""

    def __init__(self) -> None:
        self._secret = new_secret()
        self._inboxes: dict[str, Inbox] = {}
        self._links: dict[bytes, _Incoming] = {}
        self._listening: asyncio.Task[asyncio.Server] | None = None
        self._host = ray.util.get_node_ip_address()

    async def address(self) -> Address:
        """Where replicas connect to; the first call starts listening."""
        if self._listening is None:
            listen = asyncio.get_running_loop().create_server(
                lambda: _Incoming(self), self._host, 0, ssl=tls_context(ssl.Purpose.CLIENT_AUTH)
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
        """Stop listening, and end all connections."""
        if self._listening is not None and self._listening.done():
            self._listening.result().close()
        for incoming in list(self._links.values()):
            incoming.close()

    def open(self, request_id: str) -> Inbox:
        """Collect a request's chunks in an inbox, from now on until `forget`."""
        inbox = self._inboxes[request_id] = Inbox()
        return inbox

    def forget(self, request_id: str) -> None:
        """Drop all further chunks of a request."""
        self._inboxes.pop(request_id, None)
        for incoming in self._links.values():
            incoming.expected.discard(request_id)

    def expect_rest(self, request_id: str, link: bytes) -> None:
        """Note that the replica has sent all chunks of a request over `link`.

        If that link is lost, so are chunks that have not come yet, and the inbox fails.
        """
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
        """Register a connection. False if its secret is wrong."""
        if not hmac.compare_digest(secret, self._secret):
            return False
        self._links[name] = incoming
        return True

    def deliver(self, chunk: Chunk) -> None:
        """Put a chunk into its request's inbox, or fail the inbox if the engine has failed. Without an inbox, drop the chunk."""
        inbox = self._inboxes.get(chunk.request_id)
        if inbox is None:
            return
        if chunk.engine_failed:
            inbox.fail(ReplicaFailed(chunk.error))
        else:
            inbox.put(chunk)

    def lose(self, name: bytes, expected: set[str]) -> None:
        """Note that a connection has ended. The inboxes of `expected` fail, since the rest of their chunks is lost."""
        self._links.pop(name, None)
        for request_id in expected:
            inbox = self._inboxes.get(request_id)
            if inbox is not None:
                inbox.fail(LinkLost("the connection to the replica has ended"))


class _Incoming(asyncio.Protocol):
    """A replica's connection as the ingress sees it."""

    expected: set[str]
    """Requests all of whose chunks the replica has sent over this connection, and whose inbox is still open."""

    def __init__(self, receiver: ChunkReceiver) -> None:
        self.expected = set()
        self._receiver = receiver
        self._decoder = Decoder()
        self._name = b""
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._decoder.push(data)
        if not self._name:
            greeting = self._decoder.greeting()
            if greeting is None:
                return
            secret, name = greeting
            if not self._receiver.admit(secret, name, self):
                logger.warning("a connection that did not know the secret was refused")
                self.close()
                return
            self._name = name
        for chunk in self._decoder.chunks():
            self._receiver.deliver(chunk)

    def close(self) -> None:
        self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._receiver.lose(self._name, self.expected)
