"""Divides the rows of a pass among its sequences: more for those whose drafts are right more often.

For each sequence it counts how often a draft was right if all drafts before it were. If this chance is p, draft number d of the
sequence gains p ** d tokens. Every draft is taken that gains at least a *least gain*, which is the same for all sequences of a
pass. Several least gains are compared by expected tokens over the cost of the passes.

To save the host's time, sequences with about the same chance make a class, and the result is used for several passes.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from orthrus.requests.sequence import SequenceState
from orthrus.schedules.decode_cost import CycleCost

_DECAY = 0.98
"""What a sequence's earlier counts are multiplied by at each of its blocks."""
_PRIOR_WEIGHT = 4.0
"""How many drafts the average chance counts as, for a new sequence."""
_CLASSES = tuple(math.exp(-(0.02 * 1.4**step)) for step in range(14, -1, -1))
"""Chances of the classes, ascending: about 0.1 to 0.98."""
_LEAST_GAINS = tuple(0.92**step for step in range(1, 40))
_KEPT_FOR = 4
"""Passes for which shares are used again."""
_SPARE = 1.04
"""Passes are planned as if they had so many times the rows, because a pass may have sequences of two divisions. Runners pad
passes to certain sizes, so a few rows too many could cost as much as twice the rows."""
_MARGIN = 1.03
"""Shares must promise this many times the speed of one length for all."""


@dataclass(slots=True)
class _Counts:
    """Counts of one sequence's drafts. Older drafts count less."""

    tried: float
    """Drafts whose predecessors were all right."""
    right: float


@dataclass(slots=True)
class _Shares:
    """The division of rows at one batch size."""

    rows: WeakKeyDictionary[SequenceState, int] | None
    """Rows of the sequences' blocks; None if one length for all is about as good. A sequence keeps its rows even if its class
    changes meanwhile, so that the sum of all rows stays as it was chosen."""
    of_others: int
    """Rows of sequences that have come since then."""
    left: int
    """Blocks until this is computed again."""


class RowShares:
    """The lengths of blocks, by sequence."""

    def __init__(self, cost: CycleCost, max_rows: int, pass_rows: int) -> None:
        """max_rows: most rows of a block. pass_rows: most rows of all sequences in a pass."""
        self._cost = cost
        self._max_rows = max_rows
        self._pass_rows = pass_rows
        # For each least gain: the rows of blocks, by class.
        self._by_gain = [[min(max_rows, _rows(chance, gain)) for chance in _CLASSES] for gain in _LEAST_GAINS]
        self._counts: WeakKeyDictionary[SequenceState, _Counts] = WeakKeyDictionary()
        self._all = _Counts(_PRIOR_WEIGHT, 0.75 * _PRIOR_WEIGHT)
        # By (greedy, batch).
        self._shares: dict[tuple[bool, int], _Shares] = {}

    def observe(self, sequence: SequenceState, drafted: int, accepted: int) -> None:
        """Note that the first `accepted` of a block's `drafted` tokens were right."""
        counts = self._counts.get(sequence)
        if counts is None:
            average = self._all.right / self._all.tried
            counts = self._counts[sequence] = _Counts(_PRIOR_WEIGHT, average * _PRIOR_WEIGHT)
        for own in (counts, self._all):
            own.tried = own.tried * _DECAY + min(drafted, accepted + 1)
            own.right = own.right * _DECAY + accepted

    def rows(self, sequence: SequenceState, batch: int) -> int | None:
        """Rows of the sequence's next block while `batch` sequences draft; None if all should have the same number."""
        key = sequence.params.greedy, batch
        shares = self._shares.get(key)
        if shares is None or not shares.left:
            shares = self._shares[key] = self._divide(*key)
        shares.left -= 1
        return None if shares.rows is None else shares.rows.get(sequence, shares.of_others)

    def _class_of(self, counts: _Counts) -> int:
        chance = counts.right / counts.tried
        place = bisect_left(_CLASSES, chance)
        if place == len(_CLASSES) or (place and chance - _CLASSES[place - 1] < _CLASSES[place] - chance):
            place -= 1
        return place

    def _divide(self, greedy: bool, batch: int) -> _Shares:
        """The shares of the sequences that decode, for the next passes."""
        one_length = _Shares(None, 0, _KEPT_FOR * batch)
        classes = {
            sequence: self._class_of(counts)
            for sequence, counts in self._counts.items()
            if sequence.params.greedy == greedy and sequence.finish_reason is None
        }
        if batch < 2 or not classes:
            return one_length
        present = [0.0] * len(_CLASSES)
        for own in classes.values():
            present[own] += batch / len(classes)
        most = min(self._max_rows, self._pass_rows // batch)
        alike = [[rows] * len(_CLASSES) for rows in range(2, most + 1)]

        def rate(rows: Sequence[int], spare: float) -> float:
            return self._rate(rows, present, spare, greedy, batch)

        best = max(self._by_gain, key=lambda rows: rate(rows, _SPARE))
        if rate(best, _SPARE) < _MARGIN * max((rate(rows, 1.0) for rows in alike), default=0.0):
            return one_length
        rows = WeakKeyDictionary({sequence: best[own] for sequence, own in classes.items()})
        return _Shares(rows, best[self._class_of(self._all)], _KEPT_FOR * batch)

    def _rate(
        self, rows: Sequence[int], present: Sequence[float], spare: float, greedy: bool, batch: int
    ) -> float:
        """Expected tokens per second; 0 if the rows, times `spare`, don't fit a pass.

        rows: of a block, by class. present: how many sequences there are, by class.
        """
        total = spare * sum(count * own for count, own in zip(present, rows, strict=True))
        if total > self._pass_rows:
            return 0.0
        tokens = sum(
            count * (1 - chance**own) / (1 - chance)
            for count, own, chance in zip(present, rows, _CLASSES, strict=True)
            if count
        )
        return tokens / self._cost.cycle(total / batch, batch, greedy)


def _rows(chance: float, least_gain: float) -> int:
    """Rows of the longest block whose drafts all gain `least_gain`, if each is right with this chance.

    At least 2: without a draft, nothing would be counted any more.
    """
    return 2 if chance < least_gain else 1 + int(math.log(least_gain) / math.log(chance))
