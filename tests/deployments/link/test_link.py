"""The link between a replica and an ingress: real sockets on this machine, no Serve."""

import asyncio
import pickle
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orthrus.deployments.link.errors import LinkLost, ReplicaFailed
from orthrus.deployments.link.framing import Address, Decoder
from orthrus.deployments.link.inbox import Inbox
from orthrus.deployments.link.receiver import ChunkReceiver
from orthrus.deployments.link.sender import ChunkLink, ChunkLinks
from orthrus.requests.request import Chunk, RequestStats, TokenLogprob, joined_chunks

STATS = RequestStats(prompt_tokens=5, cached_tokens=2, completion_tokens=3, cycles=1, passes=2, seed=7)


@contextmanager
def ends() -> Iterator[tuple[ChunkReceiver, ChunkLinks]]:
    """The receiver of an ingress and the links of a replica."""
    receiver, links = ChunkReceiver(), ChunkLinks()
    try:
        yield receiver, links
    finally:
        links.close()
        receiver.close()


def chunk(request: str, *tokens: int) -> Chunk:
    return Chunk(request, 0, tokens)


async def take_until(inbox: Inbox, token: int) -> list[int]:
    """All tokens of an inbox up to `token`."""
    tokens: list[int] = []
    while not tokens or tokens[-1] != token:
        tokens += [t for c in await inbox.take() for t in c.token_ids]
    return tokens


def test_chunks_of_two_replicas_reach_their_requests_in_order() -> None:
    async def main() -> None:
        with ends() as (receiver, links), ends() as (_, others):
            address = await receiver.address()
            inboxes = {name: receiver.open(name) for name in "abc"}
            first, second = await links.to(address), await others.to(address)
            for token in range(50):
                first.send([chunk("a", token), chunk("b", 100 + token), chunk("nobody's", 7)])
                second.send([chunk("c", 200 + token)])
            for name, start in (("a", 0), ("b", 100), ("c", 200)):
                assert await take_until(inboxes[name], start + 49) == list(range(start, start + 50))

    asyncio.run(main())


def test_everything_in_a_chunk_crosses() -> None:
    scored = (TokenLogprob(3, -0.5, ((3, -0.5), (1, float("-inf")))),)
    last = Chunk("a", 1, (3,), scored, "stop", "END", STATS, "why")

    async def main() -> Chunk:
        with ends() as (receiver, links):
            inbox = receiver.open("a")
            (await links.to(await receiver.address())).send([last])
            [arrived] = await inbox.take()
            return arrived

    assert asyncio.run(main()) == last


def test_chunks_for_a_slow_ingress_are_joined() -> None:
    """While the ingress reads nothing, its chunks wait and are sent together. None is lost."""
    chunks = [chunk("a", *range(1000), 10_000 + number) for number in range(8000)]

    async def main() -> list[list[tuple[Any, ...]]]:
        connected: asyncio.Future[asyncio.StreamReader] = asyncio.get_running_loop().create_future()
        server = await asyncio.start_server(lambda reader, _: connected.set_result(reader), "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        links = ChunkLinks()
        link = await links.to(Address(host, port, b"secret"))
        reader = await connected
        for one in chunks:
            link.send([one])
            await asyncio.sleep(0)
        await reader.readexactly(len(b"secret" + link.name))
        messages: list[list[tuple[Any, ...]]] = []
        while sum(map(len, messages)) < len(chunks):
            (length,) = struct.unpack("<I", await reader.readexactly(4))
            messages.append(pickle.loads(await reader.readexactly(length))[1])
        links.close()
        server.close()
        return messages

    messages = asyncio.run(main())
    assert max(map(len, messages)) > 1000, "what waited was sent as one"
    assert [Chunk(*values) for message in messages for values in message] == chunks


def test_ends_of_different_versions_understand_each_other() -> None:
    """During a rolling update: a field that one end does not know is left out or has its default."""
    values = ("from the future", (1, 2), 0, "a", "stop")
    payload = pickle.dumps((("new_field", "token_ids", "index", "request_id", "finish_reason"), [values]))
    decoder = Decoder()
    decoder.push(struct.pack("<I", len(payload)) + payload)
    assert list(decoder.chunks()) == [Chunk("a", 0, (1, 2), finish_reason="stop")]


def test_a_connection_with_a_wrong_secret_is_refused() -> None:
    async def main() -> None:
        with ends() as (receiver, links), ends() as (_, others):
            address = await receiver.address()
            inbox = receiver.open("a")
            stranger = await others.to(replace(address, secret=bytes(len(address.secret))))
            stranger.send([chunk("a", 666)])
            await stranger.lost
            (await links.to(address)).send([chunk("a", 1)])
            assert await take_until(inbox, 1) == [1]

    asyncio.run(main())


async def begun(receiver: ChunkReceiver, links: ChunkLinks) -> tuple[ChunkLink, Inbox]:
    """Request "a" after its first chunk, when all the others are on their way."""
    link = await links.to(await receiver.address())
    inbox = receiver.open("a")
    link.send([chunk("a", 1)])
    assert await take_until(inbox, 1) == [1]
    receiver.expect_rest("a", link.name)
    return link, inbox


def test_a_request_fails_if_its_last_chunks_are_lost_with_the_link() -> None:
    """Chunks that have come can still be taken, and then there is an error. Without a link the request fails at once."""

    async def main() -> None:
        with ends() as (receiver, links):
            link, inbox = await begun(receiver, links)
            link.close()
            with pytest.raises(LinkLost):
                await inbox.take()
            late = receiver.open("b")
            receiver.expect_rest("b", link.name)
            with pytest.raises(LinkLost):
                await late.take()

    asyncio.run(main())


def test_a_replica_that_fails_says_why() -> None:
    """Chunks that it had sent before can still be taken."""

    async def main() -> None:
        with ends() as (receiver, links):
            link = await links.to(await receiver.address())
            inbox = receiver.open("a")
            failed = Chunk("a", 0, (), finish_reason="error", error="rank 1 has ended", engine_failed=True)
            link.send([chunk("a", 1), failed])
            link.close()
            assert await take_until(inbox, 1) == [1]
            with pytest.raises(ReplicaFailed, match="rank 1 has ended"):
                await inbox.take()

    asyncio.run(main())


def test_a_request_that_is_over_leaves_nothing_behind() -> None:
    async def main() -> None:
        with ends() as (receiver, links):
            await begun(receiver, links)
            [incoming] = receiver._links.values()
            assert incoming.expected == {"a"}
            receiver.forget("a")
            assert not incoming.expected

    asyncio.run(main())


def test_a_lost_link_is_opened_again_for_the_next_request() -> None:
    async def main() -> None:
        with ends() as (receiver, links):
            address = await receiver.address()
            first, again = await asyncio.gather(links.to(address), links.to(address))
            assert first is again
            first.close()
            await first.lost
            inbox = receiver.open("a")
            (await links.to(address)).send([chunk("a", 1)])
            assert await take_until(inbox, 1) == [1]

    asyncio.run(main())


def test_an_ingress_that_is_gone_is_an_error() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(LinkLost, match=f"127.0.0.1:{port}"):
        asyncio.run(ChunkLinks().to(Address("127.0.0.1", port, b"")))


def test_links_use_rays_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=ray -keyout key.pem -out cert.pem"
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.setenv("RAY_USE_TLS", "1")
    for name, file in (("CA_CERT", "cert.pem"), ("SERVER_CERT", "cert.pem"), ("SERVER_KEY", "key.pem")):
        monkeypatch.setenv(f"RAY_TLS_{name}", str(tmp_path / file))

    async def main() -> None:
        with ends() as (receiver, links):
            address = await receiver.address()
            inbox = receiver.open("a")
            (await links.to(address)).send([chunk("a", 1)])
            assert await take_until(inbox, 1) == [1]
            reader, writer = await asyncio.open_connection(address.host, address.port)
            writer.write(address.secret + bytes(16))
            assert await reader.read() == b"", "plain text is refused"
            writer.close()

    asyncio.run(main())


def test_joined_chunks_are_what_one_pass_would_have_sent() -> None:
    scored = tuple(TokenLogprob(t, -float(t)) for t in range(4))
    parts = [
        Chunk("a", 0, (0, 1), scored[:2]),
        Chunk("a", 0, (2,), scored[2:3]),
        Chunk("a", 0, (3,), scored[3:], "length", None, STATS),
    ]
    assert joined_chunks(parts) == Chunk("a", 0, (0, 1, 2, 3), scored, "length", None, STATS)
