"""Trees of drafts: the text is that of AR decoding to the last bit, more of it per cycle than with one continuation."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orthrus.engine import Engine, EngineConfig
from orthrus.engine.observer import PassRecord
from orthrus.requests.request import Completion, Request, SamplingParams
from orthrus.runner.eager import EagerRunner
from orthrus.schedules.blocks import VERIFY
from orthrus.schedules.draft_tree import MAX_RUNS, Run, follow, runs_of
from orthrus.schedules.tree_chances import TreeChances
from tests.checkpoints import make_checkpoint

PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=48, logprobs=2, ignore_eos=True),
    SamplingParams(temperature=1.0, max_tokens=48, seed=1, logprobs=0, ignore_eos=True),
    SamplingParams(temperature=0.7, max_tokens=41, seed=2, top_p=0.9, top_k=20, min_tokens=20),
    SamplingParams(temperature=1.0, max_tokens=48, seed=4, repetition_penalty=1.3, presence_penalty=0.5),
    SamplingParams(temperature=0.0, max_tokens=48, frequency_penalty=0.7, logprobs=3),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("trees") / "model", noise=0.05)


def engine(path: Path, **settings: Any) -> Engine:
    fixed = {"model": str(path), "adaptive_draft": False, "max_num_seqs": 8, "kv_cache_tokens": 4096}
    return Engine.from_pretrained(EngineConfig.model_validate(fixed | settings))


def prompts(lengths: list[int]) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(120) for _ in range(length)] for length in lengths]


def texts(results: list[list[Completion]]) -> list[tuple[Any, ...]]:
    return [(c.token_ids, c.logprobs, c.finish_reason) for choices in results for c in choices]


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[tuple[Any, ...]]:
    # Lengths on both sides of the ends of pages, so that trees begin at all places of a page.
    return texts(engine(checkpoint, schedule="ar").generate(PROMPTS, REQUESTED))


PROMPTS = prompts([1, 7, 8, 9, 15, 16, 17, 30, 31, 32])
REQUESTED = [PARAMS[i % len(PARAMS)] for i in range(len(PROMPTS))]


@pytest.mark.parametrize(
    "settings",
    [
        {"page_size": 8},
        {"page_size": 16, "draft_lead": True, "max_num_seqs": 3, "prefill_chunk": 9},
        {"page_size": 8, "kv_cache_tokens": 208, "max_model_len": 96},
        {"page_size": 8, "draft_tree": 5, "draft_length": 3},
    ],
    ids=["pages of 8", "lead", "preempted", "small"],
)
@pytest.mark.parametrize("ahead", [False, True], ids=["waiting", "ahead"])
def test_trees_give_the_text_of_ar_decoding_and_lose_no_page(
    checkpoint: Path, expected: list[tuple[Any, ...]], settings: dict[str, Any], ahead: bool
) -> None:
    ours = engine(checkpoint, **{"draft_tree": 24} | settings)
    ours.use_runner(EagerRunner(ours.forward, ours.cache, feeds_tokens=ahead))
    branches: list[int] = []

    def count(record: PassRecord) -> None:
        branches.extend(len(turn.turn.groups) - 1 for turn in record.turns if turn.turn.kind == VERIFY)

    ours.observer = count
    # The second time, prompts are in the prefix cache.
    for _ in range(2):
        assert texts(ours.generate(PROMPTS, REQUESTED)) == expected
    assert sum(branches) > 100
    assert ours.stats.kv_pages_used == 0
    assert ours.stats.tokens_per_cycle > 1.2
    if "kv_cache_tokens" in settings:
        assert ours.stats.preemptions > 0


def test_a_tree_commits_more_tokens_per_cycle_than_one_continuation(checkpoint: Path) -> None:
    for temperature in (0.0, 0.7):
        params = [replace(p, temperature=temperature) for p in [PARAMS[1]] * len(PROMPTS)]
        chain, tree = engine(checkpoint), engine(checkpoint, draft_tree=32)
        assert texts(chain.generate(PROMPTS, params)) == texts(tree.generate(PROMPTS, params))
        assert tree.stats.tokens_per_cycle > 1.1 * chain.stats.tokens_per_cycle, temperature


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_k": 2}, {"top_p": 0.3}, {"min_p": 1.0}], ids=str)
def test_filters_that_leave_fewer_tokens_than_a_tree_has_ranks_stop_nothing(
    checkpoint: Path, filters: dict[str, Any]
) -> None:
    """With penalties, each row of a tree counts the tokens on its path."""
    params = [
        SamplingParams(temperature=1.0, seed=i, max_tokens=24, repetition_penalty=1.2, **filters)
        for i in range(len(PROMPTS))
    ]
    plain, tree = engine(checkpoint, schedule="ar"), engine(checkpoint, draft_tree=24)
    assert texts(tree.generate(PROMPTS, params)) == texts(plain.generate(PROMPTS, params))


def test_cancelling_while_a_tree_is_computed_frees_its_pages(checkpoint: Path) -> None:
    ours = engine(checkpoint, draft_tree=24, page_size=8)
    ours.submit(Request("a", PROMPTS[3], PARAMS[0]))
    for _ in range(7):
        ours.step()
    ours.cancel("a")
    while ours.has_work:
        ours.step()
    assert ours.stats.kv_pages_used == 0


def test_the_likeliest_nodes_are_grown_and_counts_change_them() -> None:
    chances = TreeChances(depths=4, ranks=3)
    nodes = chances.tree(20, 4)
    assert len(nodes) == 20
    assert [n.chance for n in nodes] == sorted((n.chance for n in nodes), reverse=True)
    assert all(n.parent < i for i, n in enumerate(nodes))
    assert all(n.depth == (nodes[n.parent].depth + 1 if n.parent >= 0 else 0) for n in nodes)
    assert [n.rank for n in nodes if n.on_chain] == [0] * 4
    for _ in range(200):
        chances.observe(0, True, 2)
    first = chances.tree(1, 4)[0]
    assert (first.parent, first.depth, first.rank, first.on_chain) == (-1, 0, 2, False)


def test_runs_hold_all_nodes_and_their_number_is_limited() -> None:
    chances = TreeChances(depths=8, ranks=4)
    nodes = chances.tree(16, 8)
    runs = runs_of(nodes, 40, 16)
    assert sum(len(run.ranks) for run in runs) == 17
    assert set(runs[0].ranks) == {0}
    for run in runs[1:]:
        assert runs[run.parent].first_depth < run.first_depth <= runs[run.parent].end_depth
    assert len(runs_of(chances.tree(120, 8), 40, 16)) == MAX_RUNS


def test_picks_are_followed_from_run_to_run() -> None:
    # x - a - b - c, and behind a also: e - f.
    runs = [Run(-1, -1, [0, 0, 0, 0]), Run(0, 1, [1, 0])]
    candidates = [[10, 11], [20, 21], [30, 31]]
    right = follow(runs, candidates, [[10, 21, 0, 0], [30, 7]])
    assert (right.tokens, right.rows, right.run) == ([10, 21, 30, 7], [0, 1, 4, 5], 1)
    assert right.ranks == [0, 1, 0]
    chain = follow(runs, candidates, [[10, 20, 30, 8], [0, 0]])
    assert (chain.tokens, chain.rows, chain.run) == ([10, 20, 30, 8], [0, 1, 2, 3], 0)
    # The right candidate may have no row.
    missing = follow(runs, candidates, [[11, 0, 0, 0], [0, 0]])
    assert (missing.tokens, missing.run, missing.ranks) == ([11], 0, [1])
    none = follow(runs, candidates, [[-1, 0, 0, 0], [0, 0]])
    assert (none.tokens, none.ranks) == ([-1], [])
