"""Log-probabilities of prompts on a GPU, at Qwen3-8B's widths: the bits that decoding the same text gave.

Texts are first decoded in batches. Then they are scored together with requests that decode, under both schedules: in chunks of
several lengths, up to the most rows that can have logits, and with a cache that is too small for all.
"""

import itertools
import random
from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from orthrus.engine import Engine
from orthrus.measure.acceptance import chain_profile
from orthrus.measure.drift import Result
from orthrus.measure.replay import replaying
from orthrus.measure.verify import run
from orthrus.requests.request import PromptLogprobs, Request, SamplingParams
from tests.gpu.test_bits import LONGEST, engine, limits

TOP = 3
TEXTS = 96


def decoding(logprobs: int | None) -> list[Request]:
    """Long texts from one token each, greedy and sampled."""
    rng = random.Random("scores")
    return [
        Request(
            str(index),
            [index],
            SamplingParams(
                temperature=float(index % 2),
                seed=index,
                max_tokens=rng.choice((40, 200, 700, LONGEST - 2)),
                ignore_eos=True,
                logprobs=logprobs,
            ),
        )
        for index in range(TEXTS)
    ]


def score_beside(
    engine: Engine, texts: dict[str, list[int]], others: list[Request]
) -> dict[str, PromptLogprobs]:
    """Score `texts` while `others` decode. Returns the log-probabilities of each text."""
    rng = random.Random(7)
    params = SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=TOP)
    waiting = [*others, *(Request(f"score {name}", text, params) for name, text in texts.items())]
    rng.shuffle(waiting)
    told: dict[str, PromptLogprobs] = {}
    while waiting or engine.has_work:
        for _ in range(rng.choice((0, 1, 8))):
            if waiting:
                engine.submit(waiting.pop())
        for chunk in engine.step():
            if chunk.prompt_logprobs is not None:
                name = chunk.request_id.removeprefix("score ")
                assert name not in told
                told[name] = chunk.prompt_logprobs
    return told


@pytest.fixture(scope="module")
def decoded() -> dict[str, Result]:
    """Each text as it was decoded, with log-probabilities from its second token on."""
    result = run(engine("ar", prefill_chunk=2048), decoding(TOP), limits(1))
    torch.cuda.empty_cache()
    return result


@pytest.mark.parametrize("schedule", ["ar", "orthrus"])
@pytest.mark.parametrize(("prefill_chunk", "contexts"), [(2048, 64), (512, 4), (100, 4)])
def test_no_bit_differs_from_decoding(
    decoded: dict[str, Result], schedule: str, prefill_chunk: int, contexts: int
) -> None:
    other = engine(schedule, prefill_chunk=prefill_chunk, kv_cache_tokens=contexts * LONGEST)
    beside = [replace(request, request_id=f"beside {request.request_id}") for request in decoding(None)]
    if schedule == "orthrus":
        drafts = replaying(other, chain_profile(4.0, 32))
        for request in beside:
            name = request.request_id.removeprefix("beside ")
            drafts.learn(request.prompt, request.params, decoded[name].token_ids)
    texts = {name: [int(name), *result.token_ids] for name, result in decoded.items()}
    told = score_beside(other, texts, beside)
    assert told.keys() == decoded.keys()
    wrong = [
        (name, position)
        for name, scores in told.items()
        for position, (got, expected) in enumerate(
            itertools.zip_longest(scores.tokens(), decoded[name].logprobs)
        )
        if got != expected
    ]
    assert not wrong, f"{len(wrong)} tokens differ, first {wrong[:5]}"
    assert contexts == 64 or other.stats.preemptions > 0
    if schedule == "orthrus":
        assert other.stats.tokens_per_cycle > 2.0
    del other
    torch.cuda.empty_cache()
