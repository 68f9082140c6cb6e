"""Turns errors into answers for clients, over HTTP and over gRPC."""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import grpc

from orthrus.deployments.failures.errors import (
    BodyTooLarge,
    BodyTooSlow,
    GenerationFailed,
    InvalidKey,
    ModelNotFound,
    ModelUnavailable,
    QueueFull,
    RateLimited,
    ResponseNotFound,
    UnsupportedBody,
)
from orthrus.errors import RequestError

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Failure:
    """What a client is told of an error, for both protocols."""

    status: int
    """HTTP's status."""
    grpc_code: grpc.StatusCode
    message: str
    """`message` of OpenAI's error object, and the details of a gRPC status."""
    kind: str = "invalid_request_error"
    """`type` of OpenAI's error object."""
    param: str | None = None
    """The field of the request that is wrong, by the client's name."""
    code: str | None = None
    """`code` of OpenAI's error object."""
    headers: dict[str, str] = field(default_factory=dict)
    """HTTP headers of the answer."""

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


_MAX_MESSAGE = 500
"""Characters. Messages quote what the client sent, and gRPC's must fit into a trailer of 8 KiB."""


def describe_failure(error: BaseException, sent_as: Mapping[str, str] | None = None) -> Failure:
    """The answer to a request that ended in `error`. A fault of the server is logged, and the client is not told its details.

    sent_as: maps names of fields, as the error has them, to the names that the client used.
    """
    failure = _describe(error)
    if sent_as and failure.param is not None and failure.param in sent_as:
        name = sent_as[failure.param]
        # "prompt" and the like are ordinary words too, so the message keeps them: only names with "_" or "." are replaced.
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
