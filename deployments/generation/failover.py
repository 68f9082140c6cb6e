"""Runs a request on a replica, and on another one if that replica is lost before the first chunk."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from ray.serve.handle import DeploymentHandle

from orthrus.deployments.failures.errors import REPLICA_LOST, GenerationFailed
from orthrus.deployments.link.errors import ReplicaFailed
from orthrus.deployments.link.inbox import Inbox
from orthrus.deployments.link.receiver import ChunkReceiver
from orthrus.requests.request import Chunk, Request

logger = logging.getLogger("ray.serve")

_ATTEMPTS = 3
"""How many replicas a request is tried on. If all of them are lost, the request itself is the likely cause."""


async def generate_on_replica(
    replica: DeploymentHandle, receiver: ChunkReceiver, request: Request
) -> AsyncGenerator[list[Chunk]]:
    """Run `request` on a replica and yield its chunks, as many at a time as have come. Closing the iterator cancels it.

    Raises GenerationFailed if the replica is lost after the first chunk, and what Serve raises if no replica is left.
    """
    address = await receiver.address()
    for attempt in range(1, _ATTEMPTS + 1):
        # Each attempt has an id of its own, because one that was given up may still send chunks.
        tried = replace(request, request_id=f"{request.request_id}-{attempt}")
        inbox = receiver.open(tried.request_id)
        # Over plain gRPC, whatever the cluster's default. An actor call costs three times as much, and if its caller has died,
        # it blocks the replica's event loop for a second.
        stream = replica.options(stream=True, _by_reference=False).generate.remote(tried, address)
        call = asyncio.create_task(_watch(stream, receiver, tried.request_id, inbox))
        unfinished, begun = request.params.n, False
        try:
            while unfinished:
                chunks = await inbox.take()
                begun = True
                unfinished -= sum(chunk.finish_reason is not None for chunk in chunks)
                yield chunks
            await call
            return
        except REPLICA_LOST as error:
            if begun:
                why = f" ({error})" if isinstance(error, ReplicaFailed) else ""
                raise GenerationFailed(
                    f"the replica that was answering has stopped{why}: what it sent is right but not complete, send the "
                    "request again"
                ) from error
            if attempt == _ATTEMPTS:
                raise
            logger.warning("request %s: its replica is gone, trying another", request.request_id)
        finally:
            receiver.forget(tried.request_id)
            if not call.done():
                stream.cancel()
                call.cancel()


async def _watch(stream: Any, receiver: ChunkReceiver, request_id: str, inbox: Inbox) -> None:
    """Follow the request's call to its end, and fail `inbox` if the call ends with an error."""
    try:
        async for link in stream:
            receiver.expect_rest(request_id, link)
    except Exception as error:
        inbox.fail(error)
