"""`orthrus bench shape`: a published model's shape on this GPU, with random weights, side by side in one run.

Contestants: Hugging Face `generate`, both eager and with a static cache and compiled forward, and our schedules. With random
weights no draft would ever be right. So drafts are replayed from the AR text, and are right as often as an acceptance profile
says. All passes run in full. A trained checkpoint has other acceptance, but its passes do the same work.
"""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from orthrus.cache.kv_formats import kv_bytes_per_token
from orthrus.engine import Engine
from orthrus.engine.draft_weights import COPY_BYTES, ONE_PLANE
from orthrus.errors import ConfigError
from orthrus.measure.acceptance import AcceptanceProfile, chain_profile
from orthrus.measure.contest import Contestant, Progress, hardware
from orthrus.measure.hugging_face import hugging_face_contestants
from orthrus.measure.prompt_time import matmul_rate, prompt_times
from orthrus.measure.random_model import BLOCK_SIZE, shape_config, shape_engine
from orthrus.measure.shape_race import our_contestants, race
from orthrus.measure.shape_report import PassTime, ShapeReport, Speed
from orthrus.models.config import ModelConfig
from orthrus.models.shard import Shard
from orthrus.models.sizes import NO_BYTES, CopyBytes, weight_bytes
from orthrus.plan import RowGroup, View
from orthrus.requests.request import SamplingParams
from orthrus.runner.sampler import PickRows

PASSES = 30
"""Passes of each kind that are timed."""
_PAGE = 64
_MIXED_ROWS = (4, 8, 16)
"""Lengths of the blocks that mixed batches are also decoded with."""
_HARD = 2.0
"""Tokens per cycle of one half of a mixed batch. The other half has the first of `ShapeBenchOptions.tokens_per_cycle`."""


@dataclass(frozen=True)
class ShapeBenchOptions:
    """What to measure: greedy decoding of `new_tokens` around a context of `context`, at each of `batches`, `rounds` times."""

    shape: str = "8B"
    """A key of `QWEN3_SHAPES`."""
    batches: tuple[int, ...] = (1, 4, 16, 64, 256)
    context: int = 1024
    new_tokens: int = 256
    rounds: int = 3
    tokens_per_cycle: tuple[float, ...] = (10.6, 3.84)
    """Tokens per cycle with replayed drafts, in blocks of full length. Each number has its own lines in the report."""
    profile: Path | None = None
    """An `AcceptanceProfile` to scale to these. None: a chance that is the same at every depth."""
    mixed_batch: int = 16
    """Sequences of the mixed batch; 0 for none."""
    prompts: tuple[int, ...] = (2048, 8192)
    """Lengths of fresh prompts, in tokens, whose first token is timed."""
    quantised: str | None = None
    """The format of the AR view's linear layers, a key of `QUANTISED`; None: they are in full. The diffusion view is in full."""
    weights: str = "auto"
    """As in `EngineConfig`."""
    draft_weights: str = "auto"
    """As in `EngineConfig`."""
    draft_tree: int | str = 0
    """As in `EngineConfig`. Trees need a profile with ranks."""
    hugging_face: bool = True
    """Whether to measure Hugging Face too, at the first batch size."""
    tensor_parallel: int = 1
    """GPUs that share the model. The bytes of a pass are compared with what all of them together can read."""

    def __post_init__(self) -> None:
        if self.new_tokens < 2:
            raise ConfigError(
                f"decoding can't be timed with {self.new_tokens} new token, which comes from the prompt: give at least 2"
            )


def shape_bench(options: ShapeBenchOptions, progress: Progress = lambda line: None) -> ShapeReport:
    """Run the benchmark. Raises ConfigError for an unknown shape or a wrong profile, and if there is no GPU."""
    acceptance = acceptances(options, BLOCK_SIZE)
    if not torch.cuda.is_available():
        raise ConfigError("a shape is measured on a GPU, and there is none here: use `orthrus bench`")
    from orthrus.kernels.bench import bandwidths

    device, dtype = torch.device("cuda"), torch.bfloat16
    model = shape_config(options.shape, quantised=options.quantised)
    _, read = bandwidths()
    read *= options.tensor_parallel
    rate = matmul_rate(device, dtype) * options.tensor_parallel
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    progress("our engine")
    engine = shape_engine(model, "orthrus", device, dtype, **engine_settings(options))
    passes = pass_times(engine, options, read)
    for p in passes:
        progress(f"{p.name}: {p.milliseconds:.3f} ms")
    prompts = prompt_times(engine, options.prompts, rate)
    for prompt in prompts:
        progress(f"prompt, {prompt.tokens:,} tokens: {prompt.milliseconds:.1f} ms, {prompt.over_floor:.2f} x")
    weights = weight_bytes(
        engine.forward.shard, dtype.itemsize, _copy_bytes(engine), lossless=_is_lossless(engine)
    )
    held = weights + engine.cache.nbytes
    over = (torch.cuda.max_memory_allocated() - before) / held - 1
    others: list[Contestant] = []
    if options.hugging_face and options.tensor_parallel == 1 and options.quantised is None:
        progress("Hugging Face")
        others = hugging_face_contestants(model, device, dtype)
    speeds, exact = all_races(engine, options, acceptance, others, progress)
    return ShapeReport(
        shape=options.shape,
        hardware=hardware(device),
        torch=torch.__version__,
        context=options.context,
        new_tokens=options.new_tokens,
        replayed=tuple(profile.source for _, profile in acceptance),
        read_gbps=read,
        passes=tuple(passes),
        prompts=tuple(prompts),
        speeds=tuple(speeds),
        exact=exact,
        weights_gib=weights / (1 << 30),
        memory_over=over,
    )


def acceptances(options: ShapeBenchOptions, block_rows: int) -> list[tuple[str, AcceptanceProfile]]:
    """The profiles to replay, each with its tokens per cycle as its name. Raises ConfigError."""
    if options.profile is None:
        return [(f"{wanted:g}", chain_profile(wanted, block_rows)) for wanted in options.tokens_per_cycle]
    profile = AcceptanceProfile.read(options.profile)
    return [(f"{wanted:g}", profile.scaled(wanted, block_rows)) for wanted in options.tokens_per_cycle]


def all_races(
    engine: Engine,
    options: ShapeBenchOptions,
    acceptance: Sequence[tuple[str, AcceptanceProfile]],
    others: Sequence[Contestant],
    progress: Progress,
) -> tuple[list[Speed], bool]:
    """The speeds at every batch size, then those of the mixed batch; and whether all schedules gave the same tokens.

    others: contestants that are not ours. They take part at the first batch size.
    """
    full_rows = engine.model_config.block_size
    assert full_rows is not None
    ours = our_contestants(engine, [(name, [profile]) for name, profile in acceptance], [full_rows])
    prompts = random_prompts(options, engine.model_config.vocab_size)
    speeds: list[Speed] = []
    exact = True
    for batch in options.batches:
        taking_part = [*ours, *(others if batch == options.batches[0] else ())]
        found, same = _race(taking_part, ours, prompts[:batch], options, progress)
        speeds, exact = speeds + found, exact and same
    if options.mixed_batch > 0:
        name, easy = acceptance[0]
        pair = [easy, easy.scaled(_HARD, full_rows)]
        rows = [rows for rows in _MIXED_ROWS if rows <= full_rows]
        mixed = our_contestants(engine, [(f"{name} and {_HARD:g}", pair)], rows)
        found, same = _race(mixed, mixed, prompts[: options.mixed_batch], options, progress)
        speeds, exact = speeds + found[1:], exact and same
    return speeds, exact


def _race(
    contestants: Sequence[Contestant],
    ours: Sequence[Contestant],
    prompts: list[list[int]],
    options: ShapeBenchOptions,
    progress: Progress,
) -> tuple[list[Speed], bool]:
    names = [contestant.name for contestant in ours]
    return race(contestants, names, prompts, options.new_tokens, options.rounds, progress)


def _context(options: ShapeBenchOptions) -> int:
    """Tokens of a prompt without its last one, in whole pages. The middle of the new tokens is at position `options.context`."""
    return max(1, round((options.context - options.new_tokens / 2) / _PAGE)) * _PAGE


def _copy_bytes(engine: Engine) -> CopyBytes | None:
    """Bytes of a number in the drafts' own weights; None if drafts have none."""
    copies = engine.forward.draft_format  # Not the setting's, which may be "auto".
    return None if copies is None else COPY_BYTES.get(copies)


def _draft_bytes(engine: Engine) -> CopyBytes | None:
    """Bytes of a number that a draft pass of one block reads; None if it reads the same as other passes."""
    if engine.forward.draft_format == ONE_PLANE:
        return CopyBytes(1.0, 1.0)
    return COPY_BYTES["int4"] if engine.forward.draft_format == "fp8+int4" else _copy_bytes(engine)


def _is_lossless(engine: Engine) -> bool:
    """Whether the weights are kept in 12 bits."""
    return engine.config.keeps_12_bits(engine.model_config)


def engine_settings(options: ShapeBenchOptions) -> dict[str, Any]:
    """Engine settings with room for the largest batch and for the longest prompt that is timed."""
    most = max(*options.batches, options.mixed_batch)
    new_pages = -(-(1 + options.new_tokens + BLOCK_SIZE) // _PAGE)
    pages = _context(options) // _PAGE + new_pages
    longest = max(pages, *(-(-(length + 1) // _PAGE) for length in options.prompts), 0)
    return {
        # With room for the texts of finished requests, which stay cached too.
        "kv_cache_tokens": max(most * (pages + new_pages), longest + 1) * _PAGE,
        "max_model_len": longest * _PAGE,
        "max_num_seqs": most,
        "prefill_chunk": 2048,
        "page_size": _PAGE,
        "weights": options.weights,
        "draft_weights": options.draft_weights,
        "draft_tree": options.draft_tree,
        "tensor_parallel_size": options.tensor_parallel,
        "sum_leaves": options.tensor_parallel if options.tensor_parallel > 2 else None,
    }


def random_prompts(options: ShapeBenchOptions, vocab_size: int) -> list[list[int]]:
    """A prompt for each sequence of the largest batch.

    All pages before its last token stay cached. So in later runs, all sequences decode from the second pass on.
    """
    rng, most = random.Random(0), max(*options.batches, options.mixed_batch)
    return [
        [rng.randrange(min(100_000, vocab_size)) for _ in range(_context(options) + 1)] for _ in range(most)
    ]


def pass_times(engine: Engine, options: ShapeBenchOptions, read: float) -> list[PassTime]:
    """AR steps at every batch size, and the two passes of a cycle at batch 1, at the given context. read: GB/s."""
    model, found = engine.model_config, []
    lossless = _is_lossless(engine)
    item_bytes = torch.bfloat16.itemsize
    plain = replace(model, block_size=None, mask_token_id=None)
    views = weight_bytes(Shard(plain), item_bytes, lossless=lossless)
    # A pass reads only a few rows of the embedding. But a tied embedding is the LM head too, which is read whole, unless the head
    # is kept in 12 bits.
    looked_up = lossless or not model.tie_word_embeddings
    head = model.vocab_size * model.hidden_size
    lookup = item_bytes * head if looked_up else 0
    for name, view, rows, batch in (
        *((f"ar step, batch {batch}", View.AR, 1, batch) for batch in options.batches),
        (f"verify {BLOCK_SIZE} rows", View.AR, BLOCK_SIZE, 1),
        (f"draft {BLOCK_SIZE} rows", View.DIFFUSION, BLOCK_SIZE, 1),
    ):
        seconds = time_passes(engine, view, rows, batch, options.context, PASSES)
        linear = views - lookup
        if view is View.DIFFUSION and (draft_bytes := _draft_bytes(engine)) is not None:
            shard = Shard(replace(model, quantization=None))
            linear = weight_bytes(shard, item_bytes, draft_bytes) - weight_bytes(shard, item_bytes, NO_BYTES)
        elif view is View.DIFFUSION:
            linear += _more_for_drafts(model)
        size = linear + batch * options.context * kv_bytes_per_token(model, item_bytes)
        milliseconds = statistics.median(seconds) * 1e3
        found.append(PassTime(name, milliseconds, size / read / 1e6 / milliseconds))
    return found


def _more_for_drafts(model: ModelConfig) -> int:
    """Bytes that a draft pass without copies reads more than an AR pass: of a quantised model, its projections are in full."""
    how, item_bytes = model.quantization, torch.bfloat16.itemsize
    if how is None or how.lossless:
        return 0
    plain = replace(model, block_size=None, mask_token_id=None)
    projections = weight_bytes(Shard(model), item_bytes) - weight_bytes(Shard(plain), item_bytes)
    return round(projections * (1 - how.number_bytes / item_bytes))


def time_passes(engine: Engine, view: View, rows: int, batch: int, context: int, count: int) -> list[float]:
    """Seconds of each of `count` passes in a row: `rows` greedy rows in one view for each of `batch` sequences.

    Nothing else may run meanwhile. The contents of the cache are overwritten.
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
