"""The planner drafts where it pays, and decodes plainly where it doesn't; what it believes of costs is measured."""

import pytest
import torch
from torch import Tensor

from orthrus.draft_planner import DraftPlanner
from orthrus.pass_cost import DecodeCost, PassCost, measure_decode_cost
from orthrus.plan import RowGroup, View


def flat() -> PassCost:
    """Rows are almost free, as where a pass costs one read of the weights."""
    return PassCost((1, 256), (1.0, 1.25))


def dear() -> PassCost:
    """Every row costs as much as the first."""
    return PassCost((1, 256), (1.0, 256.0))


def test_pass_cost_interpolates_and_goes_on_in_proportion() -> None:
    cost = PassCost((2, 4, 8), (1.0, 2.0, 6.0), per_group=0.5)
    assert [cost(1), cost(2), cost(3), cost(6), cost(8), cost(16)] == [1.0, 1.0, 1.5, 4.0, 6.0, 12.0]
    assert cost(4, groups=3) == 3.0


def test_long_blocks_where_rows_are_free_and_none_where_they_are_dear() -> None:
    free, costly = (DraftPlanner(16, DecodeCost(c(), c(), c())) for c in (flat, dear))
    for planner in (free, costly):
        for _ in range(400):
            planner.observe(True, 15, 6)
    # Six drafts were always accepted and the seventh never: the block is they and the token before them.
    assert free.block_rows(True, 1) == 7
    assert {costly.block_rows(True, 1) for _ in range(100)} == {1}


def test_where_plain_decoding_wins_a_draft_now_and_then_looks_again() -> None:
    planner = DraftPlanner(8, DecodeCost(flat(), flat(), flat()))
    for _ in range(200):
        planner.observe(True, 7, 0)
    decisions = [planner.block_rows(True, 1) for _ in range(600)]
    assert 1 <= sum(rows > 1 for rows in decisions) <= 5
    for _ in range(200):
        planner.observe(True, 7, 7)
    assert planner.block_rows(True, 1) == 8


def test_greedy_and_sampled_text_are_counted_apart_and_sampling_has_its_cost() -> None:
    planner = DraftPlanner(8, DecodeCost(flat(), flat(), flat()))
    for _ in range(100):
        planner.observe(False, 7, 0)
    assert planner.block_rows(True, 1) > 1
    assert planner.block_rows(False, 1) == 1
    cost = DecodeCost(flat(), flat(), flat(), sampled_row=0.1)
    assert cost.ar(4, greedy=False) == pytest.approx(flat()(4) + 0.4)
    assert cost.cycle(3, 4, greedy=False) == pytest.approx(2 * flat()(12) + 0.1 * (8 + 12))


def test_measuring_covers_every_kind_of_pass_and_stays_within_the_cache() -> None:
    seen: set[tuple[View, int, int]] = set()

    def run(groups: list[RowGroup]) -> Tensor:
        for group in groups:
            assert group.start >= 0 and group.start + len(group.tokens) <= 40
            assert min(group.pages) >= 1 and max(group.pages) < 11
            assert len(group.pages) * 8 >= group.start + len(group.tokens)
        seen.add((groups[0].view, len(groups[0].tokens), len(groups)))
        return torch.zeros(sum(g.num_logits for g in groups), 50)

    cost = measure_decode_cost(run, context=40, page_size=8, num_pages=11, max_batch=4, mask_token_id=9)
    assert {(View.AR, 1, 1), (View.AR, 1, 4), (View.AR, 16, 1), (View.DIFFUSION, 16, 1)} <= seen
    assert cost.step.sizes == (1, 2, 4) and cost.draft.sizes == cost.verify.sizes == (2, 4, 8, 16, 32)
    assert list(cost.draft.seconds) == sorted(cost.draft.seconds)
