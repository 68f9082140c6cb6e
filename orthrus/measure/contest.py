"""Contestants that decode the same prompts, and the ratio of their speeds. All benchmarks use them."""

import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from orthrus.engine import Engine
from orthrus.requests.request import Request, RequestStats, SamplingParams

_request_numbers = itertools.count()

Progress = Callable[[str], None]
"""Called with a line of text on how far a measurement is."""


@dataclass(frozen=True)
class Together:
    """The part of a run in which all texts are decoded: from when each has its first new token, until one of them ends."""

    tokens: int
    """Tokens that all texts got in this part."""
    seconds: float


@dataclass(frozen=True)
class Output:
    """A contestant's output: the new token ids of each prompt, and the cycles and forward passes of all prompts."""

    token_ids: list[list[int]]
    cycles: int
    passes: int
    together: Together | None = None
    """None if the contestant does not tell, or if some text ends before all have begun."""

    @property
    def tokens_per_cycle(self) -> float:
        """Tokens committed per cycle. Each prompt's first new token is left out, because it comes from no cycle."""
        return (sum(map(len, self.token_ids)) - len(self.token_ids)) / max(1, self.cycles)


@dataclass(frozen=True)
class Contestant:
    """Something that decodes greedily: `run(prompts, new_tokens)` gives exactly that many new tokens for every prompt."""

    name: str
    run: Callable[[list[list[int]], int], Output]


@dataclass(frozen=True)
class Ratio:
    """Speed over another contestant's: the median round, and the lowest and highest."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(rounds: Sequence[float]) -> "Ratio":
        return Ratio(statistics.median(rounds), min(rounds), max(rounds))

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f}-{self.high:.2f})"


def ratio(seconds: list[float], others: list[float]) -> Ratio:
    """The speed over another contestant's. seconds, others: both contestants' times in the same rounds."""
    return Ratio.of([other / own for own, other in zip(seconds, others, strict=True)])


def verdict(exact: bool) -> str:
    """The last line of a report. exact: whether all schedules gave the same tokens."""
    return "all schedules gave the same tokens" if exact else "SCHEDULES GAVE DIFFERENT TOKENS"


def engine_contestant(engine: Engine) -> Contestant:
    """Our engine, all prompts submitted at once."""

    def run(prompts: list[list[int]], new_tokens: int) -> Output:
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        requests = [Request(f"contest-{next(_request_numbers)}", prompt, params) for prompt in prompts]
        texts: dict[str, list[int]] = {request.request_id: [] for request in requests}
        ends: list[RequestStats] = []
        begin = end = None

        def reached() -> tuple[int, float]:
            """The tokens of all texts so far, and the time."""
            return sum(map(len, texts.values())), time.perf_counter()

        for chunks in engine.stream(requests):
            for chunk in chunks:
                if chunk.error is not None:
                    raise RuntimeError(f"{engine.schedule_name}: {chunk.error}")
                texts[chunk.request_id] += chunk.token_ids
                if chunk.stats is not None:
                    ends.append(chunk.stats)
            if ends:
                end = end or reached()
            elif begin is None and all(texts.values()):
                begin = reached()
        return Output(
            list(texts.values()),
            cycles=sum(stats.cycles for stats in ends),
            passes=sum(stats.passes for stats in ends),
            together=Together(end[0] - begin[0], end[1] - begin[1]) if begin and end else None,
        )

    return Contestant(engine.schedule_name, run)


def hardware(device: torch.device) -> str:
    """The name of the processor or GPU that was measured."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.split(":", 1)[1].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        name = models[0] if models else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"
