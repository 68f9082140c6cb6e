"""Continuous batching: which sequences take part in the next pass, with which rows, on which pages.

Running sequences come first, by priority and then in order of arrival. New ones follow while there is room. Decoding sequences
and prompts have separate row budgets. While all rows that may score prompts are taken, a prompt that is to be scored waits, and
later requests may start before it.

Where drafts have weights of their own, a pass has rows of one view only. Draft turns then have a pass to themselves, and the next
pass takes all other turns. Turns that had to wait are planned again.

When pages run out, the last running sequence in this order is preempted: it gives up its pages, and is computed again later. Its
committed tokens stay, so its text does not change.
"""

import bisect
import time
from collections import OrderedDict
from collections.abc import Sequence
from operator import attrgetter

from orthrus.cache.page_hash import page_hashes
from orthrus.cache.page_pool import PagePool
from orthrus.engine.planned_turn import PREFILL, PlannedTurn, RowBudget, Turns, decoding_part, is_draft
from orthrus.plan import RowGroup, View
from orthrus.requests.sequence import SequenceState
from orthrus.schedules.ar import ARSchedule
from orthrus.schedules.protocol import Schedule, Turn
from orthrus.schedules.registry import AR


class Scheduler:
    """Owns the waiting and the running sequences, both in order of `SequenceState.queue_key`, and their pages."""

    def __init__(
        self,
        schedule: Schedule,
        pool: PagePool,
        *,
        page_size: int,
        max_num_seqs: int,
        prefill_chunk: int,
        decode_rows: int,
        score_rows: int,
        mixes_views: bool = True,
    ) -> None:
        """prefill_chunk, decode_rows: most rows of prompts and of decoding sequences in a pass.

        score_rows: rows of a pass that may score prompts however many sequences decode. mixes_views: whether a pass may have
        rows of both views.
        """
        self.schedule = schedule
        """The engine's schedule. A request may choose plain AR steps instead."""
        self._ar = ARSchedule()
        self.pool = pool
        self.waiting: list[SequenceState] = []
        self.running: list[SequenceState] = []
        self.num_preempted = 0
        """Preemptions so far."""
        self.num_admitted = 0
        """How often a sequence has left the queue so far. A preempted sequence counts each time."""
        self.queue_wait_seconds = 0.0
        """How long these had waited in all."""
        self.row_use = 0.0
        """How full the last planned pass is, 0 to 1: the larger of two shares.

        One is the decoding sequences' share of `max_num_seqs`. Their drafts do not count, since they take rows that are left
        over. The other is the prompt rows' share of `prefill_chunk`.
        """
        self._num_arrived = 0
        # The waiting sequences and their rows to prefill, in the order in which they began to wait.
        self._queued: OrderedDict[SequenceState, int] = OrderedDict()
        self._rows_waiting = 0  # Rows to prefill of waiting sequences.
        # The same of running ones. None after one has left: then `rows_to_prefill` counts them again.
        self._rows_running: int | None = 0
        self._page_size = page_size
        self._max_num_seqs = max_num_seqs
        self._prefill_chunk = prefill_chunk
        self._decode_rows = decode_rows
        self._score_rows = score_rows
        self._mixes_views = mixes_views
        # What `_plans_drafts` returned for the last plan.
        self._drafted: bool | None = False

    def add(self, sequence: SequenceState) -> None:
        """Queue a new sequence."""
        self._num_arrived += 1
        sequence.arrival = self._num_arrived
        self._queue(sequence)

    def remove(self, sequence: SequenceState) -> None:
        """Forget a finished or cancelled sequence and free its pages."""
        if sequence in self._queued:
            self._unqueue(sequence)
        elif sequence in self.running:
            self.running.remove(sequence)
            self._rows_running = None
        self._release(sequence)

    def schedule_of(self, sequence: SequenceState) -> Schedule:
        """The schedule that decodes a sequence."""
        return self._ar if sequence.params.schedule == AR else self.schedule

    @property
    def oldest_queued_at(self) -> float | None:
        """When the sequence that has waited longest began to wait, in monotonic seconds; None when none waits."""
        first = next(iter(self._queued), None)
        return None if first is None else first.queued_at

    @property
    def rows_to_prefill(self) -> int:
        """Prompt rows that are still to be computed, after the planned pass, for all unfinished sequences."""
        if self._rows_running is None:
            self._rows_running = sum([sequence.rows_to_prefill for sequence in self.running])
        return self._rows_waiting + self._rows_running

    def promise_pages(self) -> bool:
        """Keep free pages for all that the next plan may need (`pool.promised`). False if there are too few: it may preempt."""
        missing = 0
        for sequence in self.running:
            rows = self.schedule_of(sequence).max_rows if sequence.decoding else self._prefill_chunk
            end = min(sequence.num_computed + rows, sequence.max_length)
            missing += max(0, -(-end // self._page_size) - len(sequence.block_table))
        self.pool.promised = missing
        return missing <= self.pool.available

    def plan(self) -> list[PlannedTurn]:
        """The next pass, empty when there is nothing to do."""
        decoding = [sequence for sequence in self.running if sequence.decoding]
        batch = len(decoding)
        turns = {
            sequence: self.schedule_of(sequence).plan(sequence, batch)
            for sequence in decoding
            if not sequence.complete  # Else the passes in flight end it.
        }
        self._drafted = drafts = self._plans_drafts(turns)
        budget = RowBudget(self._decode_rows, self._prefill_chunk, self._score_budget(batch))
        planned = self._plan_running(turns, budget, drafts)
        if not drafts:
            planned += self._plan_waiting(budget)
        prompt_rows = self._prefill_chunk - budget.prompt_rows
        if drafts:  # Prompts that must wait for the next pass count as if they took part.
            prompt_rows = min(self.rows_to_prefill, self._prefill_chunk)
        self.row_use = max(len(turns) / self._max_num_seqs, prompt_rows / self._prefill_chunk)
        return planned

    def _plan_running(self, turns: Turns, budget: RowBudget, drafts: bool | None) -> list[PlannedTurn]:
        """The parts of running sequences. turns: those of decoding sequences. drafts: what `_plans_drafts` returned."""
        planned: list[PlannedTurn] = []
        preempted = self.num_preempted
        self._rows_running = 0
        for sequence in list(self.running):
            turn, part = turns.get(sequence), None
            if turn is None and sequence.complete:
                continue
            if self.num_preempted > preempted and sequence not in self.running:
                continue  # It was preempted for a sequence before it.
            if turn is None:
                part = None if drafts else self._prefill(sequence, budget)
            elif drafts is None or drafts == is_draft(turn):  # Else it takes part in the next pass.
                part = decoding_part(sequence, turn, budget)
            num_rows = 0
            if part is not None and self._reserve(sequence, part.turn.groups):
                budget.take(part)
                planned.append(part)
                num_rows = part.num_rows
            if turn is None and sequence in self.running:
                self._rows_running += len(sequence.tokens) - sequence.num_computed - num_rows
        return planned

    def _plans_drafts(self, turns: Turns) -> bool | None:
        """Whether the next pass has only draft turns (True), or only others (False). None: it may have both.

        If turns had to wait for a pass of drafts, the next pass is theirs. So none waits for long.
        """
        if self._mixes_views:
            return None
        drafts = [is_draft(turn) for turn in turns.values()]
        return any(drafts) and not (self._drafted and not all(drafts))

    def mark_computed(self, sequence: SequenceState, count: int) -> None:
        """Note that `count` more positions are final in the cache, or will be when the passes in flight are over."""
        sequence.num_computed += count
        self.name_pages(sequence)

    def name_pages(self, sequence: SequenceState) -> None:
        """Name the pages that are full of committed tokens, so that other sequences find them."""
        full = min(sequence.num_computed, len(sequence.tokens)) // self._page_size
        if full > len(sequence.page_hashes):
            known = len(sequence.page_hashes)
            sequence.page_hashes = page_hashes(
                sequence.tokens,
                self._page_size,
                sequence.page_hashes,
                end=full * self._page_size,
                salt=sequence.cache_salt,
            )
            for page, page_hash in zip(
                sequence.block_table[known:full], sequence.page_hashes[known:], strict=True
            ):
                self.pool.name(page, page_hash)

    # --- the queue

    def _queue(self, sequence: SequenceState) -> None:
        sequence.queued_at = time.monotonic()
        bisect.insort(self.waiting, sequence, key=_queue_key)
        self._queued[sequence] = len(sequence.tokens)
        self._rows_waiting += len(sequence.tokens)

    def _unqueue(self, sequence: SequenceState) -> None:
        self.waiting.remove(sequence)
        self._rows_waiting -= self._queued.pop(sequence)

    def _plan_waiting(self, budget: RowBudget) -> list[PlannedTurn]:
        """Start waiting sequences with the rows that the running ones leave, and return their parts."""
        planned: list[PlannedTurn] = []
        for sequence in list(self.waiting):
            if not budget.prompt_rows or len(self.running) >= self._max_num_seqs:
                break
            first = sequence.first_choice
            if first is not None and first.num_generated == 0 and first.finish_reason is None:
                if first.unscored:
                    continue  # Scoring takes many passes, which have room for others.
                break  # Wait for the first choice, to share its pages.
            if sequence.unscored and budget.score_rows <= 0:
                continue  # It keeps its place in the queue. Later requests that score nothing may start.
            part = self._admit(sequence, budget)
            if part is None:
                break
            budget.take(part)
            planned.append(part)
        return planned

    def _admit(self, sequence: SequenceState, budget: RowBudget) -> PlannedTurn | None:
        """Start a waiting sequence, if there are pages for its first chunk and one more for each running sequence."""
        # Rows that need logits are computed even if their pages are cached: the newest token's and those to be scored.
        known = sequence.unscored.start if sequence.unscored else sequence.newest_position
        hashes = page_hashes(sequence.tokens, self._page_size, end=known, salt=sequence.cache_salt)
        sequence.block_table = self.pool.match(hashes)
        sequence.num_computed = len(sequence.block_table) * self._page_size
        sequence.page_hashes = hashes[: len(sequence.block_table)]
        part = self._prefill(sequence, budget)
        pages, missing = None, []
        if part is not None:
            missing = self._missing_pages(part.turn.groups)
            count = sum(lacks for _, lacks in missing)
            # Each running sequence may need a page next.
            if count + len(self.running) <= self.pool.available:
                pages = self.pool.allocate(count)
        if part is None or pages is None:
            self._release(sequence)
            return None
        if sequence.num_generated == 0:
            sequence.num_cached = sequence.num_computed
        _append_pages(missing, pages)
        self._unqueue(sequence)
        bisect.insort(self.running, sequence, key=_queue_key)
        if self._rows_running is not None:
            self._rows_running += len(sequence.tokens) - sequence.num_computed - part.num_rows
        self.num_admitted += 1
        waited = time.monotonic() - sequence.queued_at
        sequence.queue_seconds += waited
        self.queue_wait_seconds += waited
        return part

    # --- prompts

    def _score_budget(self, num_decoding: int) -> int:
        """Rows that may score prompts while `num_decoding` sequences decode: what these leave of the logits' memory."""
        taken = num_decoding * self.schedule.max_logits
        return max(0, self._decode_rows - taken) + self._score_rows

    def _prefill(self, sequence: SequenceState, budget: RowBudget) -> PlannedTurn | None:
        """The next rows of a prompt, or of a preempted sequence's tokens; None if there is no room for any.

        The newest token's row needs logits. So do all rows from the first unscored position on.
        """
        most_rows = budget.prompt_rows
        if sequence.unscored:  # Rows before the first unscored position score nothing.
            most_rows = min(most_rows, sequence.unscored.start - sequence.num_computed + budget.score_rows)
        if most_rows <= 0:
            return None
        start, unscored = sequence.num_computed, sequence.unscored
        tokens = sequence.tokens[start : start + most_rows]
        end = start + len(tokens)
        first = unscored.start if unscored else len(sequence.tokens) - 1
        group = RowGroup(
            View.AR, tokens, start, sequence.block_table, min(first - start, len(tokens)), len(tokens)
        )
        num_scoring = max(0, min(end, unscored.stop) - max(start, unscored.start))
        turn = Turn(PREFILL, (group,), (False,), ends_cycle=False)
        return PlannedTurn(
            sequence, turn, len(tokens), group.num_logits, decoding=False, num_scoring=num_scoring
        )

    # --- pages

    def _reserve(self, sequence: SequenceState, groups: Sequence[RowGroup]) -> bool:
        """Give the groups' block tables the pages that they lack. Returns False if the sequence itself was preempted.

        While too few pages are free, the last running sequence is preempted.
        """
        missing = self._missing_pages(groups)
        if not missing:
            return True
        while (pages := self.pool.allocate(sum(count for _, count in missing))) is None:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        _append_pages(missing, pages)
        return True

    def _missing_pages(self, groups: Sequence[RowGroup]) -> list[tuple[list[int], int]]:
        """Block tables that are too short for the AR rows of `groups`, each once, and how many pages each lacks."""
        missing: dict[int, tuple[list[int], int]] = {}
        for group in groups:
            if group.view is not View.AR:
                continue
            table = group.block_table
            lacks = -(-group.end // self._page_size) - len(table)
            if lacks > 0 and lacks > missing.get(id(table), (table, 0))[1]:
                missing[id(table)] = table, lacks
        return list(missing.values())

    def _preempt(self, sequence: SequenceState) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self._queue(sequence)
        self.num_preempted += 1

    def _release(self, sequence: SequenceState) -> None:
        for block_table in (sequence.block_table, *sequence.branches):
            self.pool.release(block_table)
        sequence.block_table, sequence.branches, sequence.page_hashes = [], [], []
        sequence.num_computed, sequence.schedule_state = 0, None


def _append_pages(missing: list[tuple[list[int], int]], pages: list[int]) -> None:
    """Give each block table in `missing` as many of `pages` as it lacks."""
    start = 0
    for block_table, count in missing:
        block_table.extend(pages[start : start + count])
        start += count


_queue_key = attrgetter("queue_key")
