"""`orthrus bench shape`: a published model's shape on this GPU, with random weights, side by side in one run.

Contestants: Hugging Face `generate`, eager and with a static cache and compiled forward, and our schedules. Weights are random,
so no draft of theirs would ever be right: drafts are replayed from the AR text with errors put in at a given rate, and all
passes run in full. What a trained checkpoint adds is its own acceptance, not other work.
"""

import gc
import json
import random
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from orthrus.cache.kv_formats import kv_bytes_per_token
from orthrus.engine import Engine
from orthrus.errors import ConfigError
from orthrus.measure.contest import Contestant, Output, Progress, Ratio, engine_contestant, hardware, ratio
from orthrus.measure.hugging_face import COMPILED, EAGER, hugging_face_contestants
from orthrus.measure.random_model import BLOCK_SIZE, shape_config, shape_engine
from orthrus.measure.replay import ReplaySchedule, agreement_for, replaying
from orthrus.models.sizes import weight_bytes
from orthrus.plan import RowGroup, View
from orthrus.requests.request import SamplingParams
from orthrus.runner.sampler import PickRows
from orthrus.schedules.ar import ARSchedule
from orthrus.schedules.protocol import Schedule

PASSES = 30
"""Passes of each kind that are timed."""
_PAGE = 64


@dataclass(frozen=True)
class ShapeBenchOptions:
    """What to measure: greedy decoding of `new_tokens` around a context of `context`, at each of `batches`, `rounds` times.

    shape: a key of `QWEN3_SHAPES`. tokens_per_cycle: what the replayed drafts bring. hugging_face: measure it too; the compiled
    one at the first batch size only.
    """

    shape: str = "8B"
    batches: tuple[int, ...] = (1, 64)
    context: int = 1024
    new_tokens: int = 256
    rounds: int = 3
    tokens_per_cycle: float = 10.6
    hugging_face: bool = True


@dataclass(frozen=True)
class PassTime:
    """Median milliseconds of a pass when passes follow each other, and how fast it reads weights and cache."""

    name: str
    milliseconds: float
    share_of_read: float


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
    """exact: `orthrus` gave the tokens of `ar`. memory_over: peak memory over weights and KV cache of the Orthrus engine."""

    shape: str
    hardware: str
    torch: str
    context: int
    new_tokens: int
    read_gbps: float
    passes: tuple[PassTime, ...]
    speeds: tuple[Speed, ...]
    exact: bool
    weights_gib: float
    memory_over: float

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def to_text(self) -> str:
        lines = [
            f"Qwen3-{self.shape} shape, random weights, bfloat16, {self.hardware}, torch {self.torch}",
            f"{self.new_tokens} new tokens around a context of {self.context}; drafts are replayed from the AR text",
            f"read bandwidth {self.read_gbps:.0f} GB/s, weights {self.weights_gib:.1f} GiB, peak memory "
            f"{self.memory_over:.1%} over weights and KV cache",
            "",
            *(
                f"{p.name:<24}{p.milliseconds:>8.3f} ms  {p.share_of_read:>5.0%} of the bandwidth"
                for p in self.passes
            ),
            "",
            f"{'batch':>5}  {'':<22}{'tok/s':>9}{'over ar':>20}{'over compiled':>20}{'tok/cycle':>11}",
        ]
        for s in self.speeds:
            lines.append(
                f"{s.batch:>5}  {s.contestant:<22}{s.tokens_per_second:>9.1f}{s.over_ar!s:>20}"
                f"{(str(s.over_compiled) if s.over_compiled else ''):>20}{s.tokens_per_cycle:>11.2f}"
            )
        return "\n".join(
            [*lines, "", "ar and orthrus gave the same tokens" if self.exact else "AR AND ORTHRUS DIFFER"]
        )


def shape_bench(options: ShapeBenchOptions, progress: Progress = lambda line: None) -> ShapeReport:
    """Measure. Raises ConfigError for an unknown shape, and where there is no GPU."""
    if not torch.cuda.is_available():
        raise ConfigError("a shape is measured on a GPU, and there is none here: use `orthrus bench`")
    from orthrus.kernels.bench import bandwidths

    device, dtype = torch.device("cuda"), torch.bfloat16
    model = shape_config(options.shape)
    settings, prompts = _settings_and_prompts(options)
    _, read = bandwidths()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    progress("our engine")
    engine = shape_engine(model, "orthrus", device, dtype, **settings)
    schedule = replaying(engine, agreement_for(options.tokens_per_cycle, BLOCK_SIZE))
    passes = tuple(pass_times(engine, options, read))
    for p in passes:
        progress(f"{p.name}: {p.milliseconds:.3f} ms")
    weights = weight_bytes(model, dtype.itemsize)
    held = weights + engine.cache.nbytes
    over = (torch.cuda.max_memory_allocated() - before) / held - 1
    contestants = [
        _recorded(_scheduled("ar", engine, ARSchedule()), schedule),
        _scheduled("orthrus", engine, schedule),
    ]
    if options.hugging_face:
        progress("Hugging Face")
        contestants += hugging_face_contestants(model, device, dtype)
    speeds, exact = _race(contestants, prompts, options, progress)
    return ShapeReport(
        shape=options.shape,
        hardware=hardware(device),
        torch=torch.__version__,
        context=options.context,
        new_tokens=options.new_tokens,
        read_gbps=read,
        passes=passes,
        speeds=speeds,
        exact=exact,
        weights_gib=weights / (1 << 30),
        memory_over=over,
    )


def _settings_and_prompts(options: ShapeBenchOptions) -> tuple[dict[str, int], list[list[int]]]:
    """Engine settings with room for the largest batch, and its prompts.

    A prompt ends one token after a page that stays cached, so all sequences decode from the second pass on. The middle of the
    generated text is at the context that is asked for.
    """
    most = max(options.batches)
    context = max(1, round((options.context - options.new_tokens / 2) / _PAGE)) * _PAGE
    new_pages = -(-(1 + options.new_tokens + BLOCK_SIZE) // _PAGE)
    pages = context // _PAGE + new_pages
    settings = {
        "kv_cache_tokens": most * (pages + new_pages) * _PAGE,  # Texts of finished requests stay cached too.
        "max_model_len": pages * _PAGE,
        "max_num_seqs": most,
        "prefill_chunk": 2048,
        "page_size": _PAGE,
    }
    rng = random.Random(0)
    return settings, [[rng.randrange(100_000) for _ in range(context + 1)] for _ in range(most)]


def pass_times(engine: Engine, options: ShapeBenchOptions, read: float) -> list[PassTime]:
    """AR steps at every batch size, and the two passes of a cycle at batch 1, at the given context. read: GB/s."""
    model, found = engine.model_config, []
    views = weight_bytes(replace(model, block_size=None, mask_token_id=None), torch.bfloat16.itemsize)
    # A pass looks up a few rows of the embedding; a tied one is read whole, as the head.
    lookup = 0 if model.tie_word_embeddings else 2 * model.vocab_size * model.hidden_size
    for name, view, rows, batch in (
        *((f"ar step, batch {batch}", View.AR, 1, batch) for batch in options.batches),
        (f"verify {BLOCK_SIZE} rows", View.AR, BLOCK_SIZE, 1),
        (f"draft {BLOCK_SIZE} rows", View.DIFFUSION, BLOCK_SIZE, 1),
    ):
        seconds = time_passes(engine, view, rows, batch, options.context, PASSES)
        size = views - lookup + batch * options.context * kv_bytes_per_token(model, torch.bfloat16.itemsize)
        milliseconds = statistics.median(seconds) * 1e3
        found.append(PassTime(name, milliseconds, size / read / 1e6 / milliseconds))
    return found


def time_passes(engine: Engine, view: View, rows: int, batch: int, context: int, count: int) -> list[float]:
    """Seconds of each of `count` passes that follow one another: `rows` greedy rows in one view for each of `batch` sequences.

    Nothing may run meanwhile, and what the cache holds is overwritten.
    """
    each = -(-context // engine.page_size)
    groups = [
        RowGroup(view, [0] * rows, context - rows, list(range(1 + i * each, 1 + (i + 1) * each)), 0, rows)
        for i in range(batch)
    ]
    picking = [PickRows(SamplingParams(temperature=0.0), seed=0, position=1, count=rows)] * batch
    times, before, begin = [], None, time.perf_counter()
    for _ in range(count + 2):
        launched = engine.runner.launch(groups, picking)
        if before is not None:
            before.picks()
            times.append(time.perf_counter() - begin)
            begin = time.perf_counter()
        before = launched
    return times[1:]


def plot(report: ShapeReport, file: Path) -> None:
    """Draw the report: milliseconds of the passes, and tokens per second. Raises ConfigError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'orthrus-serve[train]'") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.5))
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


def _scheduled(name: str, engine: Engine, schedule: Schedule) -> Contestant:
    """The engine with one of its schedules: weights and cache are there once."""
    contestant = engine_contestant(engine)

    def run(prompts: list[list[int]], new_tokens: int) -> Output:
        engine.use_schedule(schedule)
        return contestant.run(prompts, new_tokens)

    return Contestant(name, run)


def _recorded(contestant: Contestant, schedule: ReplaySchedule) -> Contestant:
    """The AR contestant, whose texts the replayed drafts are made of."""

    def run(prompts: list[list[int]], new_tokens: int) -> Output:
        output = contestant.run(prompts, new_tokens)
        for prompt, tokens in zip(prompts, output.token_ids, strict=True):
            schedule.learn(prompt, SamplingParams(temperature=0.0), tokens)
        return output

    return Contestant(contestant.name, run)


def _race(
    contestants: list[Contestant], prompts: list[list[int]], options: ShapeBenchOptions, progress: Progress
) -> tuple[tuple[Speed, ...], bool]:
    """Every contestant in turn, round after round; decoding alone is timed: what prompts take is measured and taken off."""
    speeds, exact = [], True
    for batch in options.batches:
        taking_part = [
            c for c in contestants if batch == options.batches[0] or c.name not in (EAGER, COMPILED)
        ]
        seconds: dict[str, list[float]] = {c.name: [] for c in taking_part}
        outputs: dict[str, Output] = {}
        for contestant in taking_part:
            contestant.run(prompts[:batch], options.new_tokens)  # Compiles, and teaches the AR texts.
        gc.collect()
        gc.freeze()  # As a replica does, here what Hugging Face's compiler has left too.
        for number in range(options.rounds):
            for contestant in taking_part:
                prefill = _timed(contestant, prompts[:batch], 1)[0]
                whole, outputs[contestant.name] = _timed(contestant, prompts[:batch], options.new_tokens)
                seconds[contestant.name].append(whole - prefill)
            progress(f"batch {batch}: round {number + 1} of {options.rounds}")
        for contestant in taking_part:
            own, output = seconds[contestant.name], outputs[contestant.name]
            decoded = batch * (options.new_tokens - 1)
            speeds.append(
                Speed(
                    contestant=contestant.name,
                    batch=batch,
                    tokens_per_second=decoded / statistics.median(own),
                    over_ar=ratio(own, seconds["ar"]),
                    over_compiled=ratio(own, seconds[COMPILED]) if COMPILED in seconds else None,
                    tokens_per_cycle=decoded / max(1, output.cycles),
                )
            )
        exact &= outputs["orthrus"].token_ids == outputs["ar"].token_ids
    return tuple(speeds), exact


def _timed(contestant: Contestant, prompts: list[list[int]], new_tokens: int) -> tuple[float, Output]:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    output = contestant.run(prompts, new_tokens)
    return time.perf_counter() - begin, output
