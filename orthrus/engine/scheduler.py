"""Continuous batching: who takes part in the next pass, with which rows, on which pages.

Decoding sequences come first, then prompts in chunks, then newcomers while there is room, by priority and then in order of
arrival. A prompt that is to be scored lets others pass while the rows that may score are taken. When pages run out, the last
sequence in that order gives up its own and is computed again later: what it had committed stays, so its text does not
change.
"""

import bisect
import time
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter

from orthrus.cache.page_hash import page_hashes
from orthrus.cache.page_pool import PagePool
from orthrus.plan import RowGroup, View
from orthrus.requests.sequence import Sequence
from orthrus.schedules import Schedule


@dataclass(frozen=True)
class Planned:
    """A sequence's part of a pass. decoding: the schedule's rows; else rows of the prompt, in one group.

    scoring: how many rows, the first of those that need logits, score the prompt token after them.
    """

    sequence: Sequence
    groups: tuple[RowGroup, ...]
    decoding: bool
    scoring: int = 0

    @property
    def num_logits(self) -> int:
        return sum(group.num_logits for group in self.groups)


class Scheduler:
    """Owns the waiting and running sequences, both by `Sequence.turn`, and their pages."""

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
    ) -> None:
        """prefill_chunk, decode_rows: most rows of prompts and of decoding sequences in a pass.

        score_rows: rows of a pass that may score prompts however many sequences decode.
        """
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.admitted = 0
        self._arrived = 0
        self.queue_wait_seconds = 0.0
        self.schedule = schedule
        self.pool = pool
        self._page_size = page_size
        self._max_num_seqs = max_num_seqs
        self._prefill_chunk = prefill_chunk
        self._decode_rows = decode_rows
        self._score_rows = score_rows

    def add(self, sequence: Sequence) -> None:
        self._arrived += 1
        sequence.arrival = self._arrived
        self._queue(sequence)

    def _queue(self, sequence: Sequence) -> None:
        sequence.queued_at = time.monotonic()
        bisect.insort(self.waiting, sequence, key=_turn)

    @property
    def oldest_wait(self) -> float:
        """Seconds that the sequence which has waited longest has waited so far, 0.0 when none waits."""
        # A copy: other threads ask too, while passes go on.
        since = min((sequence.queued_at for sequence in list(self.waiting)), default=None)
        return 0.0 if since is None else time.monotonic() - since

    @property
    def rows_to_prefill(self) -> int:
        """Prompt rows to compute for all unfinished sequences."""
        # Copies: other threads ask too, while passes go on.
        return sum(s.rows_to_prefill for s in (*list(self.running), *list(self.waiting)))

    def row_use(self, planned: Iterable[Planned]) -> float:
        """How full the pass `planned` is, 0 to 1: the fuller of its two row budgets.

        One is `max_num_seqs`, a row for each decoding sequence: what drafts add is elastic, they take what is left over
        and shrink under load. The other is `prefill_chunk`, for prompts.
        """
        decoding = prefill = 0
        for part in planned:
            if part.decoding:
                decoding += 1
            else:
                prefill += len(part.groups[0].tokens)
        return max(decoding / self._max_num_seqs, prefill / self._prefill_chunk)

    def may_preempt(self) -> bool:
        """Whether the next plan may run out of pages."""
        missing = 0
        for sequence in self.running:
            rows = self.schedule.max_rows if sequence.decoding else self._prefill_chunk
            end = min(sequence.computed + rows, sequence.max_length)
            missing += max(0, -(-end // self._page_size) - len(sequence.pages))
        return missing > self.pool.available

    def plan(self) -> list[Planned]:
        """The next pass, empty when there is nothing to do."""
        planned: list[Planned] = []
        budget, decode_budget = self._prefill_chunk, self._decode_rows
        decoding = sum(s.decoding for s in self.running)
        score_budget = self._score_budget(decoding)
        for sequence in list(self.running):
            if sequence.complete or sequence not in self.running:
                continue  # The passes on their way end it, or one before it has taken its pages.
            decodes = sequence.decoding
            if decodes:
                groups = self.schedule.groups(sequence, decoding)
                if _rows(groups) > decode_budget:
                    continue  # Blocks drafted when there were fewer sequences fill the pass: it takes part in the next.
            elif rows := self._rows_that_fit(sequence, budget, score_budget):
                groups = (self._prefill_group(sequence, rows),)
            else:
                continue
            if not self._reserve(sequence, groups):
                continue
            part = Planned(sequence, groups, decodes, 0 if decodes else _scoring(sequence, groups[0]))
            if decodes:
                decode_budget -= _rows(groups)
            else:
                budget -= _rows(groups)
                score_budget -= part.scoring
            planned.append(part)
        return planned + self._newcomers(budget, score_budget)

    def _newcomers(self, budget: int, score_budget: int) -> list[Planned]:
        """Those who begin in this pass, with what the running sequences leave of its rows."""
        planned: list[Planned] = []
        for sequence in list(self.waiting):
            if not budget or len(self.running) >= self._max_num_seqs:
                break
            leader = sequence.leader
            if leader is not None and leader.num_generated == 0 and leader.finish_reason is None:
                if leader.unscored:
                    continue  # Scoring takes many passes, and leaves room in them.
                break  # its prompt's pages are about to be shared
            if sequence.unscored and score_budget <= 0:
                continue  # It keeps its place, and lets those pass that score nothing.
            admitted = self._admit(sequence, budget, score_budget)
            if admitted is None:
                break
            part = Planned(sequence, (admitted,), decoding=False, scoring=_scoring(sequence, admitted))
            budget -= len(admitted.tokens)
            score_budget -= part.scoring
            planned.append(part)
        return planned

    def _score_budget(self, decoding: int) -> int:
        """Rows that may score prompts while `decoding` sequences decode: what these leave of the logits that have room."""
        # A draft pass with a lead needs logits of one row more than a block has.
        taken = decoding * (self.schedule.max_rows + 1)
        return max(0, self._decode_rows - taken) + self._score_rows

    def computed(self, sequence: Sequence, count: int) -> None:
        """Note that `count` more positions of the sequence are final in the cache, or will be after the passes on their way."""
        sequence.computed += count
        self.name_pages(sequence)

    def name_pages(self, sequence: Sequence) -> None:
        """Name the pages that are full of known tokens."""
        full = min(sequence.computed, len(sequence.tokens)) // self._page_size
        if full > len(sequence.hashes):
            known = len(sequence.hashes)
            sequence.hashes = page_hashes(
                sequence.tokens[: full * self._page_size],
                self._page_size,
                sequence.hashes,
                salt=sequence.cache_salt,
            )
            for page, page_hash in zip(sequence.pages[known:full], sequence.hashes[known:], strict=True):
                self.pool.name(page, page_hash)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished or cancelled sequence and free its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages, sequence.hashes = [], []
        sequence.computed, sequence.draft = 0, None

    def _rows_that_fit(self, sequence: Sequence, budget: int, score_budget: int) -> int:
        """How many of a prompt's next rows fit the pass; those before the first unscored one score nothing."""
        if not sequence.unscored:
            return budget
        return min(budget, sequence.unscored.start - sequence.computed + score_budget)

    def _prefill_group(self, sequence: Sequence, rows: int) -> RowGroup:
        """The next rows of a prompt (or of a preempted sequence's tokens).

        Logits are needed for the newest token's row, and from the first row on whose token after it is to be scored.
        """
        start = sequence.computed
        tokens = sequence.tokens[start : start + rows]
        first = sequence.unscored.start if sequence.unscored else len(sequence.tokens) - 1
        return RowGroup(View.AR, tokens, start, sequence.pages, min(first - start, len(tokens)), len(tokens))

    def _reserve(self, sequence: Sequence, groups: tuple[RowGroup, ...]) -> bool:
        """Give the groups' block tables the pages that they lack. False if the sequence itself was preempted for it.

        Where too few pages are free, running sequences are preempted, the last in turn first.
        """
        missing = self._missing_pages(groups)
        while (pages := self.pool.allocate(sum(count for _, count in missing))) is None:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        _append_pages(missing, pages)
        return True

    def _missing_pages(self, groups: Iterable[RowGroup]) -> list[tuple[list[int], int]]:
        """Block tables that are too short for the AR rows of `groups`, each once, and how many pages each lacks."""
        missing: dict[int, tuple[list[int], int]] = {}
        for group in groups:
            table = group.block_table
            lacks = -(-group.end // self._page_size) - len(table)
            _, before = missing.get(id(table), (table, 0))
            if group.view is View.AR and lacks > before:
                missing[id(table)] = table, lacks
        return list(missing.values())

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self._queue(sequence)
        self.preemptions += 1

    def _admit(self, sequence: Sequence, budget: int, score_budget: int) -> RowGroup | None:
        """Start a waiting sequence if its first chunk fits beside the running ones' next pages."""
        # The newest token is always computed, and what is still to be scored: their rows give the logits.
        known = sequence.unscored.start if sequence.unscored else sequence.newest
        hashes = page_hashes(sequence.tokens[:known], self._page_size, salt=sequence.cache_salt)
        sequence.pages = self.pool.match(hashes)
        sequence.computed = len(sequence.pages) * self._page_size
        sequence.hashes = hashes[: len(sequence.pages)]
        rows = self._rows_that_fit(sequence, budget, score_budget)
        group = self._prefill_group(sequence, rows)
        missing = self._missing_pages([group])
        count = sum(lacks for _, lacks in missing)
        fits = rows > 0 and count + len(self.running) <= self.pool.available
        pages = self.pool.allocate(count) if fits else None
        if pages is None:
            self._release(sequence)
            return None
        if sequence.num_generated == 0:
            sequence.cached_tokens = sequence.computed
        _append_pages(missing, pages)
        self.waiting.remove(sequence)
        bisect.insort(self.running, sequence, key=_turn)
        self.admitted += 1
        waited = time.monotonic() - sequence.queued_at
        sequence.queue_seconds += waited
        self.queue_wait_seconds += waited
        return group


_turn = attrgetter("turn")


def _scoring(sequence: Sequence, group: RowGroup) -> int:
    """How many rows of a prompt's group score the token after them."""
    end = group.start + len(group.tokens)
    return max(0, min(end, sequence.unscored.stop) - max(group.start, sequence.unscored.start))


def _append_pages(missing: list[tuple[list[int], int]], pages: list[int]) -> None:
    """Give each block table in `missing` as many of `pages` as it lacks."""
    start = 0
    for block_table, count in missing:
        block_table.extend(pages[start : start + count])
        start += count


def _rows(groups: tuple[RowGroup, ...]) -> int:
    return sum(len(group.tokens) for group in groups)
