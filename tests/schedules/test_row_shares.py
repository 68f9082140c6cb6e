"""Rows of a pass go to the sequences whose drafts are most likely to be right."""

import random

import pytest

from orthrus.requests.request import SamplingParams
from orthrus.requests.sequence import SequenceState
from orthrus.schedules.decode_cost import DecodeCost
from orthrus.schedules.pass_cost import PassCost
from orthrus.schedules.planner import Draft, DraftPlanner

ROWS, BATCH, CYCLES = 32, 16, 200
SIZES = (8, 16, 32, 48, 64, 128, 256, 512)


def gpu_cost() -> DecodeCost:
    """Roughly one H200's at Qwen3-8B's shape, in milliseconds."""
    rows = (2, 32, 64, 128, 256, 512)
    return DecodeCost(
        step=PassCost((1, 16, 64), (3.9, 4.6, 6.3), filled_to=SIZES),
        draft=PassCost(rows, (2.7, 2.8, 3.1, 4.3, 6.5, 11.0), filled_to=SIZES),
        verify=PassCost(rows, (4.1, 4.2, 4.7, 6.0, 9.0, 15.0), filled_to=SIZES),
    )


def tokens_per_second(agreements: list[float], block_rows: int | None) -> tuple[float, list[float]]:
    """Of a batch whose drafts are right with these chances, after a while: its speed, and the rows of each sequence's blocks.

    block_rows: of all blocks; None lets the planner choose.
    """
    rng, cost = random.Random(1), gpu_cost()
    planner = DraftPlanner(ROWS, cost, 512)
    batch = [
        SequenceState(str(i), 0, SamplingParams(temperature=0.0), 0, [1], 1, 300, frozenset())
        for i in range(len(agreements))
    ]
    rows_of = [0.0] * len(batch)
    tokens, seconds = 0, 0.0
    for cycle in range(CYCLES):
        if block_rows is None:
            blocks = [planner.plan(True, len(batch), sequence=sequence).rows for sequence in batch]
        else:
            blocks = [block_rows] * len(batch)
        spent, committed = cost.cycle(1, sum(blocks), greedy=True), 0
        for sequence, rows, agreement in zip(batch, blocks, agreements, strict=True):
            accepted = [*(rng.random() < agreement for _ in range(rows - 1)), False].index(False)
            planner.observe(True, Draft([0] * (rows - 1)), accepted, sequence)
            committed += accepted + 1
        if cycle >= CYCLES // 4:
            tokens, seconds = tokens + committed, seconds + spent
            rows_of = [total + rows for total, rows in zip(rows_of, blocks, strict=True)]
    return tokens / seconds, [total / (CYCLES - CYCLES // 4) for total in rows_of]


def best_common(agreements: list[float]) -> float:
    return max(tokens_per_second(agreements, rows)[0] for rows in (2, 3, 4, 6, 8, 12, 16))


def test_in_a_mixed_batch_easy_texts_have_long_blocks_and_hard_ones_short_ones() -> None:
    # 10.6 and 2.0 tokens per cycle in full blocks.
    agreements = [0.918, 0.5] * (BATCH // 2)
    speed, rows = tokens_per_second(agreements, None)
    assert speed > 1.15 * best_common(agreements)
    assert min(rows[0::2]) > 2.5 * max(rows[1::2])


@pytest.mark.parametrize("agreement", [0.74, 0.918])
def test_where_all_texts_are_alike_nothing_is_lost(agreement: float) -> None:
    agreements = [agreement] * BATCH
    assert tokens_per_second(agreements, None)[0] > 0.97 * best_common(agreements)
