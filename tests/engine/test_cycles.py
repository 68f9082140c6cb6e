"""What chunks report about their cycles, if a request asks for it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orthrus.requests.request import Chunk, Request, SamplingParams, joined_chunks
from tests.checkpoints import make_checkpoint
from tests.engine.test_engine import GREEDY, engine, prompts


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("engine") / "model", noise=0.02)


@pytest.mark.parametrize(
    "settings",
    [
        {"draft_lead": True},
        {"draft_lead": False},
        {"adaptive_draft": True},
        {"draft_tree": 20, "draft_lead": True},
        {"draft_tree": 6, "draft_lead": False},
        {"schedule": "ngram", "prompt_lookup_min": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("params", [GREEDY, replace(GREEDY, temperature=0.8, seed=5, max_tokens=31)])
def test_chunks_tell_what_each_cycle_drafted(
    checkpoint: Path, params: SamplingParams, settings: dict[str, Any]
) -> None:
    running = engine(checkpoint, **settings)
    [prompt] = prompts(1, seed=3)
    running.submit(Request("told", prompt, replace(params, return_drafts=True)))
    running.submit(Request("silent", prompt, params))
    told: list[Chunk] = []
    while running.has_work:
        for chunk in running.step():
            if chunk.request_id == "told":
                told.append(chunk)
            else:
                assert chunk.cycles == ()
    whole = joined_chunks(told)
    stats = told[-1].stats
    assert stats is not None and len(whole.cycles) == stats.cycles
    assert sum(cycle.num_tokens for cycle in whole.cycles) == len(whole.token_ids) - 1
    place = 1  # The first token comes with the prompt.
    for cycle in whole.cycles[:-1]:  # The text may end within the last one.
        tokens = whole.token_ids[place : place + cycle.num_tokens]
        lead = cycle.num_tokens - cycle.num_accepted - 1
        assert lead in (0, 1)
        assert tokens[lead : lead + cycle.num_accepted] == cycle.drafts[: cycle.num_accepted]
        rejected = cycle.drafts[cycle.num_accepted : cycle.num_accepted + 1]
        assert not rejected or tokens[-1] != rejected[0]
        place += cycle.num_tokens
    if "schedule" in settings:
        assert any(cycle.drafts for cycle in whole.cycles)
        assert stats.tokens_per_cycle > 1.0
    if "draft_lead" in settings:
        assert all(cycle.drafts for cycle in whole.cycles[:-2])
        assert stats.tokens_per_cycle > (1.5 if settings["draft_lead"] else 1.0)


def test_a_text_that_ends_at_a_lead_ends_its_cycle(checkpoint: Path) -> None:
    running = engine(checkpoint, draft_lead=True)

    def run(params: SamplingParams) -> Chunk:
        running.submit(Request("led", prompts(1, seed=3)[0], replace(params, return_drafts=True)))
        chunks: list[Chunk] = []
        while running.has_work:
            chunks += running.step()
        return joined_chunks(chunks)

    whole, place, leads = run(GREEDY), 1, []
    for cycle in whole.cycles:
        if (
            cycle.num_tokens == cycle.num_accepted + 2
            and whole.token_ids[place] not in whole.token_ids[:place]
        ):
            leads.append(place)
        place += cycle.num_tokens
    for place in leads[1:4]:
        cut = run(replace(GREEDY, stop_token_ids=(whole.token_ids[place],)))
        assert cut.token_ids == whole.token_ids[: place + 1] and cut.finish_reason == "stop"
        assert sum(cycle.num_tokens for cycle in cut.cycles) == place
        assert cut.stats is not None and cut.stats.cycles == len(cut.cycles)
    assert len(leads) > 3
