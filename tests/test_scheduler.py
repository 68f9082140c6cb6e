"""Whose block tables get pages, and what happens when there are too few."""

from orthrus.cache.page_pool import PagePool
from orthrus.engine.scheduler import Scheduler
from orthrus.plan import RowGroup, View
from orthrus.requests.request import SamplingParams
from orthrus.requests.sequence import SequenceState
from orthrus.schedules.ar import STEP, ARSchedule
from orthrus.schedules.protocol import Turn

PAGE = 4


class TwoBranches(ARSchedule):
    """Decodes by two groups of AR rows, each of which has a block table of its own behind the pages that they share."""

    max_rows = 6

    def __init__(self) -> None:
        self.branch: list[int] = []

    def plan(self, sequence: SequenceState, batch: int) -> Turn:
        n = sequence.newest_position
        self.branch = self.branch or sequence.block_table[: n // PAGE]
        groups = (
            RowGroup(View.AR, [1] * 2, n, sequence.block_table, 0, 2),
            RowGroup(View.AR, [1] * 6, n, self.branch, 0, 6),
            RowGroup(View.DIFFUSION, [1] * 40, n, sequence.block_table, 0, 40),
        )
        return Turn(STEP, groups, (False, False, True))


def scheduler(pages: int) -> tuple[Scheduler, PagePool, TwoBranches]:
    pool, schedule = PagePool(pages + 1), TwoBranches()
    return (
        Scheduler(
            schedule, pool, page_size=PAGE, max_num_seqs=4, prefill_chunk=64, decode_rows=64, score_rows=8
        ),
        pool,
        schedule,
    )


def prefilled(tokens: int, pages: int) -> tuple[Scheduler, PagePool, TwoBranches, SequenceState]:
    """A sequence of `tokens` prompt tokens and one more, all of which but the newest are computed."""
    ours, pool, schedule = scheduler(pages)
    sequence = SequenceState("a", 0, SamplingParams(), 0, list(range(tokens)), tokens, 100, frozenset())
    ours.add(sequence)
    ours.plan()
    ours.mark_computed(sequence, tokens)
    sequence.append(7)
    return ours, pool, schedule, sequence


def test_each_block_table_gets_the_pages_that_its_own_rows_write() -> None:
    ours, pool, schedule, sequence = prefilled(6, pages=10)
    assert len(sequence.block_table) == 2
    [part] = ours.plan()
    # Positions 6 and 7 are on the sequence's second page; 6 to 11 take two more pages of the branch.
    assert len(sequence.block_table) == 2
    assert len(schedule.branch) == 3
    assert schedule.branch[0] == sequence.block_table[0]
    assert set(schedule.branch[1:]).isdisjoint(sequence.block_table)
    assert pool.used == 4
    assert part.turn.groups[1].block_table is schedule.branch


def test_a_sequence_whose_branches_do_not_fit_is_preempted() -> None:
    ours, pool, _, _ = prefilled(6, pages=3)
    [part] = ours.plan()
    # It has begun again, from the page that is full of known tokens.
    assert not part.decoding
    assert part.turn.groups[0].start == PAGE
    assert ours.num_preempted == 1
    assert pool.used == 2
