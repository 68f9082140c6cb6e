"""`orthrus compare --shape`: the speeds of ways to decode, on a model's shape with random weights, in one interleaved run.

The values of the weights affect speed only through how often drafts are right. So drafts are replayed from the AR text, and are
right as often as the options say. All passes run in full, and drafts are planned as a server plans them. Plain decoding, Orthrus
and Medusa share one engine. Each of the formats with fewer bits has its own. To measure what methods change in the output, a
trained checkpoint is needed: `orthrus compare MODEL`.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from orthrus.engine import Engine
from orthrus.engine.sizing import choose_device
from orthrus.errors import ConfigError
from orthrus.measure.acceptance import chain_profile
from orthrus.measure.contest import Contestant, Progress, engine_contestant, hardware, verdict
from orthrus.measure.plots import load_pyplot
from orthrus.measure.random_model import BLOCK_SIZE, QUANTISED, shape_config, shape_engine
from orthrus.measure.replay import ReplaySchedule, replaying
from orthrus.measure.shape_bench import ShapeBenchOptions, engine_settings, random_prompts
from orthrus.measure.shape_race import race, recorded, scheduled
from orthrus.measure.shape_report import Speed
from orthrus.models.medusa_config import MedusaConfig
from orthrus.models.shard import Shard
from orthrus.models.sizes import weight_bytes
from orthrus.schedules.ar import ARSchedule
from orthrus.schedules.medusa import MedusaSchedule
from orthrus.schedules.registry import AR

_SPARSE = "2:4 is not timed: there is no kernel for it here, so pruned weights run dense, at the speed of ar"


@dataclass(frozen=True)
class ShapeCompareOptions:
    """What to compare: greedy decoding of `new_tokens` around a context of `context`, at each of `batches`."""

    shape: str = "8B"
    """A key of `QWEN3_SHAPES`."""
    device: str = "auto"
    batches: tuple[int, ...] = (1, 4, 64)
    context: int = 1024
    new_tokens: int = 64
    rounds: int = 3
    tokens_per_cycle: float = 10.6
    """Tokens per cycle with Orthrus' replayed drafts, in blocks of full length."""
    medusa_tokens_per_cycle: float = 2.5
    """Tokens per cycle with Medusa's replayed drafts, if all are verified."""
    medusa_heads: int = 5
    own_projections: bool = True
    """Whether Medusa heads have vocabulary projections of their own, as in Medusa-1."""


@dataclass(frozen=True)
class ShapeMethod:
    """One method's weights and drafts."""

    name: str
    weights_gib: float
    """Its weights on a GPU, in 16 bits where they are not quantised. Copies for drafts are not counted."""
    drafts: str
    """Where its drafts come from, and how often they are right."""


@dataclass(frozen=True)
class ShapeCompareReport:
    """All speeds, and what they were measured on."""

    shape: str
    dtype: str
    hardware: str
    torch: str
    context: int
    new_tokens: int
    methods: tuple[ShapeMethod, ...]
    """AR decoding first."""
    speeds: tuple[Speed, ...]
    """By batch size, and then by method."""
    exact: bool
    """Whether Orthrus and Medusa gave the tokens of AR decoding."""
    left_out: tuple[str, ...]
    """Methods that were not measured, each with the reason."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def to_text(self) -> str:
        lines = [
            f"Qwen3-{self.shape} shape, random weights, {self.dtype}, {self.hardware}, torch {self.torch}",
            f"{self.new_tokens} new tokens around a context of {self.context}; drafts are planned as a server plans them",
            "time counts until the first text ends",
            "",
            f"{'batch':>5}  {'':<10}{'tok/s':>10}{'over ar':>20}{'tok/cycle':>11}",
        ]
        for speed in self.speeds:
            lines.append(
                f"{speed.batch:>5}  {speed.contestant:<10}{speed.tokens_per_second:>10.1f}{speed.over_ar!s:>20}"
                f"{speed.tokens_per_cycle:>11.2f}"
            )
        lines += ["", f"{'':<10}{'weights':>12}  drafts"]
        lines += [f"{m.name:<10}{m.weights_gib:>8.2f} GiB  {m.drafts}" for m in self.methods]
        lines += [f"left out: {reason}" for reason in self.left_out]
        if "cores" in self.hardware:
            lines.append("a CPU decodes fp8, int8 and int4 with dequantised weights: a GPU has other speeds")
        return "\n".join([*lines, "", verdict(self.exact)])


def compare_shape(options: ShapeCompareOptions, progress: Progress = lambda line: None) -> ShapeCompareReport:
    """Run the comparison. progress: called with a line for each step. Raises ConfigError if a shape or setting can't be used."""
    device = choose_device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    bench = _bench(options)
    medusa = MedusaConfig.of(
        shape_config(options.shape, diffusion=False), options.medusa_heads, options.own_projections
    )
    progress("loading: ar, orthrus, medusa")
    model = shape_config(options.shape)
    engine = shape_engine(model, "orthrus", device, dtype, medusa=medusa, **engine_settings(bench))
    contestants, methods = _drafting(engine, medusa, options)
    lossless = [contestant.name for contestant in contestants]
    left_out = [_SPARSE]
    for name in QUANTISED:
        progress(f"loading: {name}")
        try:
            own = _quantised(options, name, device, dtype)
        except (ConfigError, torch.OutOfMemoryError) as error:
            left_out.append(f"{name}: {error}")
            continue
        contestants.append(replace(engine_contestant(own), name=name))
        methods.append(ShapeMethod(name, _gib(weight_bytes(Shard(own.model_config), 2)), "none"))
    speeds: list[Speed] = []
    exact, prompts = True, random_prompts(bench, model.vocab_size)
    for batch in options.batches:
        found, same = race(
            contestants, lossless, prompts[:batch], options.new_tokens, options.rounds, progress
        )
        speeds, exact = speeds + found, exact and same
    return ShapeCompareReport(
        shape=options.shape,
        dtype=str(dtype).removeprefix("torch."),
        hardware=hardware(device),
        torch=torch.__version__,
        context=options.context,
        new_tokens=options.new_tokens,
        methods=tuple(methods),
        speeds=tuple(speeds),
        exact=exact,
        left_out=tuple(left_out),
    )


def _bench(options: ShapeCompareOptions) -> ShapeBenchOptions:
    """The options of `orthrus bench shape` for the same run."""
    return ShapeBenchOptions(
        shape=options.shape,
        batches=options.batches,
        context=options.context,
        new_tokens=options.new_tokens,
        rounds=options.rounds,
        mixed_batch=0,
        prompts=(),
    )


def _drafting(
    engine: Engine, medusa: MedusaConfig, options: ShapeCompareOptions
) -> tuple[list[Contestant], list[ShapeMethod]]:
    """The contestants with unquantised weights: plain decoding, Orthrus and Medusa."""
    orthrus = replaying(engine, chain_profile(options.tokens_per_cycle, BLOCK_SIZE), adaptive=True)
    context = engine.schedule_context()
    adaptive = context.config.model_copy(update={"adaptive_draft": True, "draft_length": None})
    by_medusa = ReplaySchedule(
        MedusaSchedule.build(replace(context, config=adaptive)),
        engine.model_config.vocab_size,
        [chain_profile(options.medusa_tokens_per_cycle, options.medusa_heads + 1)],
    )
    plain = replace(engine.model_config, block_size=None, mask_token_id=None)
    size = weight_bytes(Shard(plain), 2)
    heads = 2 * engine.forward.num_medusa_weights
    kind = "their own projections" if medusa.own_projections else "the LM head"
    methods = [
        ShapeMethod(AR, _gib(size), "none"),
        ShapeMethod(
            "orthrus",
            _gib(weight_bytes(Shard(engine.model_config), 2)),
            f"diffusion blocks, {engine.forward.draft_format or 'same'} weights, replayed at "
            f"{options.tokens_per_cycle:g} tokens per cycle",
        ),
        ShapeMethod(
            "medusa",
            _gib(size + heads),
            f"{options.medusa_heads} heads with {kind}, replayed at {options.medusa_tokens_per_cycle:g} tokens per cycle",
        ),
    ]
    contestants = [
        recorded(scheduled(AR, engine, ARSchedule()), [orthrus, by_medusa]),
        scheduled("orthrus", engine, orthrus),
        scheduled("medusa", engine, by_medusa),
    ]
    return contestants, methods


def _quantised(options: ShapeCompareOptions, format: str, device: torch.device, dtype: torch.dtype) -> Engine:
    """An engine of random weights in a format with fewer bits."""
    model = shape_config(options.shape, diffusion=False, quantised=format)
    settings = engine_settings(_bench(options)) | {"draft_weights": "auto"}
    return shape_engine(model, AR, device, dtype, **settings)


def _gib(size: float) -> float:
    return size / (1 << 30)


def plot(report: ShapeCompareReport, file: Path) -> None:
    """Draw the speeds over plain decoding by batch size. Raises ConfigError without matplotlib."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for method in report.methods:
        own = [speed for speed in report.speeds if speed.contestant == method.name]
        axes.plot(
            [str(speed.batch) for speed in own],
            [speed.over_ar.median for speed in own],
            marker="o",
            label=method.name,
        )
    axes.set_xlabel("requests")
    axes.set_ylabel("speed over ar")
    axes.legend()
    figure.suptitle(f"Qwen3-{report.shape} shape, {report.hardware}, {report.context} tokens of context")
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)
