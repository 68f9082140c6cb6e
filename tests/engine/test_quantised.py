"""Engines of quantised checkpoints: no drift from the same checkpoint under AR, and drafts as good as unquantised ones."""

from pathlib import Path
from typing import Any

import pytest
import torch

from orthrus.engine import Engine
from orthrus.engine.config import EngineConfig
from orthrus.models.checkpoint import load_weights
from orthrus.models.dense import dequantised
from orthrus.models.families import load_config
from orthrus.requests.request import SamplingParams
from tests.quantised import SETTINGS, copy_in_full, make_quantised

PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=0.8, max_tokens=40, seed=3, ignore_eos=True),
    SamplingParams(temperature=0.0, max_tokens=30, logprobs=2, ignore_eos=True),
]
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8], [*range(1, 70)]]


def engine(path: Path, **settings: Any) -> Engine:
    fixed = {"model": str(path), "kv_cache_tokens": 2048, "adaptive_draft": False}
    return Engine.from_pretrained(EngineConfig.model_validate(fixed | settings))


@pytest.mark.parametrize("name", SETTINGS)
def test_drafts_change_the_speed_and_not_the_text(name: str, tmp_path: Path) -> None:
    path = make_quantised(tmp_path / "model", SETTINGS[name])
    config = load_config(path)
    full = dequantised(load_weights(path, config, "cpu", "float32"), torch.float32)
    plain = engine(copy_in_full(path, tmp_path / "plain", full), schedule="orthrus")
    plain.generate(PROMPTS, PARAMS)
    ar = engine(path, schedule="ar", adaptive_draft=True)
    alone = [ar.generate([p], params)[0][0] for p, params in zip(PROMPTS, PARAMS, strict=True)]
    for settings in ({}, {"draft_weights": "fp8"}):
        ours = engine(path, schedule="orthrus", **settings)
        together = [completions[0] for completions in ours.generate(PROMPTS, PARAMS)]
        for got, expected in zip(together, alone, strict=True):
            assert (got.token_ids, got.logprobs) == (expected.token_ids, expected.logprobs)
        # Drafts are right as often as with the same weights dequantised.
        assert ours.stats.tokens_per_cycle > max(1.15, 0.9 * plain.stats.tokens_per_cycle)


@pytest.mark.parametrize("name", ["gptq", "act_order", "awq"])
def test_integer_weights_give_the_text_of_the_dequantised_checkpoint(name: str, tmp_path: Path) -> None:
    path = make_quantised(tmp_path / "model", SETTINGS[name])
    config = load_config(path)
    full = dequantised(load_weights(path, config, "cpu", "float32"), torch.float32)
    plain = copy_in_full(path, tmp_path / "plain", full)
    ours, theirs = (engine(p, schedule="ar", adaptive_draft=True).score(PROMPTS[2]) for p in (path, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_bfloat16_runs_on_a_cpu_too(tmp_path: Path) -> None:
    path = make_quantised(tmp_path / "model", SETTINGS["awq"])
    texts = [
        engine(path, schedule=schedule, dtype="bfloat16", adaptive_draft=schedule == "ar").generate(
            PROMPTS, PARAMS
        )
        for schedule in ("ar", "orthrus")
    ]
    assert [t[0].token_ids for t in texts[0]] == [t[0].token_ids for t in texts[1]]
