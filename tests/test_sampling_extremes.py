"""Sampling parameters at their limits, together: no combination stops the engine, and drafting changes no token of any."""

import random
from pathlib import Path
from typing import Any

from orthrus.engine import Engine
from orthrus.engine.config import EngineConfig
from orthrus.requests.request import SamplingParams

# The smallest positive numbers that float64, float32 and bfloat16 have, and the largest below one, among others.
EXTREMES: dict[str, list[Any]] = {
    "temperature": [0.0, -0.0, 1e-3, 1.0, 100.0],
    "top_p": [5e-324, 1e-300, 1e-38, 1e-7, 0.5, 1 - 2**-53, 1.0],
    "top_k": [0, 1, 2, 10**30],
    "min_p": [0.0, 5e-324, 1e-38, 1 - 2**-53, 1.0],
    "presence_penalty": [-0.0, -2.0, 2.0, 5e-324],
    "frequency_penalty": [0.0, -2.0, 2.0],
    "repetition_penalty": [0.01, 1.0, 1 + 2**-52, 100.0],
    "logit_bias": [{}, {0: 100.0}, dict.fromkeys(range(64), -100.0)],
    "stop_token_ids": [(), (-1, 10**30), (0,)],
    "logprobs": [None, 0, 20],
    "seed": [0, 2**63 - 1],
    "ignore_eos": [False, True],
    "min_tokens": [0, 1, 8],
    "n": [1, 2],
}


def test_no_combination_of_extremes_stops_the_engine(tiny_orthrus: Path) -> None:
    def engine(schedule: Any) -> Engine:
        return Engine.from_pretrained(
            EngineConfig(
                model=str(tiny_orthrus), schedule=schedule, adaptive_draft=False, kv_cache_tokens=1024
            )
        )

    drafting, plain = engine("orthrus"), engine("ar")
    vocabulary = drafting.model_config.vocab_size
    rng = random.Random(0)
    for _ in range(40):
        params = [
            SamplingParams(
                **{"seed": 3, **{k: rng.choice(v) for k, v in EXTREMES.items() if rng.random() < 0.6}},
                max_tokens=8,
            )
            for _ in range(6)
        ]
        prompts = [[rng.randrange(vocabulary) for _ in range(rng.choice([1, 2, 17]))] for _ in params]
        drafted, expected = drafting.generate(prompts, params), plain.generate(prompts, params)
        for one, other in zip(drafted, expected, strict=True):
            for got, want in zip(one, other, strict=True):
                assert (got.token_ids, got.finish_reason) == (want.token_ids, want.finish_reason)
    assert drafting.stats.kv_pages_used == plain.stats.kv_pages_used == 0
