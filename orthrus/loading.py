"""The stages of loading a model. Each is an INFO record of the logger `orthrus.loading`, with the stage as its message."""

import logging
from collections.abc import Callable

stages = logging.getLogger("orthrus.loading")


class StageHandler(logging.Handler):
    """Calls `tell` with each stage, on the thread that loads."""

    def __init__(self, tell: Callable[[str], object]) -> None:
        super().__init__(logging.INFO)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(record.getMessage())


def tell_stages(tell: Callable[[str], object]) -> None:
    """Call `tell` with each stage in this process, from now on."""
    stages.setLevel(logging.INFO)
    stages.handlers = [StageHandler(tell)]
