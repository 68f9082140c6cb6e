"""The errors that a request can end in."""

from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from orthrus.deployments.link.errors import LinkLost
from orthrus.errors import RequestError


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
    """The request's body has a type or an encoding that the server does not read."""


class InvalidKey(Exception):
    """The call has no API key, or one that is unknown or has expired."""


class RateLimited(Exception):
    """The key has used up one of its limits."""

    retry_after: float
    """Seconds until the key may call again."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type, tuple[str, float]]:
        # Exception's own __reduce__ would pass the message alone to another process.
        return type(self), (str(self), self.retry_after)


class QueueFull(Exception):
    """The queue of requests that wait for a replica is full."""


class ModelUnavailable(Exception):
    """No replica can take the request now."""


REPLICA_LOST = (ActorDiedError, ActorUnavailableError, LinkLost)
"""What a call raises when its replica has ended."""
# What Serve raises when it has no replica for a call. Over HTTP, Serve's own answers to these errors do not have OpenAI's form.
_NO_REPLICA = (DeploymentUnavailableError, ReplicaUnavailableError, *REPLICA_LOST)
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
"""The errors that `describe_failure` has an answer for. Any other error is a bug in the server, and is logged as one."""


def unwrap(error: Exception) -> Exception:
    """The cause of an error that a call to a replica raised.

    Ray's wrapper around the cause is taken off. Serve's own errors become QueueFull or ModelUnavailable.
    """
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, BackPressureError):
        return QueueFull("too many requests are waiting: try again later")
    if isinstance(error, _NO_REPLICA) or isinstance(cause, _NO_REPLICA):
        return ModelUnavailable("the model's replica is not available: try again")
    return cause
