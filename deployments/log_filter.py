"""Serve logs a call that raises with its stack, and knows no error that is the client's fault: here it becomes one line."""

import logging

from grpc import StatusCode
from ray.serve.exceptions import gRPCStatusError

from orthrus.errors import RequestError

_CLIENTS_FAULT = {
    StatusCode.INVALID_ARGUMENT,
    StatusCode.NOT_FOUND,
    StatusCode.RESOURCE_EXHAUSTED,
    StatusCode.UNAUTHENTICATED,
}


class QuietClientErrors(logging.Filter):
    """Takes the stack from records of errors that tell a client what to change."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, RequestError) or (
            isinstance(error, gRPCStatusError) and error.grpc_code in _CLIENTS_FAULT
        ):
            record.exc_info = None
            record.levelno, record.levelname = logging.INFO, "INFO"
        return True


def quiet_client_errors() -> None:
    """For this process, once."""
    serve_logger = logging.getLogger("ray.serve")
    if not any(isinstance(known, QuietClientErrors) for known in serve_logger.filters):
        serve_logger.addFilter(QuietClientErrors())
