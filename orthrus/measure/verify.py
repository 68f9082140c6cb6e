"""`orthrus verify`: zero drift, measured on a checkpoint.

The reference is the AR schedule with one request at a time. Against it, bit for bit in tokens and logprobs: the same
requests under the Orthrus schedule, alone, and under both in random mixtures where requests join and leave a running
batch of 1 to 16, with a short prefill chunk, a KV cache tight enough to evict, drafts of full or adaptive length, with and
without a lead; some without logprobs, where a GPU launches passes ahead of what the host knows.
Against Hugging Face's own Qwen3 forward, loaded from the same files: the KL divergence of every next-token
distribution over the generated text.
"""

import gc
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from orthrus.engine import Engine
from orthrus.engine.config import EngineConfig
from orthrus.errors import ConfigError
from orthrus.measure.prompts import encode_prompts
from orthrus.models.config import ModelConfig
from orthrus.models.families import family_of, load_config
from orthrus.models.hub import resolve
from orthrus.requests.request import Request, RequestStats, SamplingParams, TokenLogprob
from orthrus.runner.eager import EagerRunner

KL_LIMIT = 1e-10
"""Nats, in float32: what two forwards that round differently come to, 6e-11 at worst with orthrus-tiny, stays below it."""
LOGPROB_LIMIT = 1e-3
"""Nats between a decode-time logprob and Hugging Face's: a wrong row is off by whole nats, rounding by 1e-5."""
SHOWN_DRIFTS = 10
LONGEST_PROMPT = 384
LONG_CHUNK = 512
SHORT_CHUNK = 48
"""Prefill chunks, in tokens, of requests alone and in mixtures: the same prompt is cut differently."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Way:
    """A way of running the requests. mixed: in a batch they join and leave, else alone. adaptive: draft lengths.

    lead: drafts have one. logprobs: asked for; without them, a pass may be launched before the one before it is read.
    """

    name: str
    schedule: str
    mixed: bool = False
    adaptive: bool = False
    lead: bool | None = None
    logprobs: bool = True


REFERENCE = Way("ar alone", "ar")
WAYS = (
    Way("ar mixed", "ar", mixed=True),
    Way("ar ahead", "ar", mixed=True, logprobs=False),
    Way("orthrus alone", "orthrus"),
    Way("orthrus mixed", "orthrus", mixed=True),
    Way("orthrus lead", "orthrus", mixed=True, lead=True),
    Way("orthrus ahead", "orthrus", mixed=True, lead=True, logprobs=False),
    Way("orthrus adaptive", "orthrus", mixed=True, adaptive=True, logprobs=False),
)


@dataclass(frozen=True)
class VerifyOptions:
    """What to verify. `tokens`: generated tokens to compare with the reference, over all ways together.

    max_tokens: most tokens of one request. max_batch: most requests in flight in a mixture. seed: of prompts, lengths,
    sampling and mixtures. device, dtype: as in EngineConfig. compare_hf: also compare with Hugging Face's forward.
    """

    model: str
    tokens: int = 20_000
    max_tokens: int = 192
    max_batch: int = 16
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    compare_hf: bool = True


@dataclass(frozen=True)
class Result:
    """All of one request's output: token ids, a logprob for each if they were asked for, and what it cost."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    stats: RequestStats


@dataclass(frozen=True)
class Drift:
    """The first place where a request of a check left the reference; `expected` and `got` say token and logprob."""

    check: str
    request: str
    position: int
    expected: str
    got: str


@dataclass(frozen=True)
class Check:
    """One way of running all requests. drifted_*: tokens that differ from the reference in id / in logprob bits.

    tokens_per_cycle: tokens committed per draft + verify (AR: per pass). tokens_per_pass: TPF, drafts counted.
    """

    name: str
    requests: int
    tokens: int
    drifted_tokens: int
    drifted_logprobs: int
    tokens_per_cycle: float
    tokens_per_pass: float
    seconds: float
    preemptions: int
    prefix_hit_tokens: int


@dataclass(frozen=True)
class HuggingFaceCheck:
    """Our forward against transformers' own, both in `dtype`, over every generated position. Nats.

    max_logprob_gap compares the logprobs that decoding reported. greedy_disagreements: greedy picks that are not the
    argmax of Hugging Face's logits; `max_regret` is how far below it the worst one is.
    """

    dtype: str
    positions: int
    max_kl: float
    mean_kl: float
    max_logprob_gap: float
    greedy_disagreements: int
    max_regret: float
    seconds: float

    @property
    def limited(self) -> bool:
        """Whether limits apply. In 16 bits both forwards round, each in its own way, and the figures are for the reader."""
        return self.dtype not in ("float16", "bfloat16")

    @property
    def ok(self) -> bool:
        if not self.limited:
            return True
        return self.max_kl <= KL_LIMIT and max(self.max_logprob_gap, self.max_regret) <= LOGPROB_LIMIT


@dataclass(frozen=True)
class Report:
    """The outcome of `verify`. `ok`: no drift in any check, and Hugging Face's distributions within limits."""

    model: str
    device: str
    dtype: str
    torch: str
    requests: int
    reference_tokens: int
    compared_tokens: int
    checks: tuple[Check, ...]
    hugging_face: HuggingFaceCheck | None
    drifts: tuple[Drift, ...] = field(default=())

    @property
    def ok(self) -> bool:
        exact = not any(check.drifted_tokens or check.drifted_logprobs for check in self.checks)
        return exact and (self.hugging_face is None or self.hugging_face.ok)

    def to_json(self) -> str:
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=2)

    def to_text(self) -> str:
        lines = [
            f"{self.model} on {self.device}, {self.dtype}, torch {self.torch}: "
            f"{self.requests} requests, {self.compared_tokens} tokens compared with {self.reference_tokens} of the reference",
            "",
            f"{'check':<18}{'drifted':>9}{'logprobs':>10}{'tok/cycle':>11}{'tok/pass':>10}{'tok/s':>8}{'preempted':>11}",
        ]
        lines += [
            f"{c.name:<18}{c.drifted_tokens:>9}{c.drifted_logprobs:>10}{c.tokens_per_cycle:>11.2f}"
            f"{c.tokens_per_pass:>10.2f}{c.tokens / max(c.seconds, 1e-9):>8.0f}{c.preemptions:>11}"
            for c in self.checks
        ]
        if (hf := self.hugging_face) is not None:
            limit = f"limit {KL_LIMIT:.0e}" if hf.limited else "no limit in 16 bits"
            lines += [
                "",
                f"Hugging Face, {hf.dtype}, {hf.positions} positions: KL max {hf.max_kl:.1e}, mean {hf.mean_kl:.1e} "
                f"({limit}); logprobs within {hf.max_logprob_gap:.1e}; "
                f"{hf.greedy_disagreements} greedy picks differ",
            ]
        lines += [
            f"DRIFT {d.check} {d.request} at {d.position}: {d.expected} became {d.got}" for d in self.drifts
        ]
        return "\n".join(
            [*lines, "", "zero drift" if self.ok else "DRIFT: the output depends on more than the request"]
        )


def verify(options: VerifyOptions, progress: Progress = lambda line: None) -> Report:
    """Run every check on `options.model`; `progress` is told one line per step.

    Raises ConfigError for a model or setting that can't be loaded.
    """
    path = resolve(options.model)
    model = load_config(path)
    if options.max_tokens + 2 > model.max_position_embeddings:
        raise ConfigError(
            f"--max-tokens {options.max_tokens} leaves no room for a prompt in a context of "
            f"{model.max_position_embeddings}"
        )
    ways = [way for way in WAYS if way.schedule == "ar" or model.has_diffusion]

    engine = _engine(path, options, REFERENCE, _longest(model, options))
    device, dtype = str(engine.device), str(engine.forward.dtype).removeprefix("torch.")
    share = -(-options.tokens // len(ways))
    progress(f"reference: {REFERENCE.name}, {share} tokens")
    requests: list[Request] = []
    reference: dict[str, Result] = {}
    started, tokens = time.perf_counter(), 0
    for request in make_requests(engine, options):
        requests.append(request)
        reference |= run(engine, [request], itertools.repeat(1))
        tokens += len(reference[request.request_id].token_ids)
        if tokens >= share:
            break
    seconds = time.perf_counter() - started
    checks = [summarize(REFERENCE.name, engine, reference, reference, seconds)]

    hugging_face = None
    if options.compare_hf:
        progress(f"Hugging Face forward over {tokens} positions")
        hugging_face = compare_hugging_face(engine, path, requests, reference)
    del engine

    drifts: list[Drift] = []
    for way in ways:
        progress(way.name)
        _free_memory()
        engine = _engine(path, options, way, _tight_cache(requests, options.max_batch))
        rng = random.Random(f"{options.seed}/{way.name}")
        order = rng.sample(requests, len(requests))
        limits = _random_limits(rng, options.max_batch) if way.mixed else itertools.repeat(1)
        started = time.perf_counter()
        results = run(engine, order if way.logprobs else list(map(_without_logprobs, order)), limits)
        checks.append(summarize(way.name, engine, results, reference, time.perf_counter() - started))
        drifts += find_drifts(way.name, results, reference)
        del engine
    return Report(
        model=options.model,
        device=device,
        dtype=dtype,
        torch=torch.__version__,
        requests=len(requests),
        reference_tokens=tokens,
        compared_tokens=sum(check.tokens for check in checks[1:]),
        checks=tuple(checks),
        hugging_face=hugging_face,
        drifts=tuple(drifts[:SHOWN_DRIFTS]),
    )


def make_requests(engine: Engine, options: VerifyOptions) -> Iterator[Request]:
    """Endless requests, a pure function of `options.seed`: text and random ids, short and long, greedy and sampled.

    Prompts repeat, whole or cut, so that the prefix cache has hits to get wrong. One request in four may end at its
    end-of-sequence token; the others run to their length.
    """
    rng = random.Random(options.seed)
    vocab = engine.model_config.vocab_size
    texts = encode_prompts(engine.tokenizer) if engine.tokenizer is not None else []
    longest = _longest(engine.model_config, options) - options.max_tokens - 1
    index = 0
    while True:
        kind = rng.random()
        if texts and kind < 0.75:
            prompt = [token for text in rng.sample(texts, rng.choice((1, 1, 2, 4))) for token in text]
            prompt = prompt[: rng.randint(1, len(prompt))] if kind < 0.25 else prompt
        else:
            prompt = [rng.randrange(vocab) for _ in range(rng.randint(1, 96))]
        params = SamplingParams(
            temperature=0.0 if index % 2 == 0 else 1.0,
            top_p=rng.choice((1.0, 0.9)),
            top_k=rng.choice((0, 40)),
            seed=rng.randrange(1 << 62),
            max_tokens=rng.randint(min(8, options.max_tokens), options.max_tokens),
            ignore_eos=index % 4 != 3,
            logprobs=rng.choice((0, 0, 3)),
        )
        yield Request(f"request-{index}", prompt[-longest:], params)
        index += 1


def run(engine: Engine, requests: Sequence[Request], limits: Iterator[int]) -> dict[str, Result]:
    """Run `requests` to their end, in order, with at most next(limits) in flight; a new limit at each one's end."""
    waiting = list(reversed(requests))
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    logprobs: dict[str, list[TokenLogprob]] = {request.request_id: [] for request in requests}
    results: dict[str, Result] = {}
    running, limit = 0, next(limits)
    while waiting or running:
        while waiting and running < limit:
            engine.submit(waiting.pop())
            running += 1
        for chunk in engine.step():
            name = chunk.request_id
            tokens[name] += chunk.token_ids
            logprobs[name] += chunk.logprobs or ()
            if chunk.finish_reason is None:
                continue
            if chunk.stats is None or chunk.finish_reason == "error":
                raise RuntimeError(f"{name} failed: {chunk.error}")
            results[name] = Result(tuple(tokens.pop(name)), tuple(logprobs.pop(name)), chunk.stats)
            running -= 1
            limit = next(limits)
    return results


def _without_logprobs(request: Request) -> Request:
    return replace(request, params=replace(request.params, logprobs=None))


def _random_limits(rng: random.Random, largest: int) -> Iterator[int]:
    while True:
        yield rng.randint(1, largest)


def summarize(
    name: str, engine: Engine, results: dict[str, Result], reference: dict[str, Result], seconds: float
) -> Check:
    """Count `results` of a run that took `seconds` and compare them with `reference`, which has the same requests."""
    drifted_tokens = drifted_logprobs = 0
    for request_id, result in results.items():
        expected = reference[request_id]
        drifted_tokens += abs(len(expected.token_ids) - len(result.token_ids))
        drifted_tokens += sum(a != b for a, b in zip(expected.token_ids, result.token_ids, strict=False))
        if result.logprobs:
            drifted_logprobs += abs(len(expected.logprobs) - len(result.logprobs))
            drifted_logprobs += sum(a != b for a, b in zip(expected.logprobs, result.logprobs, strict=False))
    after_first = sum(result.stats.completion_tokens - 1 for result in results.values())
    return Check(
        name=name,
        requests=len(results),
        tokens=sum(len(result.token_ids) for result in results.values()),
        drifted_tokens=drifted_tokens,
        drifted_logprobs=drifted_logprobs,
        tokens_per_cycle=after_first / max(1, sum(result.stats.cycles for result in results.values())),
        tokens_per_pass=after_first / max(1, sum(result.stats.passes for result in results.values())),
        seconds=seconds,
        preemptions=engine.stats.preemptions,
        prefix_hit_tokens=engine.stats.prefix_hit_tokens,
    )


def find_drifts(check: str, results: dict[str, Result], reference: dict[str, Result]) -> list[Drift]:
    """The first drift of each request that has one."""
    drifts = []
    for request_id, result in results.items():
        expected = reference[request_id]
        silent = [None] * len(expected.token_ids), [None] * len(result.token_ids)
        scored = (expected.logprobs, result.logprobs) if result.logprobs else silent
        before, after = (
            [*zip(r.token_ids, values, strict=True)]
            for r, values in zip((expected, result), scored, strict=True)
        )
        if before == after:
            continue
        shared = min(len(before), len(after))
        position = next((i for i in range(shared) if before[i] != after[i]), shared)
        drifts.append(Drift(check, request_id, position, _show(before, position), _show(after, position)))
    return drifts


def compare_hugging_face(
    engine: Engine, path: Path, requests: Sequence[Request], reference: dict[str, Result]
) -> HuggingFaceCheck:
    """Score every reference text with both forwards, in the engine's dtype; KL in float64 from their logits."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # It would list every diffusion weight as unused: the AR view has no use for them.
    logging.disable_progress_bar()
    started = time.perf_counter()
    classes = family_of(engine.model_config).hugging_face()
    theirs = classes.model.from_pretrained(path, dtype=engine.forward.dtype).to(engine.device).eval()
    max_kl = total_kl = max_gap = max_regret = 0.0
    positions = disagreements = 0
    for request in requests:
        result = reference[request.request_id]
        ids = [*request.prompt, *result.token_ids]
        rows = slice(len(request.prompt) - 1, len(ids) - 1)  # The row at position i predicts token i + 1.
        with torch.inference_mode():
            logits = theirs(torch.tensor([ids], device=engine.device)).logits[0, rows].double()
        ours = engine.score(ids)[rows].double().to(logits.device)
        picks = torch.tensor(result.token_ids, device=logits.device)[:, None]
        kl = _kl(logits, ours)
        max_kl, total_kl = max(max_kl, float(kl.max())), total_kl + float(kl.sum())
        reported = torch.tensor([entry.logprob for entry in result.logprobs], dtype=torch.float64)
        scored = logits.log_softmax(-1).gather(1, picks)[:, 0].cpu()
        max_gap = max(max_gap, float((reported - scored).abs().max()))
        positions += len(picks)
        if request.params.greedy:
            regret = logits.max(-1).values - logits.gather(1, picks)[:, 0]
            disagreements += int((regret > 0).sum())
            max_regret = max(max_regret, float(regret.max()))
    return HuggingFaceCheck(
        dtype=str(engine.forward.dtype).removeprefix("torch."),
        positions=positions,
        max_kl=max_kl,
        mean_kl=total_kl / max(1, positions),
        max_logprob_gap=max_gap,
        greedy_disagreements=disagreements,
        max_regret=max_regret,
        seconds=time.perf_counter() - started,
    )


def _kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) in nats per row of two float64 [rows, vocab] logits, as a sum of terms that are all >= 0.

    The textbook sum of p (log p - log q) cancels: its rounding error, 1e-16 times the vocabulary, can be negative.
    """
    p, q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    gap = q - p
    return (p.exp() * (gap.expm1() - gap)).sum(-1)


def _engine(path: Path, options: VerifyOptions, way: Way, kv_cache_tokens: int) -> Engine:
    """An engine with a KV cache of its own small size: on a GPU another model has to fit beside it."""
    engine = Engine.from_pretrained(
        EngineConfig.model_validate(
            {
                "model": str(path),
                "device": options.device,
                "dtype": options.dtype,
                "schedule": way.schedule,
                "adaptive_draft": way.adaptive,
                "draft_lead": way.lead,
                "kv_cache_tokens": kv_cache_tokens,
                "max_model_len": min(kv_cache_tokens, load_config(path).max_position_embeddings),
                "max_num_seqs": options.max_batch if way.mixed else 1,
                "prefill_chunk": SHORT_CHUNK if way.mixed else LONG_CHUNK,
            }
        )
    )
    if not way.logprobs and engine.device.type == "cpu":
        # Nothing is gained by it there, but the engine works as it does on a GPU.
        engine.use_runner(EagerRunner(engine.forward, engine.cache, feeds_tokens=True))
    return engine


def _longest(model: ModelConfig, options: VerifyOptions) -> int:
    """The longest request in tokens, prompt and completion."""
    return min(model.max_position_embeddings, LONGEST_PROMPT + options.max_tokens + 1)


def _tight_cache(requests: Sequence[Request], max_batch: int) -> int:
    """KV capacity in tokens for the longest request, or a third of a full mixture: larger mixtures have to evict."""
    lengths = [len(request.prompt) + (request.params.max_tokens or 0) for request in requests]
    return max(max(lengths) + 64, max_batch * sum(lengths) // len(lengths) // 3)


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _show(tokens: Sequence[tuple[int, TokenLogprob | None]], position: int) -> str:
    if position >= len(tokens):
        return "the end"
    token, logprob = tokens[position]
    return f"token {token}" if logprob is None else f"token {token} ({logprob.logprob!r})"
