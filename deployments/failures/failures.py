"""What went wrong with a request, and how each protocol says so."""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from deployments.link.chunk_link import LinkLost
from orthrus.errors import RequestError

logger = logging.getLogger("ray.serve")


class GenerationFailed(Exception):
    """The engine ended a request that it had accepted."""


class ModelNotFound(Exception):
    """The request names a model that is not served here."""


class ResponseNotFound(Exception):
    """There is no such response, or not for this caller."""


class BodyTooLarge(Exception):
    """The request is over the size limit."""


class BodyTooSlow(Exception):
    """The client has not sent its request in time."""


class UnsupportedBody(Exception):
    """The request's body is of a kind that is not read here."""


class InvalidKey(Exception):
    """The call has no API key, or not one that may call now."""


class RateLimited(Exception):
    """The key has used up one of its limits. retry_after: seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type, tuple[str, float]]:
        # As an exception has it by default, only the message would reach another process.
        return type(self), (str(self), self.retry_after)


class QueueFull(Exception):
    """As many requests are waiting for a replica as may."""


class ModelUnavailable(Exception):
    """No replica can take the request now."""


REPLICA_LOST = (ActorDiedError, ActorUnavailableError, LinkLost)
"""What a call raises whose replica has ended."""
# What Serve raises for want of a replica. Its own answers to them, which it would give over HTTP, are not OpenAI's.
_NO_REPLICA = (DeploymentUnavailableError, ReplicaUnavailableError, *REPLICA_LOST)
# What `describe_failure` has an answer for; anything else is a bug here and is logged as one.
EXPECTED: tuple[type[Exception], ...] = (
    RequestError,
    ModelNotFound,
    ResponseNotFound,
    BodyTooLarge,
    BodyTooSlow,
    UnsupportedBody,
    InvalidKey,
    RateLimited,
    GenerationFailed,
    QueueFull,
    ModelUnavailable,
)


def unwrap(error: Exception) -> Exception:
    """The error behind what a call to a replica raised: out of Ray's wrapper around it, and ours where it is Serve's."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, BackPressureError):
        return QueueFull("too many requests are waiting: try again later")
    if isinstance(error, _NO_REPLICA) or isinstance(cause, _NO_REPLICA):
        return ModelUnavailable("the model's replica is not available: try again")
    return cause


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


_MAX_MESSAGE = 500
"""Characters. Messages quote what the client sent, and gRPC's must fit into a trailer of 8 KiB."""


def describe_failure(error: BaseException, sent_as: Mapping[str, str] | None = None) -> Failure:
    """The answer to a request that ended in `error`. A fault of ours is logged, and its details stay with us.

    sent_as: the client's names of fields that the error may name otherwise.
    """
    failure = _describe(error)
    if sent_as and failure.param is not None and failure.param in sent_as:
        name = sent_as[failure.param]
        # "prompt" and the like are words too, so only what must be a field's name is replaced in the message.
        message = (
            re.sub(rf"\b{re.escape(failure.param)}\b", name, failure.message)
            if re.search("[_.]", failure.param)
            else failure.message
        )
        failure = replace(failure, param=name, message=message)
    message = failure.message
    return (
        failure if len(message) <= _MAX_MESSAGE else replace(failure, message=message[:_MAX_MESSAGE] + "...")
    )


def _describe(error: BaseException) -> Failure:
    match error:
        case RequestError():
            code = "context_length_exceeded" if "context limit" in error.message else None
            invalid = grpc.StatusCode.INVALID_ARGUMENT
            return Failure(400, invalid, error.message, param=error.param, code=code)
        case ModelNotFound():
            not_found = grpc.StatusCode.NOT_FOUND
            return Failure(404, not_found, str(error), param="model", code="model_not_found")
        case ResponseNotFound():
            return Failure(404, grpc.StatusCode.NOT_FOUND, str(error), param="response_id")
        case BodyTooLarge():
            return Failure(413, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        case BodyTooSlow():
            return Failure(408, grpc.StatusCode.DEADLINE_EXCEEDED, str(error))
        case UnsupportedBody():
            return Failure(415, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        case InvalidKey():
            headers = {"WWW-Authenticate": "Bearer"}
            unauthenticated = grpc.StatusCode.UNAUTHENTICATED
            return Failure(401, unauthenticated, str(error), code="invalid_api_key", headers=headers)
        case RateLimited():
            headers = {"Retry-After": str(math.ceil(error.retry_after))}
            limited, kind = grpc.StatusCode.RESOURCE_EXHAUSTED, "rate_limit_error"
            return Failure(429, limited, str(error), kind, code="rate_limit_exceeded", headers=headers)
        case QueueFull():
            busy, kind = grpc.StatusCode.RESOURCE_EXHAUSTED, "rate_limit_error"
            return Failure(429, busy, str(error), kind, code="queue_full", headers={"Retry-After": "1"})
        case ModelUnavailable():
            unavailable = grpc.StatusCode.UNAVAILABLE
            return Failure(503, unavailable, str(error), "server_error", headers={"Retry-After": "1"})
        case GenerationFailed():
            return Failure(500, grpc.StatusCode.INTERNAL, str(error), "server_error")
        case _:
            logger.error("request failed", exc_info=error)
            message = "internal error: the server's log has the details"
            return Failure(500, grpc.StatusCode.INTERNAL, message, "server_error")
