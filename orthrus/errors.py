"""Errors whose message tells the caller what to change."""


class RequestError(ValueError):
    """A request that can't be served as it is: HTTP 400, gRPC INVALID_ARGUMENT.

    `param` names the offending field in the OpenAI error shape, or is None when no single field is at fault.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def __reduce__(self) -> tuple[type, tuple[str, str | None]]:
        # The default would rebuild it from `args` alone and lose `param` on its way between processes.
        return type(self), (self.message, self.param)


class ConfigError(ValueError):
    """A model, engine or deployment setting that can't work; the message names the setting and the fix."""


class CheckpointError(ConfigError):
    """A checkpoint that can't be found, read or used with its config; the message names the file and the fix."""
