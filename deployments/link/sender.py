"""The replica's end of the link: sends the chunks of its requests to the ingresses that wait for them.

A Serve stream costs half a millisecond per message at each end, and a pass makes a message for each request that it advances.
So chunks do not go through Serve. The call of a request (`OrthrusReplica.generate`) carries the request, its cancellation, its
errors and its end, and stays open as long as the request runs: Serve routes, limits, drains and retries it. The chunks of all
requests go over one connection per ingress, in one message per pass.

Nothing waits for a timer. While the connection or the ingress is slow, the chunks of several passes join in one message, so the
cost of a token falls. Under `RAY_USE_TLS` the connection is encrypted with Ray's certificates.
"""

import asyncio
import ssl
from typing import Any

from orthrus.deployments.link.errors import LinkLost
from orthrus.deployments.link.framing import Address, encode, new_name
from orthrus.deployments.link.tls import tls_context
from orthrus.requests.request import Chunk


class ChunkLink(asyncio.Protocol):
    """A replica's connection to one ingress."""

    name: bytes
    """Tells the ingress which connection a request's chunks take."""
    lost: asyncio.Future[None]
    """Done when the connection has ended."""

    def __init__(self, secret: bytes) -> None:
        self.name = new_name()
        self.lost = asyncio.get_running_loop().create_future()
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
            message, self._waiting = encode(self._waiting), []
            self._transport.write(message)

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
            lambda: ChunkLink(address.secret),
            address.host,
            address.port,
            ssl=tls_context(ssl.Purpose.SERVER_AUTH),
        )
        link.lost.add_done_callback(lambda _: self._links.pop(address, None))
        return link
