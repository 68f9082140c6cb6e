"""Prints what a long start is waiting for: a line when that changes, and one every few seconds in between."""

import sys
import threading
import time
from types import TracebackType
from typing import TextIO

PERIOD_SECONDS = 10.0


class Progress:
    """A context that prints to `out` what `now` was given last, and how long that has taken. Any thread may call `now`."""

    def __init__(self, out: TextIO = sys.stderr, period: float = PERIOD_SECONDS) -> None:
        self._out, self._period = out, period
        self._what, self._since = "", time.monotonic()
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def now(self, what: str) -> None:
        """Print what is under way, if it is something new."""
        with self._changed:
            if what == self._what:
                return
            self._what, self._since = what, time.monotonic()
            self._say(what)
            self._changed.notify()

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        with self._changed:
            while not self._ended:
                # False: nothing has changed for a period.
                if not self._changed.wait(self._period) and self._what:
                    self._say(f"{self._what} ({time.monotonic() - self._since:.0f} s)")

    def _say(self, line: str) -> None:
        print(line, file=self._out, flush=True)
