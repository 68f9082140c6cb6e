"""Medusa heads on a GPU: the bits are those of AR decoding, whatever the heads draft."""

import random
from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from orthrus.measure.acceptance import chain_profile
from orthrus.measure.random_model import shape_config, shape_engine
from orthrus.measure.replay import ReplaySchedule
from orthrus.models.medusa_config import MedusaConfig
from orthrus.requests.request import SamplingParams
from orthrus.schedules.ar import ARSchedule
from orthrus.schedules.medusa import MedusaSchedule
from orthrus.schedules.planner import DraftPlanner

MODEL = replace(shape_config("8B", diffusion=False), num_hidden_layers=2)
HEADS = 4


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own projections"])
def test_no_bit_differs_and_drafts_are_accepted(own: bool) -> None:
    engine = shape_engine(
        MODEL,
        "ar",
        torch.device("cuda"),
        torch.bfloat16,
        medusa=MedusaConfig.of(MODEL, HEADS, own),
        max_num_seqs=16,
        max_model_len=512,
        kv_cache_tokens=16 * 512,
    )
    rng = random.Random(0)
    prompts = [[rng.randrange(100_000) for _ in range(rng.choice((1, 30, 150)))] for _ in range(12)]
    params = [
        SamplingParams(
            temperature=i % 2, top_p=0.9, seed=i, max_tokens=100, ignore_eos=True, logprobs=1 - i // 6
        )
        for i in range(len(prompts))
    ]
    expected = engine.generate(prompts, params)
    planner = DraftPlanner(HEADS + 1, None, 512, lead=False)
    schedule = ReplaySchedule(
        MedusaSchedule(planner, HEADS), MODEL.vocab_size, [chain_profile(2.5, HEADS + 1)]
    )
    for prompt, one, [completion] in zip(prompts, params, expected, strict=True):
        schedule.learn(prompt, one, completion.token_ids)
    engine.use_schedule(schedule)
    found = engine.generate(prompts, params)
    for [got], [want] in zip(found, expected, strict=True):
        assert (got.token_ids, got.logprobs) == (want.token_ids, want.logprobs)
    cycles = sum(c.stats.cycles for [c] in found)
    assert sum(c.stats.completion_tokens - 1 for [c] in found) / cycles > 2.0
    # The heads' own drafts are hardly ever right here. They change no bit either.
    engine.use_schedule(MedusaSchedule(planner, HEADS))
    assert [c.token_ids for [c] in engine.generate(prompts, params)] == [c.token_ids for [c] in expected]
    engine.use_schedule(ARSchedule())
    assert [c.token_ids for [c] in engine.generate(prompts, params)] == [c.token_ids for [c] in expected]
