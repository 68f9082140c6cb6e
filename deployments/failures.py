"""What went wrong with a request, and how each protocol says so."""

import logging
from dataclasses import dataclass, field
from typing import Any

import grpc
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from deployments.chunk_link import LinkLost
from orthrus.errors import RequestError

logger = logging.getLogger("ray.serve")


class GenerationFailed(Exception):
    """The engine ended a request that it had accepted."""


class ModelNotFound(Exception):
    """The request names a model that is not served here."""


class BodyTooLarge(Exception):
    """The request is over the size limit."""


UNAVAILABLE = (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    ActorDiedError,
    ActorUnavailableError,
    LinkLost,
)
# What `describe_failure` has an answer for; anything else is a bug here and is logged as one.
EXPECTED: tuple[type[Exception], ...] = (
    RequestError,
    ModelNotFound,
    BodyTooLarge,
    GenerationFailed,
    *UNAVAILABLE,
)


@dataclass(frozen=True)
class Failure:
    """An error as HTTP (status, OpenAI's error fields, headers) and as gRPC (status code, details = message)."""

    status: int
    grpc_code: grpc.StatusCode
    message: str
    kind: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def describe_failure(error: BaseException) -> Failure:
    """The answer to a request that ended in `error`. A fault of ours is logged, and its details stay with us."""
    match error:
        case RequestError():
            code = "context_length_exceeded" if "context limit" in error.message else None
            invalid = grpc.StatusCode.INVALID_ARGUMENT
            return Failure(400, invalid, error.message, param=error.param, code=code)
        case ModelNotFound():
            not_found = grpc.StatusCode.NOT_FOUND
            return Failure(404, not_found, str(error), param="model", code="model_not_found")
        case BodyTooLarge():
            return Failure(413, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        case BackPressureError():
            message = "too many requests are waiting: try again later"
            busy = grpc.StatusCode.RESOURCE_EXHAUSTED
            return Failure(429, busy, message, "rate_limit_error", headers={"Retry-After": "1"})
        case _ if isinstance(error, UNAVAILABLE):
            message = "the model's replica is not available: try again"
            unavailable = grpc.StatusCode.UNAVAILABLE
            return Failure(503, unavailable, message, "server_error", headers={"Retry-After": "1"})
        case GenerationFailed():
            return Failure(500, grpc.StatusCode.INTERNAL, str(error), "server_error")
        case _:
            logger.error("request failed", exc_info=error)
            message = "internal error: the server's log has the details"
            return Failure(500, grpc.StatusCode.INTERNAL, message, "server_error")
