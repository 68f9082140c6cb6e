"""Divides the rows of a pass among its sequences: more for those whose drafts are right more often.

Of each sequence it counts how often a draft was right if those before it were. A sequence with chance p gains p ** d from its
draft number d. So all drafts are taken that gain at least some least gain, the same for all sequences of a pass. Several least
gains are compared, by the expected tokens over what the passes cost. Sequences with about the same chance make a class, so that
this costs the host little, and it is done once for several passes.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from orthrus.requests.sequence import SequenceState
from orthrus.schedules.decode_cost import CycleCost

_DECAY = 0.97
"""What a sequence's earlier counts are multiplied by at each of its blocks."""
_PRIOR_WEIGHT = 4.0
"""How many drafts the average chance counts as, for a new sequence."""
_CLASSES = tuple(math.exp(-(0.02 * 1.6**step)) for step in range(11, -1, -1))
"""Chances of the classes, ascending: about 0.03 to 0.98."""
_LEAST_GAINS = tuple(0.85**step for step in range(1, 24))
_KEPT_FOR = 4
"""Passes for which shares are used again."""
_MARGIN = 1.03
"""Shares must promise this many times the speed of one length for all."""


@dataclass(slots=True)
class _Counts:
    """Of one sequence's drafts, older ones counting less."""

    tried: float
    """Drafts whose predecessors were all right."""
    right: float


@dataclass(slots=True)
class _Shares:
    """What one batch size has been given."""

    rows: list[int] | None
    """Rows of a block of each class; None if one length for all is about as good."""
    left: int
    """Blocks until this is computed again."""


class RowShares:
    """The lengths of blocks, by sequence."""

    def __init__(self, cost: CycleCost, max_rows: int, pass_rows: int) -> None:
        """max_rows: of a block. pass_rows: of all sequences in a pass."""
        self._cost = cost
        self._max_rows = max_rows
        self._pass_rows = pass_rows
        # For each least gain: rows of a block of each class.
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
        """Rows of the sequence's next block, of `batch` sequences that draft; None if all should have the same number."""
        key = sequence.params.greedy, batch
        shares = self._shares.get(key)
        if shares is None or not shares.left:
            shares = self._shares[key] = _Shares(self._divide(*key), _KEPT_FOR * batch)
        shares.left -= 1
        return None if shares.rows is None else shares.rows[self._class_of(self._counts.get(sequence))]

    def _class_of(self, counts: _Counts | None) -> int:
        counts = counts or self._all
        chance = counts.right / counts.tried
        place = bisect_left(_CLASSES, chance)
        if place == len(_CLASSES) or (place and chance - _CLASSES[place - 1] < _CLASSES[place] - chance):
            place -= 1
        return place

    def _divide(self, greedy: bool, batch: int) -> list[int] | None:
        """The best rows of each class; None if one number for all is about as good."""
        present = [0.0] * len(_CLASSES)
        for sequence, counts in self._counts.items():
            if sequence.params.greedy == greedy and sequence.finish_reason is None:
                present[self._class_of(counts)] += 1
        known = sum(present)
        if batch < 2 or not known:
            return None
        present = [count * batch / known for count in present]
        most = min(self._max_rows, self._pass_rows // batch)
        alike = [[rows] * len(_CLASSES) for rows in range(2, most + 1)]

        def rate(rows: Sequence[int]) -> float:
            return self._rate(rows, present, greedy, batch)

        best = max(self._by_gain, key=rate)
        return best if rate(best) >= _MARGIN * max(map(rate, alike), default=0.0) else None

    def _rate(self, rows: Sequence[int], present: Sequence[float], greedy: bool, batch: int) -> float:
        """Expected tokens per second; 0 where the rows don't fit a pass. present: sequences of each class."""
        total = sum(count * own for count, own in zip(present, rows, strict=True))
        if total > self._pass_rows:
            return 0.0
        tokens = sum(
            count * (1 - chance**own) / (1 - chance)
            for count, own, chance in zip(present, rows, _CLASSES, strict=True)
            if count
        )
        return tokens / self._cost.cycle(math.ceil(total / batch * 8) / 8, batch, greedy)


def _rows(chance: float, least_gain: float) -> int:
    """Rows of a block each of whose drafts, right with this chance, gains so much; at least 2, to go on counting."""
    return 2 if chance < least_gain else 1 + int(math.log(least_gain) / math.log(chance))
