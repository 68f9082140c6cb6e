"""What loading a model is busy with: INFO records of the logger `orthrus.loading`, whose message is the stage."""

import logging
from collections.abc import Callable

stages = logging.getLogger("orthrus.loading")


class StageHandler(logging.Handler):
    """Hands each stage to `tell`, on the thread that loads."""

    def __init__(self, tell: Callable[[str], object]) -> None:
        super().__init__(logging.INFO)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(record.getMessage())


def tell_stages(tell: Callable[[str], object]) -> None:
    """Call `tell` with the name of each stage from now on, in this process."""
    stages.setLevel(logging.INFO)
    stages.handlers = [StageHandler(tell)]
