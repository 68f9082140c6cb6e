"""`orthrus bench shape`: a published model's shape on this GPU, with random weights, side by side in one run.

Contestants: Hugging Face `generate`, eager and with a static cache and compiled forward, and our schedules. Weights are random,
so no draft of theirs would ever be right: drafts are replayed from the AR text with errors put in at a given rate, and all
passes run in full. What a trained checkpoint adds is its own acceptance, not other work.
"""

import gc
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthrus.cache.kv_formats import kv_bytes_per_token
from orthrus.engine.config import EngineConfig
from orthrus.engine.engine import DECODE_ROWS, Engine
from orthrus.errors import ConfigError
from orthrus.measure.bench import Contestant, Output, Ratio, engine_contestant, hardware, ratio
from orthrus.models.config import ModelConfig
from orthrus.models.families import family_of
from orthrus.models.files import weight_bytes
from orthrus.models.shapes import QWEN3_SHAPES
from orthrus.plan import RowGroup, View
from orthrus.requests.request import SamplingParams
from orthrus.requests.sequence import Draft
from orthrus.requests.sequence import Sequence as EngineSequence
from orthrus.schedules import Schedule
from orthrus.schedules.ar import ARSchedule
from orthrus.schedules.orthrus import OrthrusSchedule
from orthrus.schedules.planner import DraftPlanner

Progress = Callable[[str], None]

BLOCK_SIZE, PASSES = 32, 30
_GOLDEN = (math.sqrt(5) - 1) / 2
_PAGE = 64
EAGER, COMPILED = "hf eager", "hf static, compiled"


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


class ReplaySchedule(OrthrusSchedule):
    """Orthrus' schedule with drafts that are right as often as wished: passes run in full, their picks are replaced.

    `learn` tells it what the AR schedule makes of each prompt. agreement: chance that a draft is right if all before it are.
    """

    def __init__(
        self, planner: DraftPlanner, mask_token_id: int, vocab_size: int, agreement: float, seed: int = 0
    ) -> None:
        super().__init__(planner, mask_token_id)
        self._texts: dict[tuple[tuple[int, ...], int], list[int]] = {}
        self._vocab_size, self._seed = vocab_size, seed
        self._log_agreement = math.log(min(max(agreement, 1e-9), 1 - 1e-9))

    def learn(self, prompt: Sequence[int], params: SamplingParams, tokens: Sequence[int]) -> None:
        """Note that the AR schedule continues `prompt` with `tokens`."""
        self._texts[_key(prompt, params)] = [*prompt, *tokens]

    def commit(
        self, sequence: EngineSequence, groups: tuple[RowGroup, ...], picks: list[list[int]]
    ) -> list[int]:
        if groups[-1].view is not View.DIFFUSION:
            return super().commit(sequence, groups, picks)
        if sequence.draft is None:
            sequence.draft = self._replay(sequence, groups[-1])
        return []

    def foresee(self, sequence: EngineSequence, groups: tuple[RowGroup, ...], feeds: list[list[int]]) -> None:
        if groups[-1].view is View.DIFFUSION:
            sequence.draft = self._replay(sequence, groups[-1])
        else:
            super().foresee(sequence, groups, feeds)

    def _replay(self, sequence: EngineSequence, block: RowGroup) -> Draft:
        text = self._texts[_key(sequence.tokens[: sequence.num_prompt], sequence.params)]
        right = text[block.start + 1 : block.start + 1 + block.num_logits]
        # Draws that spread evenly over a sequence's cycles: a few bring what many would on average.
        first = random.Random(hash((self._seed, *text[-4:]))).random()
        draw = (first + sequence.cycles * _GOLDEN) % 1.0
        wrong = int(math.log1p(-draw) / self._log_agreement)
        tokens = [(t + (depth == wrong)) % self._vocab_size for depth, t in enumerate(right)]
        return Draft(tokens + [0] * (block.num_logits - len(tokens)))


def _key(prompt: Sequence[int], params: SamplingParams) -> tuple[tuple[int, ...], int]:
    # Prompts here are random: their ends tell them apart.
    assert params.greedy or params.seed is not None
    return tuple(prompt[-24:]), 0 if params.greedy or params.seed is None else params.seed


def agreement_for(tokens_per_cycle: float, block_rows: int) -> float:
    """The chance of each draft with which a block brings so many tokens: 1 + a + a^2 + ... + a^(rows - 1)."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if sum(middle**depth for depth in range(block_rows)) < tokens_per_cycle:
            low = middle
        else:
            high = middle
    return low


def shape_config(shape: str, diffusion: bool = True) -> ModelConfig:
    """The shape as a model, with a diffusion view or without. Raises ConfigError for an unknown one."""
    if shape not in QWEN3_SHAPES:
        raise ConfigError(f"shape {shape!r} is not known: use one of {', '.join(QWEN3_SHAPES)}")
    model = replace(QWEN3_SHAPES[shape], name=f"Qwen3-{shape}")
    return replace(model, block_size=BLOCK_SIZE, mask_token_id=151669) if diffusion else model


def random_weights(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights that keep a row's size about one, each a function of its name alone."""

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, device=device, dtype=dtype)
        seed = random.Random(name).getrandbits(40)
        generator = torch.Generator(device).manual_seed(seed)
        return torch.empty(shape, device=device, dtype=dtype).normal_(
            0.0, shape[1] ** -0.5, generator=generator
        )

    return {name: tensor(name, shape) for name, shape in family_of(model).tensor_shapes(model).items()}


def shape_engine(
    model: ModelConfig, schedule: str, device: torch.device, dtype: torch.dtype, **settings: Any
) -> Engine:
    """An engine of random weights."""
    fixed = {"model": model.name, "schedule": schedule, "adaptive_draft": False}
    config = EngineConfig.model_validate(fixed | settings)
    return Engine(config, model, random_weights(model, device, dtype))


def replaying(engine: Engine, agreement: float, seed: int = 0) -> ReplaySchedule:
    """Give an Orthrus engine a schedule that replays its drafts; its texts are for the caller to fill in."""
    model = engine.model_config
    assert model.block_size is not None and model.mask_token_id is not None
    planner = DraftPlanner(model.block_size, None, DECODE_ROWS)
    schedule = ReplaySchedule(planner, model.mask_token_id, model.vocab_size, agreement, seed)
    engine.use_schedule(schedule)
    return schedule


def shape_bench(options: ShapeBenchOptions, progress: Progress = lambda line: None) -> ShapeReport:
    """Measure. Raises ConfigError for an unknown shape, and where there is no GPU."""
    if not torch.cuda.is_available():
        raise ConfigError("a shape is measured on a GPU, and there is none here: use `orthrus bench`")
    from kernels.bench import bandwidths

    device, dtype = torch.device("cuda"), torch.bfloat16
    model = shape_config(options.shape)
    most = max(options.batches)
    # Prompts end one token behind a page that stays cached: all sequences decode from the second pass on. The context is
    # that of the text's middle.
    context = max(1, round((options.context - options.new_tokens / 2) / _PAGE)) * _PAGE
    new_pages = -(-(1 + options.new_tokens + BLOCK_SIZE) // _PAGE)
    pages = context // _PAGE + new_pages
    settings = {
        # Texts of finished requests stay cached too.
        "kv_cache_tokens": most * (pages + new_pages) * _PAGE,
        "max_model_len": pages * _PAGE,
        "max_num_seqs": most,
        "prefill_chunk": 2048,
        "page_size": _PAGE,
    }
    _, read = bandwidths()
    rng = random.Random(0)
    prompts = [[rng.randrange(100_000) for _ in range(context + 1)] for _ in range(most)]

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    progress("our engine")
    engine = shape_engine(model, "orthrus", device, dtype, **settings)
    schedule = replaying(engine, agreement_for(options.tokens_per_cycle, BLOCK_SIZE))
    passes = tuple(pass_times(engine, options, read))
    for p in passes:
        progress(f"{p.name}: {p.milliseconds:.3f} ms")
    held = weight_bytes(model, dtype.itemsize) + engine.cache.nbytes
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
        weights_gib=weight_bytes(model, dtype.itemsize) / (1 << 30),
        memory_over=over,
    )


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
        seconds = engine.time_passes(view, rows, batch, options.context, PASSES)
        size = views - lookup + batch * options.context * kv_bytes_per_token(model, torch.bfloat16.itemsize)
        milliseconds = statistics.median(seconds) * 1e3
        found.append(PassTime(name, milliseconds, size / read / 1e6 / milliseconds))
    return found


def hugging_face_model(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """transformers' own model with the weights of `random_weights`, the AR view's."""
    family = family_of(model)
    classes = family.hugging_face()
    plain = replace(model, block_size=None, mask_token_id=None)
    with torch.device("meta"):
        theirs = classes.model(classes.config(**family.write_config(plain)))
    weights = random_weights(plain, device, dtype)
    if model.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    theirs.load_state_dict(weights, assign=True)
    # What is no weight has to be made anew.
    inv_freq, _ = family.rotary(model)
    theirs.model.rotary_emb.inv_freq = inv_freq.to(device)
    theirs.model.rotary_emb.original_inv_freq = inv_freq.to(device)
    return theirs.eval()


def hugging_face_contestants(
    model: ModelConfig, device: torch.device, dtype: torch.dtype
) -> list[Contestant]:
    """transformers' `generate` of the same weights: eager, and with a static cache and a compiled forward."""
    from transformers import GenerationConfig

    theirs = hugging_face_model(model, device, dtype)

    def contestant(name: str, cache: str | None) -> Contestant:
        def run(prompts: list[list[int]], new_tokens: int) -> Output:
            ids = torch.tensor(prompts, device=device)
            settings = GenerationConfig(
                do_sample=False, max_new_tokens=new_tokens, pad_token_id=0, cache_implementation=cache
            )
            rows = theirs.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            steps = len(prompts) * (new_tokens - 1)
            return Output(rows[:, ids.shape[1] :].tolist(), cycles=steps, passes=steps)

        return Contestant(name, run)

    return [contestant(EAGER, None), contestant(COMPILED, "static")]


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
