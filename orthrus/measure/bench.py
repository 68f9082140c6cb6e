"""`orthrus bench`: tokens per second of our schedules beside Hugging Face generate, on the same prompts in one run.

Contestants take turns. At every batch size, a round runs all of them, starting with another one each time, and then all of them
in reverse order. So a machine that slows down meanwhile affects all of them alike. A contestant's time in a round is the better
of its two, because other work of the machine can only add time. The report has the median over rounds of the ratio of two
contestants in the same round.
"""

import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from orthrus.engine import Engine, EngineConfig
from orthrus.engine.sizing import choose_device
from orthrus.errors import ConfigError
from orthrus.measure.contest import (
    Contestant,
    Output,
    Progress,
    Ratio,
    engine_contestant,
    hardware,
    ratio,
    verdict,
)
from orthrus.measure.hugging_face import hugging_face
from orthrus.measure.prompts import encode_prompts
from orthrus.models.config import ModelConfig
from orthrus.models.families import load_config
from orthrus.models.hub import resolve
from orthrus.schedules.registry import SCHEDULES
from orthrus.text.tokenizer import load_tokenizer

WARM_UP_TOKENS = 8
AR = "ar"
"""The schedule that the others are compared with."""


@dataclass(frozen=True)
class BenchOptions:
    """What to measure: greedy decoding of `new_tokens` per request, at each of `batches` requests, `rounds` times."""

    model: str
    device: str = "auto"
    dtype: str = "auto"
    batches: tuple[int, ...] = (1, 4, 16)
    new_tokens: int = 128
    rounds: int = 5


@dataclass(frozen=True)
class Measurement:
    """One contestant at one batch size: medians over rounds. tokens_per_second: of all requests together.

    agreement: share of tokens before the first difference from Hugging Face's text.
    """

    contestant: str
    batch: int
    tokens_per_second: float
    over_hugging_face: Ratio
    over_ar: Ratio
    tokens_per_cycle: float
    tokens_per_pass: float
    agreement: float


@dataclass(frozen=True)
class BenchReport:
    """All measurements of a run and what they were taken on. `exact`: every schedule of ours gave the same tokens."""

    model: str
    device: str
    dtype: str
    hardware: str
    torch: str
    threads: int
    new_tokens: int
    rounds: int
    exact: bool
    measurements: tuple[Measurement, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def to_text(self) -> str:
        lines = [
            f"{self.model}, {self.dtype}, {self.hardware}, torch {self.torch}: greedy, {self.new_tokens} new tokens, "
            f"medians of {self.rounds} round{'s' if self.rounds > 1 else ''}",
            "",
            f"{'batch':>5}  {'':<14}{'tok/s':>9}{'over Hugging Face':>20}{'over ar':>20}"
            f"{'tok/cycle':>11}{'tok/pass':>10}{'agrees':>8}",
        ]
        for m in self.measurements:
            lines.append(
                f"{m.batch:>5}  {m.contestant:<14}{m.tokens_per_second:>9.1f}{m.over_hugging_face!s:>20}{m.over_ar!s:>20}"
                f"{m.tokens_per_cycle:>11.2f}{m.tokens_per_pass:>10.2f}{m.agreement:>8.1%}"
            )
        return "\n".join([*lines, "", verdict(self.exact)])


def bench(options: BenchOptions, progress: Progress = lambda line: None) -> BenchReport:
    """Run the benchmark. progress: called with a line for each round. Raises ConfigError if the model can't be loaded so."""
    path = resolve(options.model)
    model = load_config(path)
    device = choose_device(options.device)
    prompts = bench_prompts(path, model, max(options.batches))
    if max(map(len, prompts)) + options.new_tokens > model.max_position_embeddings:
        raise ConfigError(
            f"--new-tokens {options.new_tokens} does not fit a context of {model.max_position_embeddings} with the prompts"
        )
    schedules = [name for name, entry in SCHEDULES.items() if entry.fits(model.has_diffusion) and name != AR]
    ours = [_engine(path, options, schedule) for schedule in (AR, *schedules)]
    dtype = ours[0].forward.dtype
    contestants = [hugging_face(path, model, device, dtype), *(engine_contestant(engine) for engine in ours)]
    seconds, outputs = run_rounds(
        contestants, prompts, options.batches, options.new_tokens, options.rounds, progress
    )
    base, ar, *others = (contestant.name for contestant in contestants)
    return BenchReport(
        model=options.model,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        hardware=hardware(device),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        new_tokens=options.new_tokens,
        rounds=options.rounds,
        exact=all(
            outputs[name, batch].token_ids == outputs[ar, batch].token_ids
            for batch in options.batches
            for name in others
        ),
        measurements=tuple(
            _measurement(
                name,
                batch,
                seconds[name, batch],
                seconds[base, batch],
                seconds[ar, batch],
                outputs[name, batch],
                outputs[base, batch],
            )
            for batch in options.batches
            for name in (base, ar, *others)
        ),
    )


def run_rounds(
    contestants: list[Contestant],
    prompts: list[list[int]],
    batches: Sequence[int],
    new_tokens: int,
    rounds: int,
    progress: Progress,
) -> tuple[dict[tuple[str, int], list[float]], dict[tuple[str, int], Output]]:
    """The seconds of each round and the last output, by contestant and batch size."""
    for batch in batches:
        for contestant in contestants:
            contestant.run(prompts[:batch], min(WARM_UP_TOKENS, new_tokens))
    seconds: dict[tuple[str, int], list[float]] = {(c.name, b): [] for c in contestants for b in batches}
    outputs: dict[tuple[str, int], Output] = {}
    for number in range(rounds):
        for batch in batches:
            turn = number % len(contestants)
            order = contestants[turn:] + contestants[:turn]
            best = dict.fromkeys((c.name for c in contestants), math.inf)
            for contestant in [*order, *reversed(order)]:
                started = time.perf_counter()
                outputs[contestant.name, batch] = contestant.run(prompts[:batch], new_tokens)
                best[contestant.name] = min(best[contestant.name], time.perf_counter() - started)
            for name, own in best.items():
                seconds[name, batch].append(own)
        progress(f"round {number + 1} of {rounds}")
    return seconds, outputs


def bench_prompts(path: Path, model: ModelConfig, count: int) -> list[list[int]]:
    """`count` prompts as token ids: text where the checkpoint has a tokenizer, else pseudo-random ids."""
    if (path / "tokenizer.json").exists():
        texts = encode_prompts(load_tokenizer(path))
    else:
        generator = torch.Generator().manual_seed(0)
        texts = [torch.randint(model.vocab_size, (24,), generator=generator).tolist() for _ in range(16)]
    return [texts[i % len(texts)] for i in range(count)]


def _engine(path: Path, options: BenchOptions, schedule: str) -> Engine:
    # Without the prefix cache: with it, the prompts would cost nothing from the second round on.
    return Engine.from_pretrained(
        EngineConfig.model_validate(
            {
                "model": str(path),
                "device": options.device,
                "dtype": options.dtype,
                "schedule": schedule,
                "prefix_caching": False,
                "max_num_seqs": max(options.batches),
            }
        )
    )


def _measurement(
    name: str,
    batch: int,
    seconds: list[float],
    hugging_face_seconds: list[float],
    ar_seconds: list[float],
    output: Output,
    base: Output,
) -> Measurement:
    tokens = sum(map(len, output.token_ids))
    after_first = tokens - len(output.token_ids)
    agreeing = sum(_agreeing(a, b) for a, b in zip(output.token_ids, base.token_ids, strict=True))
    return Measurement(
        contestant=name,
        batch=batch,
        tokens_per_second=tokens / statistics.median(seconds),
        over_hugging_face=ratio(seconds, hugging_face_seconds),
        over_ar=ratio(seconds, ar_seconds),
        tokens_per_cycle=output.tokens_per_cycle,
        tokens_per_pass=after_first / max(1, output.passes),
        agreement=agreeing / tokens,
    )


def _agreeing(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
