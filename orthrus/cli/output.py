"""What commands print, and how their errors become an exit status."""

import sys
from collections.abc import Callable
from typing import Protocol

from orthrus.errors import ConfigError, RequestError


class Report(Protocol):
    """The result of a command that measures."""

    def to_json(self) -> str: ...
    def to_text(self) -> str: ...


def exit_status(work: Callable[[], int | None]) -> int:
    """Run `work` and return its status, or 0 for None. An error that the user can fix goes to stderr and gives 2; Ctrl-C 130."""
    try:
        return work() or 0
    except (ConfigError, RequestError) as error:
        print(f"orthrus: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def progress(line: str) -> None:
    """Print a line to stderr at once, so that stdout holds the result alone."""
    print(line, file=sys.stderr, flush=True)


def write(text: str) -> None:
    """Print a piece of text to stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def print_report(report: Report, *, as_json: bool) -> None:
    """Print a report to stdout."""
    print(report.to_json() if as_json else report.to_text())
