"""Hostile values and files, and bounds on the time and memory of reading them."""

import contextlib
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SECONDS, BYTES = 2.0, 1 << 30

# What a JSON file can hold in the place of a value.
VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "zero": 0,
    "minus-one": -1,
    "float": 2.5,
    "whole-float": 4.0,
    "nan": float("nan"),
    "inf": float("inf"),
    "minus-inf": float("-inf"),
    "tiny": 5e-324,
    "huge": 1e308,
    "2-to-31": 1 << 31,
    "2-to-63": 1 << 63,
    "400-digits": 10**400,
    "string": "4",
    "empty": "",
    "long": "x" * 500_000,
    "surrogate": "\ud800",
    "empty-list": [],
    "list": [1],
    "nested-list": [[1], [2]],
    "mixed-list": [1, "a", None],
    "empty-object": {},
    "object": {"a": 1},
    "nested-object": {"a": {"b": {"c": [1]}}},
}


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Fail if the block takes more than 2 s of CPU time or 1 GiB, or waits for 20 s."""

    def give_up(*_: object) -> None:
        raise TimeoutError("blocked for 20 s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(20)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, limits[1]))
    begin = time.process_time()
    try:
        yield
    finally:
        spent = time.process_time() - begin
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert spent < SECONDS, f"took {spent:.1f} s of a CPU"
