"""Zero drift on a GPU, bit for bit: 200,000 tokens of Orthrus at Qwen3-8B's widths, four layers of random weights.

The reference decodes plainly, in mixtures of 1 to 64 requests. Against it: the same with other chunks and another order, and
Orthrus with replayed drafts in other mixtures, by draft weights of their own and by the same ones, with a cache too small for
them and prefixes that are found in it.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from orthrus.engine import Engine
from orthrus.measure.acceptance import AcceptanceProfile
from orthrus.measure.drift import Result, find_drifts
from orthrus.measure.random_model import shape_config, shape_engine
from orthrus.measure.replay import replaying
from orthrus.measure.verify import run
from orthrus.requests.request import Request, SamplingParams

DEVICE = torch.device("cuda")
MODEL = replace(shape_config("8B"), num_hidden_layers=4)
LONGEST = 1024


def requests(ahead: bool) -> Iterator[Request]:
    """Prompts of 1 to 850 tokens, many with a prefix that others have; greedy and T = 1, filtered and not, some with logprobs."""
    rng = random.Random(f"bits {ahead}")
    prefixes = [[rng.randrange(100_000) for _ in range(rng.choice((64, 200, 448)))] for _ in range(8)]
    for index in itertools.count():
        prompt = [rng.randrange(100_000) for _ in range(rng.choice((1, 30, 150, 400)))]
        filtered = rng.random() < 0.3
        params = SamplingParams(
            temperature=float(index % 2),
            top_k=20 if filtered else 0,
            top_p=0.9 if filtered else 1.0,
            seed=index,
            max_tokens=rng.choice((20, 60, 160, 500)),
            ignore_eos=True,
            logprobs=None if ahead else 1,
        )
        yield Request(str(index), rng.choice(prefixes) + prompt if rng.random() < 0.5 else prompt, params)


def limits(seed: int) -> Iterator[int]:
    rng = random.Random(seed)
    while True:
        # For some time the same: batches that last, and every size from one to full.
        yield from [rng.choice((1, 2, 5, 16, 40, 64))] * 20


def engine(schedule: str, **settings: Any) -> Engine:
    model = MODEL if schedule == "orthrus" else replace(MODEL, block_size=None, mask_token_id=None)
    fixed = {"max_num_seqs": 64, "max_model_len": LONGEST, "kv_cache_tokens": 64 * LONGEST}
    return shape_engine(model, schedule, DEVICE, torch.bfloat16, **(fixed | settings))


@pytest.mark.parametrize(
    ("ahead", "least"), [(False, 50_000), (True, 150_000)], ids=["with logprobs", "launched ahead"]
)
def test_no_bit_differs(ahead: bool, least: int) -> None:
    reference = engine("ar", prefill_chunk=2048)
    asked: list[Request] = []
    expected: dict[str, Result] = {}
    source, tokens = requests(ahead), 0
    while tokens < least:
        some = list(itertools.islice(source, 128))
        expected |= run(reference, some, limits(len(asked)))
        asked += some
        tokens = sum(len(result.token_ids) for result in expected.values())
    del reference
    torch.cuda.empty_cache()

    other = engine("ar", prefill_chunk=128, kv_cache_tokens=4 * LONGEST)
    order = random.Random(1).sample(asked, len(asked))
    got = run(other, order, limits(1))
    assert not find_drifts("ar", got, expected)
    assert other.stats.preemptions > 0 and other.stats.prefix_hit_tokens > 0
    del other
    torch.cuda.empty_cache()

    # The right token is often the second best: trees have a use.
    ranks = AcceptanceProfile(((0.7, 0.15, 0.05),), "constant").scaled(4.0, 32)
    for drafts, tree in (("fp8", None), ("same", None), ("fp8", 24)):
        orthrus = engine(
            "orthrus", prefill_chunk=512, kv_cache_tokens=8 * LONGEST, draft_weights=drafts, draft_tree=tree
        )
        assert (orthrus.forward.draft is not None) == (drafts == "fp8")
        schedule = replaying(orthrus, ranks)
        for request in asked:
            schedule.learn(request.prompt, request.params, expected[request.request_id].token_ids)
        got = run(orthrus, random.Random(2).sample(asked, len(asked)), limits(2))
        assert not find_drifts(f"orthrus, {drafts} drafts", got, expected)
        assert orthrus.stats.preemptions > 0 and orthrus.stats.prefix_hit_tokens > 0
        assert orthrus.stats.tokens_per_cycle > 2.5
        del orthrus, schedule
        torch.cuda.empty_cache()
