"""`orthrus verify`: zero drift, measured on a checkpoint.

The reference is the AR schedule with one request at a time. The same requests are then run in other ways, and tokens and logprobs
must be equal bit for bit:

- under every other schedule, one request at a time;
- under every schedule, and with the settings of each `Variant` in `orthrus.schedules.registry`, in random mixtures: requests join
  and leave a running batch of 1 to 16, with a short prefill chunk and a KV cache so small that it evicts. Variants without
  logprobs let a GPU launch passes before the host knows the picks of the last one.

At the end, Hugging Face's own forward pass, loaded from the same files, reads the generated text. The KL divergence of every
next-token distribution is measured.
"""

import gc
import itertools
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from orthrus.engine import Engine, EngineConfig
from orthrus.engine.draft_weights import check_draft_weights
from orthrus.errors import ConfigError
from orthrus.measure.contest import Progress
from orthrus.measure.drift import Check, Drift, Result, find_drifts, summarize
from orthrus.measure.hugging_face_check import compare_hugging_face
from orthrus.measure.prompts import encode_prompts
from orthrus.measure.verify_report import Report
from orthrus.models.config import ModelConfig
from orthrus.models.families import load_config
from orthrus.models.hub import resolve
from orthrus.models.medusa_config import has_medusa
from orthrus.models.shard import Shard, check_ranks
from orthrus.requests.request import Request, SamplingParams, TokenLogprob
from orthrus.runner.eager import EagerRunner
from orthrus.schedules.registry import SCHEDULES

SHOWN_DRIFTS = 10
LONGEST_PROMPT = 384
LONG_CHUNK = 512
SHORT_CHUNK = 48
"""Prefill chunks, in tokens, of requests alone (long) and in mixtures (short), so that prompts are cut differently."""


@dataclass(frozen=True)
class Way:
    """A way of running the requests."""

    name: str
    schedule: str
    mixed: bool = False
    """Whether requests join and leave a running batch; else each runs alone."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `EngineConfig`. Blocks have their full length unless these say otherwise."""
    logprobs: bool = True
    """Whether requests ask for logprobs. Without them, a pass may be launched before the picks of the last one are read."""


REFERENCE = Way("ar alone", "ar")


def ways(has_diffusion: bool, ranks: int = 1, has_medusa: bool = False) -> list[Way]:
    """The ways of running requests that are compared with `REFERENCE`: for each schedule that fits the model, alone, mixed, and
    mixed with the settings of each variant in the registry. ranks: how many ranks share the model; the reference has one."""
    found: list[Way] = []
    for name, entry in reversed(SCHEDULES.items()):
        if entry.fits(has_diffusion, has_medusa and ranks == 1):
            found += [Way(f"{name} alone", name), Way(f"{name} mixed", name, mixed=True)]
            found += [
                Way(f"{name} {variant.name}", name, True, variant.settings, variant.logprobs)
                for variant in entry.variants
            ]
    if ranks == 1:
        return [way for way in found if way != REFERENCE]
    return [
        replace(
            way, settings={**way.settings, "tensor_parallel_size": ranks}, name=f"{way.name}, {ranks} ranks"
        )
        for way in found
    ]


@dataclass(frozen=True)
class VerifyOptions:
    """What to verify. tokens: how many generated tokens to compare with the reference, over all ways together.

    max_tokens: most tokens of one request. max_batch: most requests in flight in a mixture. seed: of prompts, lengths,
    sampling and mixtures. device, dtype: as in EngineConfig. compare_hf: also compare with Hugging Face's forward.
    tensor_parallel: how many ranks share the model, in all checks except the reference.
    """

    model: str
    tokens: int = 20_000
    max_tokens: int = 192
    max_batch: int = 16
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    compare_hf: bool = True
    tensor_parallel: int = 1


def verify(options: VerifyOptions, progress: Progress = lambda line: None) -> Report:
    """Run every check on `options.model`. progress: called with a line for each step.

    Raises ConfigError for a model or setting that can't be loaded.
    """
    path = resolve(options.model)
    model = load_config(path)
    if options.max_tokens + 2 > model.max_position_embeddings:
        raise ConfigError(
            f"--max-tokens {options.max_tokens} leaves no room for a prompt in a context of "
            f"{model.max_position_embeddings}"
        )
    check_ranks(replace(model, sum_leaves=_sum_leaves(options)), options.tensor_parallel)
    engine = _engine(path, options, REFERENCE, _longest(model, options))
    device, dtype = str(engine.device), str(engine.forward.dtype).removeprefix("torch.")
    others: list[Way] = []
    left_out: list[str] = []
    for way in ways(model.has_diffusion, options.tensor_parallel, has_medusa(path)):
        try:
            _check_drafts(engine, way)
            others.append(way)
        except ConfigError as error:
            left_out.append(f"{way.name}: {error}")
    share = -(-options.tokens // len(others))
    progress(f"reference: {REFERENCE.name}, {share} tokens")
    started = time.perf_counter()
    requests, reference = _run_reference(engine, options, share)
    checks = [summarize(REFERENCE.name, engine, reference, reference, time.perf_counter() - started)]
    tokens = checks[0].tokens
    hugging_face = None
    stored = engine.model_config.quantization
    if options.compare_hf and stored is not None and stored.method == "fp8":
        progress(
            "no comparison with Hugging Face's forward: FP8 rounds the inputs too, so there is no limit to compare with"
        )
    elif options.compare_hf:
        progress(f"Hugging Face forward over {tokens} positions")
        hugging_face = compare_hugging_face(engine, path, requests, reference)
    del engine

    drifts: list[Drift] = []
    for way in others:
        progress(way.name)
        check, found = _check(path, options, way, requests, reference)
        checks.append(check)
        drifts += found
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
        left_out=tuple(left_out),
    )


def _check_drafts(engine: Engine, way: Way) -> None:
    """Raise ConfigError if the engine's GPU, or the shapes of its model, don't allow the drafts of `way`."""
    config = EngineConfig.model_validate(
        {"model": engine.model_config.name, "schedule": way.schedule, **way.settings}
    )
    shard = Shard(config.with_settings(engine.model_config), 0, config.tensor_parallel_size)
    gpu = torch.cuda.get_device_capability(engine.device) if engine.device.type == "cuda" else None
    check_draft_weights(config, shard, gpu)


def _run_reference(
    engine: Engine, options: VerifyOptions, tokens: int
) -> tuple[list[Request], dict[str, Result]]:
    """Run requests one at a time until they have generated at least `tokens` tokens. Returns the requests and their results."""
    requests: list[Request] = []
    reference: dict[str, Result] = {}
    for request in make_requests(engine, options):
        requests.append(request)
        reference |= run(engine, [request], itertools.repeat(1))
        tokens -= len(reference[request.request_id].token_ids)
        if tokens <= 0:
            break
    return requests, reference


def _check(
    path: Path, options: VerifyOptions, way: Way, requests: list[Request], reference: dict[str, Result]
) -> tuple[Check, list[Drift]]:
    """Run the requests in one way, and compare the results with the reference."""
    _free_memory()
    engine = _engine(path, options, way, _tight_cache(requests, options.max_batch))
    rng = random.Random(f"{options.seed}/{way.name}")
    order = rng.sample(requests, len(requests))
    limits = _random_limits(rng, options.max_batch) if way.mixed else itertools.repeat(1)
    started = time.perf_counter()
    results = run(engine, order if way.logprobs else list(map(_without_logprobs, order)), limits)
    check = summarize(way.name, engine, results, reference, time.perf_counter() - started)
    return check, find_drifts(way.name, results, reference)


def make_requests(engine: Engine, options: VerifyOptions) -> Iterator[Request]:
    """Endless requests, a pure function of `options.seed`: text and random ids, short and long, greedy and sampled.

    Prompts repeat, whole or cut, so that the prefix cache has hits. One request in four may end at its end-of-sequence token; the
    others run to their length.
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
    """Run `requests` to their end, in order. limits: most requests in flight; the next limit is taken whenever one ends."""
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


def _engine(path: Path, options: VerifyOptions, way: Way, kv_cache_tokens: int) -> Engine:
    """An engine with a KV cache of just this size, because on a GPU another model has to fit beside it."""
    engine = Engine.from_pretrained(
        EngineConfig.model_validate(
            {
                "model": str(path),
                "device": options.device,
                "dtype": options.dtype,
                "schedule": way.schedule,
                "adaptive_draft": False,
                **way.settings,
                "sum_leaves": _sum_leaves(options),
                "kv_cache_tokens": kv_cache_tokens,
                "max_model_len": min(kv_cache_tokens, load_config(path).max_position_embeddings),
                "max_num_seqs": options.max_batch if way.mixed else 1,
                "prefill_chunk": SHORT_CHUNK if way.mixed else LONG_CHUNK,
            }
        )
    )
    if not way.logprobs and engine.device.type == "cpu":
        # It saves no time on a CPU, but the engine then works as it does on a GPU.
        engine.use_runner(EagerRunner(engine.forward, engine.cache, feeds_tokens=True))
    return engine


def _sum_leaves(options: VerifyOptions) -> int | None:
    """The setting `sum_leaves`. The reference, which runs on one rank, needs the same number."""
    return options.tensor_parallel if options.tensor_parallel > 1 else None


def _longest(model: ModelConfig, options: VerifyOptions) -> int:
    """The longest request in tokens, prompt and completion."""
    return min(model.max_position_embeddings, LONGEST_PROMPT + options.max_tokens + 1)


def _tight_cache(requests: Sequence[Request], max_batch: int) -> int:
    """KV capacity in tokens: room for the longest request, or for a third of a full mixture. Larger mixtures have to evict."""
    lengths = [len(request.prompt) + (request.params.max_tokens or 0) for request in requests]
    return max(max(lengths) + 64, max_batch * sum(lengths) // len(lengths) // 3)


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
