"""Blocks that are drafted behind drafts in flight are those of a host that waits to know where they begin."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orthrus.engine import Engine, EngineConfig
from orthrus.engine.observer import PassRecord
from orthrus.requests.request import Completion, SamplingParams
from orthrus.runner.eager import EagerRunner
from orthrus.schedules.blocks import DRAFT
from tests.checkpoints import make_checkpoint

PLAIN = [
    SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True),
    SamplingParams(temperature=0.8, max_tokens=50, seed=1, ignore_eos=True),
    SamplingParams(temperature=0.7, max_tokens=41, seed=2, top_p=0.9, top_k=20, min_tokens=20),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("behind") / "model", noise=0.02, eos_token_id=7)


def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(120) for _ in range(length)] for length in (1, 7, 15, 16, 17, 90)]


def decoded(
    path: Path, params: list[SamplingParams], ahead: bool, **settings: Any
) -> tuple[list[Completion], float, int, int]:
    """The texts, the tokens per cycle, the number of blocks, and how many of these were behind drafts in flight."""
    fixed = {
        "model": str(path),
        "adaptive_draft": False,
        "max_num_seqs": 4,
        "page_size": 8,
    }
    if "schedule" not in settings:
        fixed["prompt_lookup_max"] = 0  # A block behind drafts in flight leaves no time for a lookup.
    engine = Engine.from_pretrained(EngineConfig.model_validate(fixed | settings))
    engine.use_runner(EagerRunner(engine.forward, engine.cache, feeds_tokens=ahead))
    blocks: list[bool] = []

    def count(record: PassRecord) -> None:
        drafts = [turn.turn for turn in record.turns if turn.turn.kind == DRAFT]
        blocks.extend(turn.groups[0].behind is not None for turn in drafts)

    engine.observer = count
    asked = prompts()
    given = [params[i % len(params)] for i in range(len(asked))]
    found = [choice for choices in engine.generate(asked, given) for choice in choices]
    assert engine.stats.kv_pages_used == 0
    return found, engine.stats.tokens_per_cycle, len(blocks), sum(blocks)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"draft_weights": "fp8"},
        {"draft_length": 3, "max_num_seqs": 1},
        {"draft_tree": 24},
        {"draft_tree": 9, "draft_weights": "fp8", "max_num_seqs": 2},
    ],
    ids=str,
)
def test_drafts_are_those_of_an_engine_that_waits(checkpoint: Path, settings: dict[str, Any]) -> None:
    # So the same cycles: every draft is picked at the same position from the same keys and noise.
    params = [replace(p, ignore_eos=True) for p in PLAIN]
    waited, per_cycle, num_blocks, num_behind = decoded(checkpoint, params, False, **settings)
    assert num_behind == 0 and per_cycle > 1.3
    ahead, per_cycle_ahead, num_blocks_ahead, num_behind = decoded(checkpoint, params, True, **settings)
    assert [c.token_ids for c in ahead] == [c.token_ids for c in waited]
    assert per_cycle_ahead == pytest.approx(per_cycle, rel=0.02)
    assert num_behind > 0.7 * num_blocks
    assert num_blocks_ahead < 1.1 * num_blocks


OTHERS = [
    *PLAIN,
    replace(PLAIN[0], logprobs=1),
    replace(PLAIN[1], ignore_eos=False),
    replace(PLAIN[1], repetition_penalty=1.2),
]


@pytest.fixture(scope="module")
def by_ar(checkpoint: Path) -> list[Completion]:
    return decoded(checkpoint, OTHERS, False, schedule="ar")[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_cache_tokens": 240, "max_model_len": 160},
        {"kv_cache_tokens": 320, "max_model_len": 160, "draft_tree": 24},
        {"adaptive_draft": True},
        {"draft_lead": True},
    ],
    ids=["preempted", "preempted, trees", "adaptive", "lead"],
)
def test_the_text_is_that_of_ar_decoding(
    checkpoint: Path, by_ar: list[Completion], settings: dict[str, Any]
) -> None:
    """Also beside requests whose next pass has to wait for their picks, and where sequences end within a block."""
    found, *_ = decoded(checkpoint, OTHERS, True, **settings)
    for got, right in zip(found, by_ar, strict=True):
        assert (got.token_ids, got.finish_reason) == (right.token_ids, right.finish_reason)
