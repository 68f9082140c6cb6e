"""A request's stream from whichever replica can give it: a replica that dies under it is replaced while nothing was sent."""

import logging
from collections.abc import AsyncGenerator

from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.failures import GenerationFailed
from orthrus.request import Chunk, Request

logger = logging.getLogger("ray.serve")

_ATTEMPTS = 3
"""A request that has seen this many replicas die is more likely their killer than their victim."""


async def generate_on_replica(replica: DeploymentHandle, request: Request) -> AsyncGenerator[Chunk]:
    """Chunks of `request` from one replica; closing the iterator cancels it there.

    Raises GenerationFailed when the replica dies after its first chunk, and what Serve raises when no replica is left.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        stream = replica.options(stream=True).generate.remote(request)
        begun = ended = False
        try:
            async for chunk in stream:
                begun = True
                yield chunk
            ended = True
            return
        except (ActorDiedError, ActorUnavailableError) as error:
            if begun:
                raise GenerationFailed(
                    "the replica that was answering has stopped: what it sent is right but not complete, send the "
                    "request again"
                ) from error
            if attempt == _ATTEMPTS:
                raise
            logger.warning("request %s: its replica is gone, trying another", request.request_id)
        finally:
            if not ended:
                stream.cancel()
