"""The engine's contract: a response depends on model, prompt, parameters and seed, and on nothing else."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orthrus.engine import Engine
from orthrus.engine.config import EngineConfig
from orthrus.engine.observer import PassRecord
from orthrus.requests.request import Chunk, Completion, Request, SamplingParams, joined_chunks
from orthrus.runner.sampler import PickRows
from orthrus.schedules.decode_cost import DecodeCost
from orthrus.schedules.ngram import OrthrusNgramSchedule
from orthrus.schedules.ngram_cost import NgramCost
from orthrus.schedules.orthrus import OrthrusSchedule
from orthrus.schedules.pass_cost import PassCost
from tests.checkpoints import make_checkpoint
from tests.engine.limited_runner import LimitedRunner
from tests.reference import reference_decode

GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)


def engine(path: Path, schedule: str = "orthrus", **settings: Any) -> Engine:
    fixed = {"model": str(path), "schedule": schedule, "adaptive_draft": False, "max_num_seqs": 16}
    return Engine.from_pretrained(EngineConfig.model_validate(fixed | settings))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("engine") / "model", noise=0.02)


@pytest.fixture(scope="module")
def ar(checkpoint: Path) -> Engine:
    return engine(checkpoint, "ar")


def prompts(count: int, longest: int = 120, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(120) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def same(left: list[list[Completion]], right: list[list[Completion]]) -> None:
    """Whether tokens, logprobs (to the last bit) and endings are equal. Costs may differ."""
    for a, b in zip(left, right, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.token_ids == y.token_ids
            assert x.logprobs == y.logprobs
            assert (x.finish_reason, x.stop_reason) == (y.finish_reason, y.stop_reason)


MIXED = [
    SamplingParams(temperature=0.0, max_tokens=40, logprobs=3),
    SamplingParams(temperature=1.0, max_tokens=40, seed=1, logprobs=0),
    SamplingParams(temperature=0.7, max_tokens=33, seed=2, top_p=0.9, top_k=20),
    SamplingParams(temperature=1.3, max_tokens=40, seed=3, min_p=0.05, ignore_eos=True),
    SamplingParams(temperature=1.0, max_tokens=40, seed=4, repetition_penalty=1.3, presence_penalty=0.5),
    SamplingParams(temperature=0.0, max_tokens=40, frequency_penalty=0.7, logprobs=5),
    SamplingParams(temperature=1.0, max_tokens=40, seed=5, logit_bias={7: 3.0, 11: -100.0}),
    SamplingParams(temperature=0.8, max_tokens=25, seed=6, stop_token_ids=(3, 9), n=3),
    SamplingParams(temperature=0.0, max_tokens=30, stop_token_ids=tuple(range(100)), min_tokens=20),
    SamplingParams(temperature=1.0, max_tokens=30, seed=7, stop_token_ids=tuple(range(100)), min_tokens=20),
]


@pytest.fixture(scope="module")
def mixed_alone(ar: Engine) -> list[list[Completion]]:
    """`MIXED` one by one under AR decoding."""
    texts = prompts(len(MIXED))
    return [ar.generate([text], params)[0] for text, params in zip(texts, MIXED, strict=True)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"schedule": "ar"},
        {"adaptive_draft": True},
        {"prefill_chunk": 7},
        {"prefix_caching": False, "max_num_seqs": 2},
        {"kv_cache_tokens": 512, "page_size": 8},
        {"draft_length": 3},
        {"draft_lead": True, "kv_cache_tokens": 512, "page_size": 8},
        {"draft_lead": True, "draft_length": 2},
        {"schedule": "ngram"},
        {"schedule": "ngram", "adaptive_draft": True, "prefix_caching": False, "max_num_seqs": 2},
        {"schedule": "ngram", "prompt_lookup_min": 1, "kv_cache_tokens": 512, "page_size": 8},
    ],
    ids=str,
)
def test_every_parameter_is_exact_under_every_schedule_and_setting(
    checkpoint: Path, mixed_alone: list[list[Completion]], settings: dict[str, Any]
) -> None:
    other = engine(checkpoint, **settings)
    same(other.generate(prompts(len(MIXED)), MIXED), mixed_alone)
    assert other.stats.kv_pages_used == 0
    if other.schedule_name == "orthrus" and not settings.get("adaptive_draft"):
        assert other.stats.tokens_per_cycle > 1.3, "the drafts are never right: the diffusion view is broken"


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tie": False, "bias": True, "heads": 6, "kv_heads": 1, "head_dim": 32, "layers": 3},
        {"heads": 8, "kv_heads": 8, "head_dim": 8, "hidden_size": 48, "block_size": 16},
        {"yarn": True, "heads": 8, "kv_heads": 2, "block_size": 32},
        {"correlated": False},
    ],
    ids=str,
)
def test_text_and_cycles_equal_the_slow_reference(tmp_path: Path, shape: dict[str, Any]) -> None:
    path = make_checkpoint(tmp_path / "model", noise=0.02, eos_token_id=126, **shape)
    ours = engine(path)
    for prompt in prompts(4, 60, seed=3):
        tokens, cycles = reference_decode(path, prompt, 48)
        [[completion]] = ours.generate([prompt], SamplingParams(temperature=0.0, max_tokens=48))
        assert list(completion.token_ids) == tokens
        assert completion.stats.cycles == cycles


@pytest.mark.parametrize(
    ("read", "settings"),
    [
        (False, {"temperature": 0.0, "top_k": 5}),
        (False, {"temperature": 0.8}),
        (True, {"temperature": 0.8, "top_k": 5}),
        (True, {"temperature": 0.8, "top_p": 0.9}),
        (True, {"temperature": 0.8, "min_p": 0.1}),
        (True, {"logprobs": 0}),
        (True, {"repetition_penalty": 1.1}),
        (True, {"presence_penalty": 0.5}),
        (True, {"frequency_penalty": 0.5}),
        (True, {"logit_bias": {3: 1.0}}),
    ],
    ids=str,
)
def test_which_parameters_need_logits_besides_the_pick(read: bool, settings: dict[str, Any]) -> None:
    rows = PickRows(SamplingParams(**settings), seed=1, position=7, count=1, end_token_ids=(5,), min_length=7)
    assert rows.reads_logits is read
    assert replace(rows, min_length=8).reads_logits, "an end that must not be picked yet"


@pytest.mark.parametrize("lead", [False, True])
def test_passes_stay_within_the_memory_reserved_for_them(checkpoint: Path, ar: Engine, lead: bool) -> None:
    """With many requests that arrive while long drafts wait to be verified, and with prompts of many chunks alone."""
    ours = engine(checkpoint, draft_lead=lead, max_num_seqs=128, prefill_chunk=64)
    runner = LimitedRunner(ours)
    ours.use_runner(runner)
    params = replace(GREEDY, max_tokens=10)
    texts = [[i] for i in range(64)]
    requests = [Request(f"{turn} {i}", text, params) for turn in range(2) for i, text in enumerate(texts)]
    collected: dict[str, list[int]] = {r.request_id: [] for r in requests}
    for arriving, steps in ((requests[:64], 1), (requests[64:], 100)):
        for request in arriving:
            ours.submit(request)
        for _ in range(steps):
            for chunk in ours.step():
                collected[chunk.request_id] += chunk.token_ids
    assert not ours.has_work
    assert runner.fullest == 512 + 64, "no pass was full"
    expected = [list(c.token_ids) for [c] in ar.generate(texts, params)]
    assert list(collected.values()) == expected * 2
    same(ours.generate([[7] * 400], params), ar.generate([[7] * 400], params))


SCORED = {5}
"""Requests of a crowd that ask for logprobs. No more: they are waited for."""


def crowd() -> tuple[list[tuple[list[int], SamplingParams]], random.Random]:
    """Prompts with their parameters, and the random generator that decides when they come and go."""
    rng = random.Random(3)
    texts = prompts(24, seed=4)
    params = [
        SamplingParams(
            temperature=i % 2,
            seed=i,
            max_tokens=rng.randint(1, 50),
            stop_token_ids=(3, 9),
            logprobs=1 if i in SCORED else None,
        )
        for i in range(len(texts))
    ]
    return list(zip(texts, params, strict=True)), rng


@pytest.fixture(scope="module")
def crowd_alone(ar: Engine) -> list[Completion]:
    """What each of the crowd gives alone under AR decoding."""
    return [ar.generate([text], params)[0][0] for text, params in crowd()[0]]


def told_costs(engine: Engine) -> OrthrusNgramSchedule:
    """The engine's adaptive schedule, planned with costs at which drafts pay, whatever passes take."""
    context = engine.schedule_context()
    step = PassCost((1, 64, 512), (1.0, 1.1, 2.0))
    draft = PassCost((1, 64, 512), (0.5, 0.55, 1.0))
    blocks = OrthrusSchedule.with_cost(context, DecodeCost(step, draft, verify=step))
    return OrthrusNgramSchedule(NgramCost(step, step), range(2, 5), 32, context.max_pass_rows, blocks)


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "ar"},
        {},
        {"draft_lead": True},
        {"draft_lead": True, "kv_cache_tokens": 512, "page_size": 8, "prefill_chunk": 24},
        {"schedule": "ngram", "prompt_lookup_min": 1},
        {"schedule": "ngram", "kv_cache_tokens": 512, "page_size": 8, "prefill_chunk": 24},
        {"adaptive_draft": True},
    ],
    ids=str,
)
def test_passes_launched_before_the_last_is_read_change_nothing(
    checkpoint: Path, crowd_alone: list[Completion], settings: dict[str, Any]
) -> None:
    """With tokens that the host does not know yet, ends that it learns of late, cancellations and evictions."""
    asked, rng = crowd()
    ahead = engine(checkpoint, **settings)
    if settings.get("adaptive_draft"):
        # On a busy machine, measured costs might say that drafts do not pay.
        ahead.use_schedule(told_costs(ahead))
    ahead.use_runner(LimitedRunner(ahead))
    collected: dict[str, list[Chunk]] = {str(i): [] for i in range(len(asked))}
    waiting = [Request(str(i), text, params) for i, (text, params) in enumerate(asked)]
    passes: list[PassRecord] = []
    ahead.observer = passes.append
    while waiting or ahead.has_work:
        for _ in range(rng.randint(0, 3)):
            if waiting:
                ahead.submit(waiting.pop())
        for chunk in ahead.step():
            collected[chunk.request_id].append(chunk)
        if rng.random() < 0.05:
            ahead.cancel(str(rng.randrange(len(asked))))
    assert sum(one.next_launched_ahead for one in passes) > 3, "every pass was waited for"
    assert ahead.stats.kv_pages_used == 0
    finished = [int(i) for i, chunks in collected.items() if chunks and chunks[-1].finish_reason]
    assert len(finished) > 15 and set(finished) >= SCORED
    for i in finished:
        alone = crowd_alone[i]
        whole = joined_chunks(collected[str(i)])
        assert whole.token_ids == alone.token_ids
        assert whole.finish_reason == alone.finish_reason
        assert (whole.logprobs is None) == (alone.logprobs is None) == (i not in SCORED)
        for got, expected in zip(whole.logprobs or (), alone.logprobs or (), strict=True):
            assert got.logprob == pytest.approx(expected.logprob, abs=1e-5)
    if ahead.schedule_name == "orthrus":
        least = 1.7 if "draft_lead" in settings else 1.2
        assert ahead.stats.tokens_per_cycle > least


def test_a_lead_brings_two_tokens_a_cycle_at_least(checkpoint: Path) -> None:
    plain, led = engine(checkpoint), engine(checkpoint, draft_lead=True)
    texts = prompts(4, seed=6)
    same(plain.generate(texts, GREEDY), led.generate(texts, GREEDY))
    # Two tokens, except if only one is left.
    assert led.stats.tokens_per_cycle > max(1.9, plain.stats.tokens_per_cycle)


def test_no_end_is_picked_before_min_tokens(checkpoint: Path) -> None:
    [prompt] = prompts(1)
    ends = tuple(range(100))
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, max_tokens=40, seed=1, stop_token_ids=ends)
        [[soon], [later]] = engine(checkpoint).generate(
            [prompt] * 2, [params, replace(params, min_tokens=12)]
        )
        assert len(soon.token_ids) < 12 and soon.finish_reason == later.finish_reason == "stop"
        assert len(later.token_ids) > 12 and not set(ends) & set(later.token_ids[:-1])
        assert later.token_ids[: len(soon.token_ids) - 1] == soon.token_ids[:-1]


def test_a_crowd_with_cancellations_and_too_little_cache(checkpoint: Path, ar: Engine) -> None:
    """64 requests, prompts from one token to the context limit, a cache for a fraction of them, random cancellations."""
    rng = random.Random(5)
    crowded = engine(checkpoint, kv_cache_tokens=1024, page_size=8, max_num_seqs=24, prefill_chunk=64)
    limit = crowded.max_model_len
    texts = [*prompts(60, 200, seed=9), [5], [6] * (limit - 1), prompts(1, 30)[0] * 2, [9] * (limit // 2)]
    params = [
        SamplingParams(temperature=rng.choice([0.0, 1.0]), seed=i, max_tokens=rng.randint(1, 60), logprobs=1)
        for i in range(len(texts))
    ]
    pending = [Request(str(i), t, p) for i, (t, p) in enumerate(zip(texts, params, strict=True))]
    collected: dict[str, list[Chunk]] = {r.request_id: [] for r in pending}
    doomed = {str(i) for i in rng.sample(range(len(texts)), 20)}
    while pending or crowded.has_work:
        for _ in range(rng.randint(0, 4)):
            if pending:
                crowded.submit(pending.pop())
        if doomed and rng.random() < 0.3:
            crowded.cancel(doomed.pop())
        for chunk in crowded.step():
            collected[chunk.request_id].append(chunk)
    assert crowded.stats.preemptions > 0
    assert crowded.stats.kv_pages_used == 0
    finished = [r for r in collected if collected[r] and collected[r][-1].finish_reason]
    assert len(finished) >= 40
    for request_id in finished:
        index = int(request_id)
        [[alone]] = ar.generate([texts[index]], params[index])
        assert tuple(t for c in collected[request_id] for t in c.token_ids) == alone.token_ids
        assert tuple(x for c in collected[request_id] for x in c.logprobs or ()) == alone.logprobs


def test_choices_share_the_prompt_and_differ(checkpoint: Path) -> None:
    ours = engine(checkpoint)
    prompt = prompts(1, 1)[0] * 100
    params = SamplingParams(temperature=1.0, seed=11, max_tokens=20, ignore_eos=True, n=4)
    [choices] = ours.generate([prompt], params)
    assert len({c.token_ids for c in choices}) == 4
    assert [c.stats.cached_tokens for c in choices] == [0, 96, 96, 96]
    [[single]] = ours.generate([prompt], replace(params, n=1))
    assert single.token_ids == choices[0].token_ids


def test_a_repeated_prompt_comes_from_the_cache_with_the_same_text(checkpoint: Path) -> None:
    ours = engine(checkpoint)
    prompt = prompts(1, 1, seed=2)[0] * 80
    first = ours.generate([prompt], GREEDY)
    again = ours.generate([prompt], GREEDY)
    same(first, again)
    assert (first[0][0].stats.cached_tokens, again[0][0].stats.cached_tokens) == (0, 64)
    # A follow-up turn finds the generated tokens' pages as well.
    longer = prompt + list(first[0][0].token_ids) + [1, 2, 3]
    [[turn]] = ours.generate([longer], GREEDY)
    assert turn.stats.cached_tokens == 112


def test_a_drawn_seed_is_reported(checkpoint: Path) -> None:
    ours = engine(checkpoint)
    params = SamplingParams(temperature=1.0, max_tokens=30, ignore_eos=True)
    first, second = (ours.generate([[1, 2, 3]], params)[0][0] for _ in range(2))
    assert first.token_ids != second.token_ids
    replay = ours.generate([[1, 2, 3]], replace(params, seed=first.stats.seed))[0][0]
    assert replay.token_ids == first.token_ids


@pytest.mark.parametrize("seed", [None, 5, 2**63 - 1])
def test_drawn_seeds_fit_into_a_double(checkpoint: Path, seed: int | None) -> None:
    """JavaScript's numbers are doubles, and a client must be able to send our seed back."""
    ours = engine(checkpoint)
    params = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True, n=8, seed=seed)
    for _ in range(4):
        [choices] = ours.generate([[1, 2, 3]], params)
        chosen = choices if seed is None else choices[1:]
        assert len({choice.stats.seed for choice in choices}) == 8
        assert all(choice.stats.seed < 2**53 for choice in chosen)
        for choice in chosen:
            again = replace(params, n=1, seed=int(float(choice.stats.seed)))
            assert ours.generate([[1, 2, 3]], again)[0][0].token_ids == choice.token_ids


def test_sampling_follows_the_model(checkpoint: Path, ar: Engine) -> None:
    """The frequencies of the first token over many seeds are those of softmax: a chi-squared test at p = 1e-4."""
    prompt, draws = [3, 1, 4, 1, 5], 4000
    expected = ar.score(prompt)[-1].softmax(-1)
    params = [SamplingParams(temperature=1.0, seed=s, max_tokens=1) for s in range(draws)]
    tokens = torch.tensor([c[0].token_ids[0] for c in ar.generate([prompt] * draws, params)])
    counts = torch.bincount(tokens, minlength=len(expected))
    common = expected * draws >= 5
    statistic = ((counts - expected * draws)[common] ** 2 / (expected * draws)[common]).sum().item()
    degrees = int(common.sum()) - 1
    assert statistic < degrees + 4.5 * (2 * degrees) ** 0.5


def test_limits_end_a_text_exactly(checkpoint: Path) -> None:
    ours = engine(checkpoint, max_model_len=64)
    for length in (1, 2, 3, 7, 8, 9, 20):
        [[c]] = ours.generate([[1, 2, 3]], replace(GREEDY, max_tokens=length))
        assert (len(c.token_ids), c.finish_reason) == (length, "length")
    [[c]] = ours.generate([[1] * 50], replace(GREEDY, max_tokens=None))
    assert (len(c.token_ids), c.finish_reason) == (14, "length")
