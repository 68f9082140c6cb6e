"""Trees where they promise more tokens per second than chains, of the size that pays; and what such passes cost."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orthrus.engine import Engine, EngineConfig
from orthrus.engine.observer import PassRecord
from orthrus.kernels.attention.work_list import plan_work, work_size
from orthrus.measure.acceptance import AcceptanceProfile
from orthrus.measure.replay import ReplaySchedule
from orthrus.plan import MORE_SLOTS, View, flatten
from orthrus.requests.request import SamplingParams
from orthrus.runner.pass_buffer import PassBuffer, buffer_size
from orthrus.schedules.blocks import VERIFY
from orthrus.schedules.decode_cost import DecodeCost, tree_shape
from orthrus.schedules.orthrus import OrthrusSchedule
from orthrus.schedules.pass_cost import PassCost
from orthrus.schedules.planner import BlockPlan
from orthrus.schedules.tree_chances import TreeChances
from orthrus.schedules.tree_planner import MOST_SEQUENCES, TreePlanner
from tests.checkpoints import make_checkpoint
from tests.imports import ROOT

FLAT = PassCost((1, 64, 256), (1.0, 1.1, 2.0))
CHAIN = BlockPlan(16)


def learnt(first: float, second: float, depths: int = 31) -> TreeChances:
    """The best token is right with chance `first` after any other, and the second best with chance `second`."""
    chances = TreeChances(depths, 4)
    for off in (0, 1):
        for depth in range(depths):
            chances._tried[off][depth], chances._right[off][depth] = 1.0, [first, second, 0.0, 0.0]
    return chances


def planner(chances: TreeChances, tree: PassCost, **settings: Any) -> TreePlanner:
    fixed = {"max_rows": 64, "block_rows": 32, "pass_rows": 512}
    cost = DecodeCost(FLAT, FLAT, FLAT, tree=tree)
    return TreePlanner({True: chances, False: chances}, cost, **(fixed | settings))


def test_a_tree_where_second_best_tokens_are_often_right_and_rows_are_cheap() -> None:
    plan = planner(learnt(0.7, 0.15), FLAT).plan(True, 1, CHAIN)
    assert plan.tree_rows >= 32 and not plan.lead
    # The block is as long as the tree is deep.
    assert 8 < plan.rows < 32
    # A tree of nothing but a chain would cost more than that chain.
    assert planner(learnt(0.7, 0.0), FLAT).plan(True, 1, CHAIN) == CHAIN
    dear = replace(FLAT, seconds=(2.5, 2.7, 6.0))
    assert planner(learnt(0.7, 0.15), dear).plan(True, 1, CHAIN) == CHAIN


def test_trees_are_smaller_in_a_crowd_and_follow_what_is_learnt() -> None:
    chances = learnt(0.7, 0.15)
    one = planner(chances, PassCost((1, 64, 512), (1.0, 1.1, 6.0)))
    sizes = [one.plan(True, batch, CHAIN).tree_rows for batch in (1, 4, 16)]
    assert sizes[0] > sizes[1] >= sizes[2]
    assert one.plan(True, MOST_SEQUENCES + 1, CHAIN) == CHAIN
    assert one.plan(True, 1, BlockPlan(1)) == BlockPlan(1)
    for _ in range(600):
        for depth in range(31):
            chances.observe(depth, True, 0)
    assert one.plan(True, 1, CHAIN) == CHAIN


def test_trees_have_no_more_rows_than_asked_for_and_than_a_short_block_has_nodes() -> None:
    chances = learnt(0.5, 0.45)
    for rows in (2, 3):
        block = planner(chances, FLAT, block_rows=rows).plan(True, 1, BlockPlan(rows))
        assert block.rows <= rows and 0 < block.tree_rows <= 1 + 4 + 16
    assert planner(chances, FLAT, max_rows=5).plan(True, 1, CHAIN).tree_rows == 5
    assert planner(chances, FLAT, max_rows=40).plan(True, 1, CHAIN).tree_rows == 40
    assert planner(chances, FLAT, max_rows=1).plan(True, 1, CHAIN) == CHAIN


def test_without_costs_all_trees_have_the_rows_that_fit() -> None:
    fixed = TreePlanner({True: learnt(0.5, 0.1)}, None, max_rows=64, block_rows=32, pass_rows=256)
    assert fixed.plan(True, 1, BlockPlan(32, True)) == BlockPlan(32, True, 64, candidates=True)
    assert fixed.plan(True, 8, CHAIN) == BlockPlan(16, False, 32, candidates=True)


@pytest.mark.parametrize("rows", [2, 3, 4, 16, 32, 64, 128])
@pytest.mark.parametrize("page_size", [16, 64])
def test_the_passes_that_are_timed_are_trees(rows: int, page_size: int) -> None:
    table = list(range(1, 256 // page_size + 1))
    groups = tree_shape(page_size).groups(rows, 256 - rows, table)
    assert sum(len(group.tokens) for group in groups) == rows
    assert all(group.parent is groups[0] and group.end <= 256 for group in groups[1:])
    flat = flatten(groups, page_size)
    assert all(group.view is View.AR for group in groups) and flat.num_ar == rows
    # What a pass on a GPU has room for.
    assert len(flat.more_slots) <= MORE_SLOTS * rows
    size = buffer_size(
        max_rows=rows, max_logits=rows, max_work=work_size(rows=rows, programs=33, capacity=4096, pages=80)
    )
    work = plan_work(flat.groups, tile_rows=16, shared=True, programs=33, capacity=4096)
    PassBuffer(size, rows, pinned=False).fill(flat, [], work, num_rows=rows, first_pick=0, wants_logits=False)
    own = {page for group in groups[1:] for page in group.block_table[group.start // page_size :]}
    assert own == {0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("trees") / "model", noise=0.05)


def test_an_engine_that_is_told_costs_grows_trees_where_they_pay(checkpoint: Path) -> None:
    """With replayed drafts whose second best tokens are often right, and with drafts where they never are."""
    config = EngineConfig(model=str(checkpoint), draft_tree=32, kv_cache_tokens=4096, prompt_lookup_max=0)
    engine = Engine.from_pretrained(config)
    context = engine.schedule_context()
    params, prompt = SamplingParams(temperature=0.0, max_tokens=300, ignore_eos=True), list(range(40))
    expected = engine.generate([prompt], params)[0][0].token_ids
    block_rows = engine.model_config.block_size
    assert block_rows is not None
    per_cycle, shares = [], []
    for others in (0.0, 0.25):
        own = OrthrusSchedule.with_cost(context, DecodeCost(FLAT, FLAT, FLAT, tree=FLAT))
        profile = AcceptanceProfile(((0.6, others),), "chain and second best")
        replay = ReplaySchedule(own, engine.model_config.vocab_size, [profile])
        replay.learn(prompt, params, expected)
        engine.use_schedule(replay)
        turns: list[int] = []

        def count(record: PassRecord, turns: list[int] = turns) -> None:
            turns.extend(len(turn.turn.groups) for turn in record.turns if turn.turn.kind == VERIFY)

        engine.observer = count
        for _ in range(3):
            got = engine.generate([prompt], params)[0][0]
            assert got.token_ids == expected
        per_cycle.append(300 / got.stats.cycles)
        late = turns[len(turns) * 2 // 3 :]
        shares.append(sum(groups > 1 for groups in late) / len(late))
    assert shares[0] == 0.0 and shares[1] > 0.9
    assert per_cycle[1] > 1.15 * per_cycle[0]


def test_trees_pay_for_chat_and_chains_where_drafts_are_nearly_always_right() -> None:
    """With the hit rates of orthrus-tiny, scaled to published tokens per cycle, and about an H200's milliseconds."""
    filled = (8, 16, 32, 48, 64, 128, 256, 512)
    rows = (8, 32, 64, 128, 256)
    cost = DecodeCost(
        step=PassCost((1, 4, 16), (3.96, 4.15, 4.69)),
        draft=PassCost(rows, (2.7, 2.87, 3.14, 3.7, 5.3), filled_to=filled),
        verify=PassCost(rows, (4.03, 4.17, 4.38, 5.07, 7.15), filled_to=filled),
        tree=PassCost(rows, (4.08, 4.27, 4.68, 5.6, 7.9), filled_to=filled),
    )
    profile = AcceptanceProfile.read(ROOT / "models/orthrus-tiny/acceptance.json")
    chosen = {}
    for aim in (10.6, 3.84, 2.0):
        chances, scaled = learnt(0.5, 0.0), profile.scaled(aim, 32)
        for off in (0, 1):
            for depth in range(31):
                first, *others = scaled.at(depth)
                # Off the chain the best token is right about half as often.
                chances._right[off][depth] = [first / (1 + off), *others]
        trees = TreePlanner({True: chances}, cost, max_rows=64, block_rows=32, pass_rows=512)
        chosen[aim] = [trees.plan(True, batch, CHAIN).tree_rows for batch in (1, 4, 16)]
    assert chosen[10.6] == [0, 0, 0]
    assert chosen[3.84][0] >= 16
    assert chosen[2.0][0] >= 16 and chosen[2.0][1] >= 8
