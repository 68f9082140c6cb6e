"""Log-probabilities of prompts have the bits of those from decoding the same text, however the prompt is computed."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orthrus.engine import Engine
from orthrus.engine.pass_limits import SCORE_ROWS
from orthrus.errors import RequestError
from orthrus.requests.request import Chunk, Completion, PromptLogprobs, Request, SamplingParams, TokenLogprob
from tests.checkpoints import make_checkpoint
from tests.engine.limited_runner import LimitedRunner
from tests.engine.test_engine import GREEDY, engine
from tests.reference import Reference

TOP = 3
SCORE = SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=TOP)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("scores") / "model", noise=0.02)


@pytest.fixture(scope="module")
def ar(checkpoint: Path) -> Engine:
    return engine(checkpoint, "ar")


Decoded = list[tuple[list[int], tuple[TokenLogprob, ...]]]


@pytest.fixture(scope="module")
def decoded(ar: Engine) -> Decoded:
    """Texts, greedy and sampled, each decoded from its first token: their tokens, and log-probabilities from the second on."""
    params = [
        SamplingParams(
            temperature=i % 2, seed=i, max_tokens=(1, 30, 120)[i % 3], ignore_eos=True, logprobs=TOP
        )
        for i in range(10)
    ]
    texts = []
    for i, p in enumerate(params):
        [[completion]] = ar.generate([[i]], p)
        assert completion.logprobs is not None
        texts.append(([i, *completion.token_ids], completion.logprobs))
    return texts


def scores(completion: Completion) -> tuple[TokenLogprob, ...]:
    assert completion.prompt_logprobs is not None
    return tuple(completion.prompt_logprobs.tokens())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"schedule": "ar"},
        {"prefill_chunk": 7},
        {"prefix_caching": False, "max_num_seqs": 2},
        {"kv_cache_tokens": 512, "page_size": 8, "prefill_chunk": 24},
        {"draft_lead": True},
    ],
    ids=str,
)
def test_prompts_are_scored_as_decoding_scores_them(
    checkpoint: Path, decoded: Decoded, settings: dict[str, Any]
) -> None:
    other = engine(checkpoint, **settings)
    texts = [text for text, _ in decoded]
    for max_tokens in (0, 24):
        params = replace(SCORE, max_tokens=max_tokens, ignore_eos=True)
        whole = other.generate(texts, params)
        assert [scores(completion) for [completion] in whole] == [expected for _, expected in decoded]
        assert all(len(completion.token_ids) == max_tokens for [completion] in whole)
        assert all(completion.stats.cached_tokens == 0 for [completion] in whole)
    assert other.stats.kv_pages_used == 0
    if other.schedule_name == "orthrus":
        assert other.stats.tokens_per_cycle > 1.2, "the drafts are never right: the diffusion view is broken"


def test_prompts_are_scored_as_hugging_face_scores_them(
    tiny_orthrus: Path, tiny_reference: Reference
) -> None:
    rng = random.Random(2)
    text = [rng.randrange(120) for _ in range(200)]
    [[completion]] = engine(tiny_orthrus, prefill_chunk=48).generate([text], SCORE)
    theirs = tiny_reference.ar_logits(text)[:-1].log_softmax(-1)
    ours = completion.prompt_logprobs
    assert ours is not None and ours.token_ids.tolist() == text[1:]
    expected = theirs.gather(1, torch.tensor(text[1:])[:, None])
    assert torch.allclose(torch.from_numpy(ours.logprobs), expected[:, 0], rtol=0, atol=1e-4)
    assert torch.allclose(torch.from_numpy(ours.top_logprobs), theirs.topk(TOP).values, rtol=0, atol=1e-4)
    assert ours.ranks.tolist() == ((theirs > expected).sum(-1) + 1).tolist()


def test_scoring_a_prompt_does_not_change_the_text_after_it(checkpoint: Path, ar: Engine) -> None:
    """Also where picks are filtered, penalised, or may not end. The rows that score are not affected by that."""
    text = [3, 1, 4, 1, 5] * 12
    cases: list[dict[str, Any]] = [
        {"temperature": 1.0, "seed": 1, "top_k": 5, "logprobs": 2},
        {"temperature": 1.0, "seed": 2, "repetition_penalty": 1.3, "logit_bias": {7: 3.0}, "logprobs": 0},
        {"temperature": 0.0, "stop_token_ids": tuple(range(100)), "min_tokens": 9},
    ]
    for settings in cases:
        plain = SamplingParams(max_tokens=20, **settings)
        [[expected]] = ar.generate([text], plain)
        [[got]] = engine(checkpoint, prefill_chunk=32).generate([text], replace(plain, prompt_logprobs=TOP))
        assert (got.token_ids, got.logprobs) == (expected.token_ids, expected.logprobs)
        assert scores(got) == scores(ar.generate([text], SCORE)[0][0])


def test_a_scored_prompt_does_not_read_the_prefix_cache_but_fills_it(checkpoint: Path, ar: Engine) -> None:
    text = [7, 8, 9, 10] * 25
    expected = scores(ar.generate([text], SCORE)[0][0])
    ours = engine(checkpoint)
    ours.generate([text], GREEDY)
    params = SamplingParams(temperature=1.0, seed=11, max_tokens=9, ignore_eos=True, n=3, prompt_logprobs=TOP)
    [choices] = ours.generate([text], params)
    assert [choice.stats.cached_tokens for choice in choices] == [0, 96, 96]
    assert scores(choices[0]) == expected
    assert [choice.prompt_logprobs for choice in choices[1:]] == [None, None]
    fresh = engine(checkpoint)
    fresh.generate([text], SCORE)
    [[after]] = fresh.generate([text], GREEDY)
    assert after.stats.cached_tokens == 96
    assert after.token_ids == ar.generate([text], GREEDY)[0][0].token_ids


def test_requests_that_only_score_their_prompt(checkpoint: Path, ar: Engine) -> None:
    """With the shortest and the longest prompts, and with further choices, which have no tokens."""
    limit = ar.max_model_len
    for length in (1, 2, 16, 17, limit - 1, limit):
        [[completion]] = engine(checkpoint, kv_cache_tokens=limit).generate([[5] * length], SCORE)
        assert (completion.token_ids, completion.finish_reason) == ((), "length")
        assert len(scores(completion)) == length - 1
        assert completion.stats.completion_tokens == completion.stats.cycles == 0
        assert completion.stats.prompt_tokens == length and completion.stats.tokens_per_cycle == 1.0
    ours = engine(checkpoint)
    [choices] = ours.generate([[5] * 40], replace(SCORE, n=3, logprobs=2))
    assert [(choice.token_ids, choice.logprobs) for choice in choices] == [((), ())] * 3
    assert not ours.has_work and ours.stats.kv_pages_used == 0
    with pytest.raises(RequestError, match="context limit of 512 must hold it: "):
        ours.check(Request("long", [5] * (limit + 1), SCORE))
    with pytest.raises(RequestError, match="at least one new token"):
        ours.check(Request("long", [5] * limit, replace(SCORE, max_tokens=1)))
    refused: list[dict[str, Any]] = [{"max_tokens": 0}, {"prompt_logprobs": 21}, {"prompt_logprobs": -1}]
    for fields in refused:
        with pytest.raises(RequestError) as caught:
            SamplingParams(**fields)
        assert [caught.value.param] == list(fields)


@pytest.mark.parametrize(
    "settings",
    [{"draft_lead": True}, {"kv_cache_tokens": 240, "page_size": 8, "prefill_chunk": 40}],
    ids=str,
)
def test_a_crowd_is_scored_within_the_memory_reserved_for_it(
    checkpoint: Path, decoded: Decoded, ar: Engine, settings: dict[str, Any]
) -> None:
    """Long answers and scored prompts, some cancelled, some computed again: each prompt's scores come once, and complete."""
    rng = random.Random(5)
    crowded = engine(checkpoint, **({"max_num_seqs": 96} | settings))
    runner = LimitedRunner(crowded)
    crowded.use_runner(runner)
    waiting = [Request(f"answer {i}", [i], replace(GREEDY, max_tokens=30)) for i in range(70)]
    for i, (text, _) in enumerate(decoded * 2):
        waiting.append(
            Request(f"score {i}", text, replace(SCORE, max_tokens=rng.choice((0, 1, 9)), ignore_eos=True))
        )
    rng.shuffle(waiting)
    told: dict[str, list[Chunk]] = {request.request_id: [] for request in waiting}
    scored_beside_a_crowd = 0
    while waiting or crowded.has_work:
        for _ in range(rng.randint(0, 16)):
            if waiting:
                crowded.submit(waiting.pop())
        for chunk in crowded.step():
            told[chunk.request_id].append(chunk)
            scored_beside_a_crowd += chunk.prompt_logprobs is not None and crowded.stats.running > 40
        if rng.random() < 0.02:
            crowded.cancel(f"score {rng.randrange(20)}")
    assert crowded.stats.kv_pages_used == 0
    if "kv_cache_tokens" in settings:
        assert crowded.stats.preemptions > 0
    else:
        assert scored_beside_a_crowd and runner.fullest > 512
    finished = {name: chunks for name, chunks in told.items() if chunks and chunks[-1].finish_reason}
    assert len(finished) > 80
    for name, chunks in finished.items():
        kind, number = name.split()
        parts = [chunk.prompt_logprobs for chunk in chunks if chunk.prompt_logprobs is not None]
        if kind == "answer":
            assert not parts
            continue
        assert parts == [chunks[0].prompt_logprobs]
        text, expected = decoded[int(number) % len(decoded)]
        got = tuple(parts[0].tokens())
        assert [item.token_id for item in got] == text[1:]
        for mine, theirs in zip(got, expected, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-5)


def test_prompts_that_are_computed_again_while_they_are_scored(checkpoint: Path, decoded: Decoded) -> None:
    """Each pass evicts pages that the next one needs. Scores so far are kept, and their rows need no logits again."""
    ours = engine(checkpoint, kv_cache_tokens=256, page_size=8, prefill_chunk=24, max_num_seqs=4)
    texts = [(text, expected) for text, expected in decoded if len(text) > 100]
    requests = [Request(str(i), text, SCORE) for i, (text, _) in enumerate(texts)]
    told: dict[str, list[PromptLogprobs]] = {request.request_id: [] for request in requests}
    for request in requests:
        ours.submit(request)
    steps = 0
    while ours.has_work:
        steps += 1
        running = list(ours._scheduler.running)
        if steps % 3 == 0 and running:
            victim = running[-1]
            ours._scheduler._preempt(victim)
        for chunk in ours.step():
            assert chunk.prompt_logprobs is not None
            told[chunk.request_id].append(chunk.prompt_logprobs)
    assert ours.stats.preemptions > 3
    for request, (_, expected) in zip(requests, texts, strict=True):
        [part] = told[request.request_id]
        assert tuple(part.tokens()) == expected


def test_scoring_advances_however_many_sequences_decode(ar: Engine, checkpoint: Path) -> None:
    """A full batch of drafts leaves some rows with logits to prompts that are scored. So these don't wait for its end."""
    ours = engine(checkpoint, max_num_seqs=128)
    ours.use_runner(LimitedRunner(ours))
    for i in range(100):
        ours.submit(Request(f"answer {i}", [i], replace(GREEDY, max_tokens=300)))
    ours.step()
    ours.step()
    text = [9] * (4 * SCORE_ROWS)
    ours.submit(Request("score", text, SCORE))
    for _ in range(8):
        got = [chunk for chunk in ours.step() if chunk.request_id == "score"]
        if got:
            break
    else:
        pytest.fail("the prompt was not scored in eight passes")
    assert ours.stats.running >= 99
    assert got[0].prompt_logprobs is not None
    for mine, theirs in zip(
        got[0].prompt_logprobs.tokens(), scores(ar.generate([text], SCORE)[0][0]), strict=True
    ):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-5)


def test_others_start_before_a_prompt_that_waits_to_be_scored(checkpoint: Path, ar: Engine) -> None:
    """While some prompts take all rows that may score, others can begin: there are slots, pages and rows for them."""
    ours = engine(checkpoint, prefill_chunk=2048)
    texts = [[i + 1] * 500 for i in range(3)]
    assert 500 < ours._scheduler._score_budget(0) < 1000
    requests = [Request(f"score {i}", text, replace(SCORE, n=2)) for i, text in enumerate(texts)]
    requests.append(Request("answer", [3, 4, 5], GREEDY))
    for request in requests:
        ours.submit(request)
    told: dict[str, list[Chunk]] = {request.request_id: [] for request in requests}
    began = []
    while ours.has_work:
        for chunk in ours.step():
            if not told[chunk.request_id]:
                began.append(chunk.request_id)
            told[chunk.request_id].append(chunk)
    assert set(began[:2]) == {"score 0", "answer"}
    assert began[2:] == ["score 1", "score 2"]
    [[alone]] = ar.generate([[3, 4, 5]], GREEDY)
    assert tuple(token for chunk in told["answer"] for token in chunk.token_ids) == alone.token_ids
    for i, text in enumerate(texts):
        [part] = [c.prompt_logprobs for c in told[f"score {i}"] if c.prompt_logprobs is not None]
        for mine, theirs in zip(part.tokens(), scores(ar.generate([text], SCORE)[0][0]), strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-5)
