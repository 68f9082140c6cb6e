"""The report of `orthrus bench shape`, as text, JSON and a picture."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from orthrus.measure.contest import Ratio, verdict
from orthrus.measure.plots import load_pyplot


@dataclass(frozen=True)
class PassTime:
    """Median milliseconds of a pass when passes follow each other, and how fast it reads weights and cache."""

    name: str
    milliseconds: float
    share_of_read: float


@dataclass(frozen=True)
class PromptTime:
    """Median time to the first token of a fresh prompt, alone."""

    tokens: int
    milliseconds: float
    over_floor: float
    """This time over the time of the layers' arithmetic at the rate of cuBLAS."""


@dataclass(frozen=True)
class Speed:
    """One contestant at one batch size: medians over rounds."""

    contestant: str
    batch: int
    tokens_per_second: float
    over_ar: Ratio
    over_compiled: Ratio | None
    tokens_per_cycle: float


@dataclass(frozen=True)
class ShapeReport:
    """What was measured, and on what."""

    shape: str
    hardware: str
    torch: str
    context: int
    new_tokens: int
    replayed: tuple[str, ...]
    """How often the replayed drafts are right, in words: one entry for each acceptance profile."""
    read_gbps: float
    passes: tuple[PassTime, ...]
    prompts: tuple[PromptTime, ...]
    speeds: tuple[Speed, ...]
    exact: bool
    """Whether every schedule gave the tokens of `ar`."""
    weights_gib: float
    memory_over: float
    """Peak memory over weights and KV cache of our engine."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def to_text(self) -> str:
        lines = [
            f"Qwen3-{self.shape} shape, random weights, bfloat16, {self.hardware}, torch {self.torch}",
            f"{self.new_tokens} new tokens around a context of {self.context}; blocks are planned as a server plans them",
            "time counts until the first text ends; tokens per cycle are those of whole texts",
            *(f"drafts are replayed from the AR text: {replayed}" for replayed in self.replayed),
            f"read bandwidth {self.read_gbps:.0f} GB/s, weights {self.weights_gib:.1f} GiB, peak memory "
            f"{self.memory_over:.1%} over weights and KV cache",
            "",
            *(
                f"{p.name:<24}{p.milliseconds:>8.3f} ms  {p.share_of_read:>5.0%} of the bandwidth"
                for p in self.passes
            ),
            *(
                f"{f'prompt, {p.tokens:,} tokens':<24}{p.milliseconds:>8.1f} ms  {p.over_floor:>5.2f} x the arithmetic at "
                "cuBLAS' rate"
                for p in self.prompts
            ),
            "",
            f"{'batch':>5}  {'':<22}{'tok/s':>9}{'over ar':>20}{'over compiled':>20}{'tok/cycle':>11}",
        ]
        for s in self.speeds:
            lines.append(
                f"{s.batch:>5}  {s.contestant:<22}{s.tokens_per_second:>9.1f}{s.over_ar!s:>20}"
                f"{(str(s.over_compiled) if s.over_compiled else ''):>20}{s.tokens_per_cycle:>11.2f}"
            )
        return "\n".join([*lines, "", verdict(self.exact)])


def plot(report: ShapeReport, file: Path) -> None:
    """Draw the report: milliseconds of the passes, and tokens per second. Raises ConfigError without matplotlib."""
    pyplot = load_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 1 + 0.25 * max(10, len(report.speeds))))
    left.barh([p.name for p in report.passes], [p.milliseconds for p in report.passes])
    left.set_xlabel("milliseconds")
    right.barh(
        [f"{s.contestant}, batch {s.batch}" for s in report.speeds],
        [s.tokens_per_second for s in report.speeds],
    )
    right.set_xscale("log")
    right.set_xlabel("tokens per second")
    for axes in (left, right):
        axes.invert_yaxis()
    figure.suptitle(f"Qwen3-{report.shape} shape, {report.hardware}, {report.context} tokens of context")
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)
