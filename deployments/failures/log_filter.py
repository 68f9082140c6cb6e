"""Serve logs a stack trace for every call that raises. This filter makes one line of errors that are no fault of the server."""

import logging

from grpc import StatusCode
from ray.serve.exceptions import gRPCStatusError

from orthrus.deployments.failures.errors import EXPECTED, GenerationFailed

_EXPECTED_CODES = {
    StatusCode.INVALID_ARGUMENT,
    StatusCode.NOT_FOUND,
    StatusCode.RESOURCE_EXHAUSTED,
    StatusCode.UNAUTHENTICATED,
    StatusCode.UNAVAILABLE,
}


class QuietClientErrors(logging.Filter):
    """Takes the stack from records of errors that tell a client what to change, or to come back later."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        # A gRPCStatusError comes with the status that `describe_failure` gave.
        known = isinstance(error, EXPECTED) and not isinstance(error, GenerationFailed)
        if known or (isinstance(error, gRPCStatusError) and error.grpc_code in _EXPECTED_CODES):
            record.exc_info = None
            record.levelno, record.levelname = logging.INFO, "INFO"
        return True


def quiet_client_errors() -> None:
    """Add the filter to the logger of Serve in this process, unless it is there already."""
    serve_logger = logging.getLogger("ray.serve")
    if not any(isinstance(known, QuietClientErrors) for known in serve_logger.filters):
        serve_logger.addFilter(QuietClientErrors())
