"""Which sequences take part in a pass, with which rows and pages, and what happens if there are too few."""

from typing import Any

from orthrus.cache.page_pool import PagePool
from orthrus.engine.planned_turn import PREFILL
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
    # It has begun again after the page that is full of known tokens.
    assert not part.decoding
    assert part.turn.groups[0].start == PAGE
    assert ours.num_preempted == 1
    assert pool.used == 2


def plain(pages: int = 32, **settings: int) -> Scheduler:
    """A scheduler of AR decoding."""
    limits: dict[str, Any] = {
        "max_num_seqs": 4,
        "prefill_chunk": 8,
        "decode_rows": 64,
        "score_rows": 8,
    } | settings
    return Scheduler(ARSchedule(), PagePool(pages + 1), page_size=PAGE, **limits)


def arrived(
    ours: Scheduler, name: str, tokens: list[int], *, priority: int = 0, first: SequenceState | None = None
) -> SequenceState:
    """A new sequence in the queue."""
    sequence = SequenceState(
        name, 0, SamplingParams(), 0, list(tokens), len(tokens), 100, frozenset(), priority=priority
    )
    sequence.first_choice = first
    ours.add(sequence)
    return sequence


def run_pass(ours: Scheduler) -> list[tuple[str, str, list[int]]]:
    """Plan a pass, and commit token 1 for each sequence with a pick. Returns each part's sequence, kind of turn and tokens."""
    planned = ours.plan()
    for part in planned:
        if not part.decoding:
            ours.mark_computed(part.sequence, part.num_rows)
        if part.num_logits:
            part.sequence.append(1)
        if part.decoding:
            ours.mark_computed(part.sequence, 1)
    return [(part.sequence.request_id, part.turn.kind, list(part.turn.groups[0].tokens)) for part in planned]


def test_a_prompt_is_computed_in_chunks_and_then_decodes() -> None:
    ours = plain()
    sequence = arrived(ours, "a", list(range(20)))
    assert ours.rows_to_prefill == 20
    assert run_pass(ours) == [("a", PREFILL, list(range(8)))]
    assert (ours.rows_to_prefill, ours.row_use) == (12, 1.0)
    assert run_pass(ours) == [("a", PREFILL, list(range(8, 16)))]
    assert run_pass(ours) == [("a", PREFILL, list(range(16, 20)))]
    assert (ours.rows_to_prefill, ours.row_use) == (0, 0.5)
    assert run_pass(ours) == [("a", STEP, [1])]
    assert ours.row_use == 1 / 4
    ours.remove(sequence)
    assert ours.plan() == [] and ours.pool.used == 0 and ours.row_use == 0.0


def test_decoding_sequences_come_before_prompts_and_a_chunk_is_shared() -> None:
    ours = plain()
    arrived(ours, "a", [0] * 3)
    run_pass(ours)
    arrived(ours, "b", [0] * 5)
    arrived(ours, "c", [0] * 6)
    assert [(name, kind, len(tokens)) for name, kind, tokens in run_pass(ours)] == [
        ("a", STEP, 1),
        ("b", PREFILL, 5),
        ("c", PREFILL, 3),
    ]
    assert ours.rows_to_prefill == 3


def test_the_lowest_priority_number_begins_first_and_the_highest_is_preempted_first() -> None:
    ours = plain(pages=4, max_num_seqs=2)
    for name, priority in (("late", 2), ("soon", 0), ("next", 1)):
        arrived(ours, name, [0] * 4, priority=priority)
    assert [name for name, *_ in run_pass(ours)] == ["soon", "next"]
    assert [sequence.request_id for sequence in ours.waiting] == ["late"]
    # Each fills its second page; there is none for a third one of "soon".
    for _ in range(4):
        assert [name for name, *_ in run_pass(ours)] == ["soon", "next"]
    assert ours.num_preempted == 0 and not ours.promise_pages()
    assert [name for name, *_ in run_pass(ours)] == ["soon"]
    assert ours.num_preempted == 1
    assert [sequence.request_id for sequence in ours.waiting] == ["next", "late"]
    assert ours.waiting[0].tokens[4:] == [1] * 5, "what it has committed stays"


def test_a_known_prefix_is_not_computed_again() -> None:
    ours = plain()
    first = arrived(ours, "a", list(range(6)))
    other = arrived(ours, "b", list(range(6)), first=first)
    assert [name for name, *_ in run_pass(ours)] == ["a"], "another choice waits for the first one's pages"
    assert run_pass(ours)[1] == ("b", PREFILL, [4, 5])
    assert other.num_cached == PAGE
    assert other.block_table[0] == first.block_table[0]


def test_rows_of_waiting_sequences_are_counted_until_these_are_admitted_or_cancelled() -> None:
    ours = plain(max_num_seqs=1)
    sequences = [arrived(ours, name, [0] * 4) for name in "abc"]
    assert ours.rows_to_prefill == 12 and ours.oldest_queued_at == sequences[0].queued_at
    run_pass(ours)
    assert ours.rows_to_prefill == 8
    ours.remove(sequences[2])
    assert ours.rows_to_prefill == 4
    ours.remove(sequences[0])
    run_pass(ours)
    assert (ours.rows_to_prefill, ours.oldest_queued_at, ours.num_admitted) == (0, None, 2)
    assert ours.queue_wait_seconds == sum(s.queue_seconds for s in sequences) > 0.0


def test_branches_of_a_sequence_are_given_back_with_it_and_leave_it_the_pages_that_it_needs() -> None:
    ours, pool, _, sequence = prefilled(6, pages=10)

    def branch() -> None:
        sequence.branches.append(pool.allocate(1) or [])

    branch()
    assert pool.used == 3
    # Up to 6 rows from position 6 on: the block table may lack a page, which is not to spare.
    taken = pool.allocate(pool.available - 2) or []
    assert ours.promise_pages()
    assert pool.spare == 1
    taken += pool.allocate(1) or []
    assert ours.promise_pages()
    assert pool.spare == 0
    more = pool.allocate(1) or []
    assert not ours.promise_pages()
    pool.release(taken + more)
    ours._preempt(sequence)
    assert (pool.used, sequence.branches) == (0, [])
    ours.plan()
    branch()
    ours.remove(sequence)
    assert (pool.used, ours.rows_to_prefill) == (0, 0)
