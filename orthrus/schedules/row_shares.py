"""Divides the rows of a pass among its sequences: more for those whose drafts are right more often.

For each sequence it counts how often a draft was right if all drafts before it were. If this chance is p, draft number d of the
sequence gains p ** d tokens. Every draft is taken that gains at least a *least gain*, which is the same for all sequences of a
pass. Several least gains are compared by expected tokens over the cost of the passes.

To save the host's time, sequences with about the same chance make a class.
"""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple
from weakref import WeakKeyDictionary

from orthrus.requests.sequence import SequenceState
from orthrus.schedules.decode_cost import DecodeCost

_DECAY = 0.98
"""What a sequence's earlier counts are multiplied by at each of its blocks."""
_PRIOR_WEIGHT = 4.0
"""How many drafts the average chance counts as, for a new sequence."""
_CLASSES = tuple(math.exp(-(0.02 * 1.4**step)) for step in range(14, -1, -1))
"""Chances of the classes, ascending: about 0.1 to 0.98."""
_LEAST_GAINS = tuple(0.92**step for step in range(1, 40))
_CHOICES = 64
"""Choices of lengths that are kept, because passes often have sequences of the same classes."""
_MARGIN = 1.03
"""Shares must promise this many times the speed of one length for all."""


@dataclass(slots=True)
class _Counts:
    """Counts of one sequence's drafts. Older drafts count less."""

    tried: float
    """Drafts whose predecessors were all right."""
    right: float


class _Lengths(NamedTuple):
    """Lengths of blocks, by class."""

    rows: list[int]
    tokens: list[float]
    """The expected tokens of a block of so many rows."""

    @staticmethod
    def of(rows: list[int]) -> "_Lengths":
        tokens = [(1 - chance**own) / (1 - chance) for own, chance in zip(rows, _CLASSES, strict=True)]
        return _Lengths(rows, tokens)


@dataclass(slots=True)
class _Shares:
    """The division of rows among a number of sequences."""

    batch: int
    """The number of sequences."""
    rows: WeakKeyDictionary[SequenceState, int] | None
    """Rows of the sequences' blocks; None if one length for all is about as good."""
    of_others: int
    """Rows of sequences of which nothing was counted yet."""


class RowShares:
    """The lengths of blocks, by sequence."""

    def __init__(self, cost: DecodeCost, max_rows: int, pass_rows: int) -> None:
        """max_rows: most rows of a block. pass_rows: most rows of all sequences in a pass."""
        self._cost = cost
        self._max_rows = max_rows
        self._pass_rows = pass_rows
        self._by_gain = [
            _Lengths.of([min(max_rows, _rows(chance, gain)) for chance in _CLASSES]) for gain in _LEAST_GAINS
        ]
        self._alike = [_Lengths.of([rows] * len(_CLASSES)) for rows in range(2, max_rows + 1)]
        self._counts: WeakKeyDictionary[SequenceState, _Counts] = WeakKeyDictionary()
        self._all = _Counts(_PRIOR_WEIGHT, 0.75 * _PRIOR_WEIGHT)
        self._shares: _Shares | None = None
        self._choose = lru_cache(_CHOICES)(self._choose_lengths)

    def observe(self, sequence: SequenceState, drafted: int, accepted: int) -> None:
        """Note that the first `accepted` of a block's `drafted` tokens were right."""
        counts = self._counts.get(sequence)
        if counts is None:
            average = self._all.right / self._all.tried
            counts = self._counts[sequence] = _Counts(_PRIOR_WEIGHT, average * _PRIOR_WEIGHT)
        for own in (counts, self._all):
            own.tried = own.tried * _DECAY + min(drafted, accepted + 1)
            own.right = own.right * _DECAY + accepted
        self._shares = None

    def rows(self, sequence: SequenceState, batch: int) -> int | None:
        """Rows of the sequence's next block while `batch` sequences draft; None if all should have the same number.

        A division counts until a pass has been verified. So the blocks that one pass drafts are of one division, and fill the
        size that the pass is padded to. One row too many could cost as much as twice the rows.
        """
        if self._shares is None or self._shares.batch != batch:
            self._shares = self._divide(batch)
        shares = self._shares
        return None if shares.rows is None else shares.rows.get(sequence, shares.of_others)

    def _class_of(self, counts: _Counts) -> int:
        chance = counts.right / counts.tried
        place = bisect_left(_CLASSES, chance)
        if place == len(_CLASSES) or (place and chance - _CLASSES[place - 1] < _CLASSES[place] - chance):
            place -= 1
        return place

    def _divide(self, batch: int) -> _Shares:
        """The shares of `batch` sequences."""
        classes = {
            sequence: self._class_of(counts)
            for sequence, counts in self._counts.items()
            if sequence.finish_reason is None
        }
        if batch < 2 or not classes:
            return _Shares(batch, None, 0)
        average = self._class_of(self._all)
        others = [average] * (batch - len(classes))
        counted = Counter([*classes.values(), *others])
        greedy = all(sequence.params.greedy for sequence in classes)
        lengths = self._choose(tuple(sorted(counted.items())), greedy, batch, self._cost.version)
        if lengths is None:
            return _Shares(batch, None, 0)
        rows = WeakKeyDictionary({sequence: lengths.rows[place] for sequence, place in classes.items()})
        return _Shares(batch, rows, lengths.rows[average])

    def _choose_lengths(
        self, counted: Sequence[tuple[int, int]], greedy: bool, batch: int, version: int
    ) -> _Lengths | None:
        """The lengths that promise most, or None if one length for all is about as good.

        counted: classes, each with the number of its sequences. These are `batch` together, or more if some of them wait.
        version: of the costs; the result is kept for this version.
        """
        share = batch / sum([count for _, count in counted])
        present = [(place, count * share) for place, count in counted]
        alike, _ = self._best(self._alike, present, greedy, batch)
        rate, best = self._best(self._by_gain, present, greedy, batch)
        return best if rate > _MARGIN * alike else None

    def _best(
        self, choices: Sequence[_Lengths], present: Sequence[tuple[int, float]], greedy: bool, batch: int
    ) -> tuple[float, _Lengths | None]:
        """The most expected tokens per second, and the lengths that give them; 0 and None if none of them fit a pass.

        present: classes, each with how many sequences there are.
        """
        # Passes that are padded to the same size cost about the same. So only the most tokens of each size count.
        most: dict[float, tuple[float, float, _Lengths]] = {}
        for lengths in choices:
            total = sum([count * lengths.rows[own] for own, count in present])
            if total <= self._pass_rows:
                tokens = sum([count * lengths.tokens[own] for own, count in present])
                padded = self._cost.verify.padded(total)
                if padded not in most or tokens > most[padded][0]:
                    most[padded] = tokens, total, lengths
        found: tuple[float, _Lengths | None] = 0.0, None
        for tokens, total, lengths in most.values():
            rate = tokens / self._cost.cycle(total / batch, batch, greedy)
            if rate > found[0]:
                found = rate, lengths
        return found


def _rows(chance: float, least_gain: float) -> int:
    """Rows of the longest block whose drafts all gain `least_gain`, if each is right with this chance.

    At least 2: without a draft, nothing would be counted any more.
    """
    return 2 if chance < least_gain else 1 + int(math.log(least_gain) / math.log(chance))
