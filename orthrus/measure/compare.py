"""`orthrus compare`: ways to decode a checkpoint faster, side by side. It measures each one's speed and what it changes.

The methods are those of `METHODS`. Speeds are measured in one run, in which all methods take turns (`run_rounds`). The changes
are measured against plain AR decoding with the checkpoint as it is:

- on a text, which shows the effect of other weights: perplexity, the KL divergence of each next-token distribution, and how often
  the most likely token is the same;
- on greedy answers to openings of that text, which also show the effect of a schedule: how many answers are equal, and how many
  tokens, by position.

Copies are rounded and pruned without calibration data. Only Wanda gets some: a part of the text that is not read later. Copies
are written to the system's temporary folder. The engines of all methods are in memory at once.
"""

import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from orthrus.engine import Engine, EngineConfig
from orthrus.errors import ConfigError
from orthrus.measure.bench import run_rounds
from orthrus.measure.compare_report import CompareReport, Drift, MethodReport, Speed
from orthrus.measure.contest import Output, Progress, engine_contestant, hardware, ratio
from orthrus.measure.hugging_face_check import kl_divergence
from orthrus.models.families import load_config
from orthrus.models.hub import resolve
from orthrus.models.medusa_config import has_medusa
from orthrus.models.prune import prune_checkpoint
from orthrus.models.quantise import quantise_checkpoint
from orthrus.models.shard import Shard
from orthrus.models.sizes import weight_bytes
from orthrus.requests.request import SamplingParams
from orthrus.schedules.registry import AR, MEDUSA, SCHEDULES
from orthrus.text.tokenizer import load_tokenizer

_ROW = 512
"""Tokens of a row of text that is read at once."""
_OPENING = 48
"""Tokens of a prompt."""
_BATCH = 16
"""Answers that are decoded at once."""
_CALIBRATION_ROWS = 16
"""Rows of text that a method is calibrated on, at most."""


@dataclass(frozen=True)
class Method:
    """A way to decode a checkpoint."""

    name: str
    schedule: str
    setup: str
    """What has to be done before the first token."""
    copy: Callable[..., None] | None = None
    """Called with two paths: writes a copy of the checkpoint at the first to the second, for the method to decode with. None if
    the method needs no copy."""
    calibrated: bool = False
    """Whether `copy` is also given rows of token ids, to calibrate on."""


METHODS = (
    Method(AR, AR, "nothing"),
    Method("orthrus", "orthrus", "diffusion heads, trained once"),
    Method("medusa", MEDUSA, "Medusa heads, trained once"),
    Method("ngram", "ngram", "nothing"),
    Method("fp8", AR, "a copy in FP8", partial(quantise_checkpoint, format="fp8")),
    Method("int8", AR, "a copy in INT8", partial(quantise_checkpoint, format="int8")),
    Method("pruned", AR, "a copy with half of the weights zero (2:4, by magnitude)", prune_checkpoint),
    Method("wanda", AR, "a copy with half of the weights zero (2:4, by Wanda)", prune_checkpoint, True),
)


@dataclass(frozen=True)
class CompareOptions:
    """What to compare."""

    model: str
    device: str = "auto"
    dtype: str = "auto"
    batches: tuple[int, ...] = (1, 4)
    """Numbers of requests whose speed is measured."""
    new_tokens: int = 64
    """Tokens of each of these requests."""
    rounds: int = 3
    """Interleaved rounds of the speeds."""
    text: Path | None = None
    """A text file that the model was not trained on. None: the source of the installed Starlette, which is held out of
    orthrus-tiny's training."""
    text_tokens: int = 8192
    """Tokens of it that are read."""
    answers: int = 200
    """Greedy answers to compare."""
    answer_tokens: int = 48
    """Tokens of each."""
    adaptive_draft: bool = True
    """See `EngineConfig`. If false, tokens per cycle are the same in every run, because they do not depend on measured times."""


def compare(options: CompareOptions, progress: Progress = lambda line: None) -> CompareReport:
    """Run the comparison. progress: called with a line for each step. Raises ConfigError if a model or setting can't be used."""
    path = resolve(options.model)
    model = load_config(path)
    if model.quantization is not None:
        raise ConfigError(
            f"{options.model} is quantised ({model.quantization.method}): give the checkpoint that it was made from"
        )
    if not (path / "tokenizer.json").exists():
        raise ConfigError(
            f"{options.model} has no tokenizer, which is needed to read a text: add its tokenizer.json"
        )
    longest = _longest(options)
    if longest > model.max_position_embeddings:
        raise ConfigError(
            f"{options.model} has a context of {model.max_position_embeddings} tokens, and {longest} are needed: "
            f"give fewer --new-tokens and --answer-tokens; rows of text have {_ROW}"
        )
    text = _read(load_tokenizer(path), options)
    rows, prompts = text.rows, text.prompts
    with TemporaryDirectory(prefix="orthrus-compare-") as folder:
        entries, left_out = _entries(path, Path(folder), text.calibration, options, progress)
        speeds = _speeds(entries, prompts, options, progress)
        progress(f"reading {sum(map(len, rows)):,} tokens with each method")
        read = _read_text([entry.engine for entry in entries], rows)
        progress(f"{options.answers} greedy answers by each method")
        answers = [_answers(entry, prompts[: options.answers], options) for entry in entries]
        base = entries[0].engine
        return CompareReport(
            model=options.model,
            device=str(base.device),
            dtype=str(base.forward.dtype).removeprefix("torch."),
            hardware=hardware(base.device),
            torch=torch.__version__,
            text_tokens=sum(map(len, rows)),
            answers=len(answers[0]),
            answer_tokens=options.answer_tokens,
            methods=tuple(
                MethodReport(
                    name=entry.method.name,
                    setup=entry.setup,
                    weight_ratio=entry.weight_bytes / entries[0].weight_bytes,
                    speeds=speeds[entry.method.name],
                    drift=_drift(of_text, own, answers[0]),
                )
                for entry, of_text, own in zip(entries, read, answers, strict=True)
            ),
            left_out=tuple(left_out),
        )


@dataclass(frozen=True)
class _Entry:
    """A method, ready to decode."""

    method: Method
    engine: Engine
    setup: str
    weight_bytes: int
    """Bytes of the weights that it needs, in 16 bits where they are not quantised."""


def _entries(
    path: Path, folder: Path, calibration: list[list[int]], options: CompareOptions, progress: Progress
) -> tuple[list[_Entry], list[str]]:
    """Load all methods. Returns those that work with the checkpoint at `path`, and a line with the reason for each other one.

    folder: for copies. calibration: rows of token ids.
    """
    model = load_config(path)
    entries: list[_Entry] = []
    left_out: list[str] = []
    for method in METHODS:
        if not SCHEDULES[method.schedule].fits(model.has_diffusion, has_medusa(path)):
            kind = "Medusa" if SCHEDULES[method.schedule].needs_medusa else "diffusion"
            left_out.append(f"{method.name}: the checkpoint has no {kind} heads")
            continue
        if method.calibrated and not calibration:
            left_out.append(
                f"{method.name}: the text has no row of {_ROW} tokens to calibrate on, besides the {options.text_tokens} that "
                "are read: give a longer --text or fewer --text-tokens"
            )
            continue
        progress(f"loading: {method.name}")
        try:
            entries.append(_entry(method, path, folder / method.name, calibration, options))
        except (ConfigError, OSError, torch.OutOfMemoryError) as error:
            if method.name == AR:
                raise
            left_out.append(f"{method.name}: {error}")
    return entries, left_out


def _longest(options: CompareOptions) -> int:
    """Tokens of the longest sequence."""
    return 1 + max(_ROW, _OPENING + max(options.answer_tokens, options.new_tokens))


def _entry(
    method: Method, path: Path, copy: Path, calibration: list[list[int]], options: CompareOptions
) -> _Entry:
    """Load the method's engine, from a copy of the checkpoint if it has one, which is written to `copy`."""
    setup = method.setup
    if method.copy is not None:
        begin = time.perf_counter()
        method.copy(path, copy, *([calibration] if method.calibrated else []))
        path, setup = copy, f"{setup}, made in {time.perf_counter() - begin:.1f} s"
    longest = _longest(options)
    batch = max(_BATCH, *options.batches)
    config = {
        "model": str(path),
        "device": options.device,
        "dtype": options.dtype,
        "schedule": method.schedule,
        "adaptive_draft": options.adaptive_draft,
        # With the prefix cache, a prompt would cost nothing from the second round on.
        "prefix_caching": False,
        "max_num_seqs": batch,
        # The 256 are for the blocks behind a sequence's last token, and for pages that are not full.
        "kv_cache_tokens": batch * (longest + 256),
    }
    model = load_config(path)
    if not SCHEDULES[method.schedule].needs_diffusion:
        model = replace(model, block_size=None, mask_token_id=None)
    engine = Engine.from_pretrained(EngineConfig.model_validate(config))
    shutil.rmtree(copy, ignore_errors=True)
    return _Entry(
        method, engine, setup, weight_bytes(Shard(model), 2) + 2 * engine.forward.num_medusa_weights
    )


@dataclass(frozen=True)
class _Text:
    """The text, as token ids."""

    rows: list[list[int]]
    """The rows that are read."""
    prompts: list[list[int]]
    """Openings from all over the text."""
    calibration: list[list[int]]
    """Rows from the end of the text that are not read. They are often from other files. Empty if there are none."""


def _read(tokenizer: Any, options: CompareOptions) -> _Text:
    """Read the text. Raises ConfigError if it is too short."""
    text = _starlette() if options.text is None else _read_file(options.text)
    tokens = list(tokenizer.encode(text, verbose=False))
    count = max(options.answers, *options.batches)
    least = max(_ROW, count * _OPENING)  # Openings do not overlap.
    if len(tokens) < least:
        raise ConfigError(
            f"the text has {len(tokens)} tokens, for {count} openings: give one of at least {least}"
        )
    read = tokens[: options.text_tokens]
    rows = [read[start : start + _ROW] for start in range(0, len(read), _ROW)]
    starts = [number * (len(tokens) - _OPENING) // count for number in range(count)]
    # Mixed, so that a few of them come from all over the text too.
    random.Random(0).shuffle(starts)
    last = range(len(tokens) - _ROW, len(read) - 1, -_ROW)[:_CALIBRATION_ROWS]
    return _Text(
        [row for row in rows if len(row) > 1],
        [tokens[start : start + _OPENING] for start in starts],
        [tokens[start : start + _ROW] for start in last],
    )


def _read_file(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {file} can't be read: {error}") from error


def _starlette() -> str:
    import starlette

    folder = Path(starlette.__file__).parent
    return "\n\n".join(file.read_text(encoding="utf-8") for file in sorted(folder.rglob("*.py")))


def _speeds(
    entries: Sequence[_Entry], prompts: list[list[int]], options: CompareOptions, progress: Progress
) -> dict[str, tuple[Speed, ...]]:
    """Each method's speeds, by its name."""
    contestants = [replace(engine_contestant(e.engine), name=e.method.name) for e in entries]
    seconds, outputs = run_rounds(
        contestants, prompts, options.batches, options.new_tokens, options.rounds, progress
    )

    def speed(name: str, batch: int) -> Speed:
        output: Output = outputs[name, batch]
        tokens = sum(map(len, output.token_ids))
        own = seconds[name, batch]
        over_ar = ratio(own, seconds[AR, batch])
        return Speed(batch, tokens / statistics.median(own), over_ar, output.tokens_per_cycle)

    return {c.name: tuple(speed(c.name, batch) for batch in options.batches) for c in contestants}


@dataclass
class _OfText:
    """One method's results on the text, summed over its positions."""

    positions: int = 0
    loss: float = 0.0
    """Negative log-probability of the text, in nats."""
    kl: float = 0.0
    """KL divergence of the method from AR decoding, in nats."""
    max_kl: float = 0.0
    agreed: int = 0
    """Positions at which both find the same token most likely."""
    same_bits: bool = True
    """Whether no logit differs."""


def _read_text(engines: Sequence[Engine], rows: Sequence[Sequence[int]]) -> list[_OfText]:
    """Each engine's results on the rows. The first engine is AR decoding."""
    found = [_OfText() for _ in engines]
    for row in tqdm(rows, desc="text", unit="row", disable=None, leave=False):
        reference = engines[0].score(row)[:-1].double()
        targets = torch.tensor(row[1:], device=reference.device)
        for engine, of_text in zip(engines, found, strict=True):
            logits = engine.score(row)[:-1].double()
            kl = kl_divergence(reference, logits)
            of_text.positions += len(targets)
            of_text.loss += float(F.cross_entropy(logits, targets, reduction="sum"))
            of_text.kl += float(kl.sum())
            of_text.max_kl = max(of_text.max_kl, float(kl.max()))
            of_text.same_bits &= torch.equal(logits, reference)
            of_text.agreed += int((logits.argmax(-1) == reference.argmax(-1)).sum())
    return found


def _answers(entry: _Entry, prompts: Sequence[Sequence[int]], options: CompareOptions) -> list[list[int]]:
    """The method's greedy answer to each prompt."""
    params = SamplingParams(temperature=0.0, max_tokens=options.answer_tokens, ignore_eos=True)
    answers: list[list[int]] = []
    parts: Iterator[int] = tqdm(
        range(0, len(prompts), _BATCH), desc=entry.method.name, unit="batch", disable=None, leave=False
    )
    for start in parts:
        found = entry.engine.generate(prompts[start : start + _BATCH], params)
        answers += [list(completion.token_ids) for [completion] in found]
    return answers


def _drift(of_text: _OfText, answers: list[list[int]], expected: list[list[int]]) -> Drift:
    """How the method's output differs from AR decoding's."""
    equal = torch.tensor(answers) == torch.tensor(expected)
    return Drift(
        exact=of_text.same_bits and bool(equal.all()),
        perplexity=float(torch.tensor(of_text.loss / of_text.positions, dtype=torch.float64).exp()),
        mean_kl=of_text.kl / of_text.positions,
        max_kl=of_text.max_kl,
        top_1_agreement=of_text.agreed / of_text.positions,
        equal_answers=int(equal.all(1).sum()),
        equal_tokens_by_position=tuple(equal.double().mean(0).tolist()),
        still_equal_by_position=tuple(equal.long().cumprod(1).double().mean(0).tolist()),
    )
