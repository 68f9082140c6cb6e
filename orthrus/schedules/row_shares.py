"""How many rows of a pass each sequence's block gets, where texts draft differently well.

A block's row is worth the chance that its draft is accepted, which falls with the depth. A pass of given cost commits most tokens
if its rows go to the likeliest drafts of all its sequences together. So there is one *price*, a chance, and each sequence drafts
as far as its own chances are no lower. The price is that of the pass which commits the most tokens per second.

Chances are counted for each sequence by itself. What they are before it has been seen is what the planner knows of all texts.
"""

import heapq
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np

from orthrus.requests.sequence import SequenceState

_DECAY = 0.95
"""What a sequence's earlier count is multiplied by at each observation at the same depth."""
_PRIOR_WEIGHT = 6.0
"""How many observations of the sequence itself what is known of all texts counts as."""
_FEWEST = 2
"""Fewest rows of a block, so that it still shows how well the text drafts."""


class _Counts:
    """How often a sequence's draft at each depth was right if all before it were, with older observations counting less."""

    def __init__(self, depths: int) -> None:
        self.tried, self.right = np.zeros(depths), np.zeros(depths)
        self.asked = 0
        """Number of the last question about this sequence, counted over all sequences."""

    def observe(self, drafted: int, accepted: int) -> None:
        seen = min(drafted, accepted + 1)
        self.tried[:seen] = self.tried[:seen] * _DECAY + 1
        self.right[:seen] *= _DECAY
        self.right[:accepted] += 1

    def reach(self, known: np.ndarray) -> np.ndarray:
        """The chance that the draft at each depth is accepted. known: of all texts, as `RowShares.rows` has it."""
        return np.cumprod((self.right + _PRIOR_WEIGHT * known) / (self.tried + _PRIOR_WEIGHT))


class RowShares:
    """Chooses the length of each block of a pass of several sequences."""

    def __init__(self, depths: int) -> None:
        """depths: most drafts of a block."""
        self._depths = depths
        self._counts: WeakKeyDictionary[SequenceState, _Counts] = WeakKeyDictionary()
        self._asked = 0
        # By (greedy, batch), until the next observation: all sequences of a pass ask for the same.
        self._prices: dict[tuple[bool, int], float] = {}

    def observe(self, sequence: SequenceState, drafted: int, accepted: int) -> None:
        """Note that the first `accepted` of a sequence's `drafted` tokens were right."""
        self._prices.clear()
        self._of(sequence).observe(drafted, accepted)

    def rows(
        self, sequence: SequenceState, batch: int, known: Sequence[float], cycles: Sequence[float]
    ) -> int:
        """Rows of the sequence's next block while `batch` sequences decode.

        known: at each depth, the chance that a draft is right if all before it are, whatever the text. cycles: seconds of cycles
        in which all sequences have blocks of 2, 3, ... rows.
        """
        counts, chances = self._of(sequence), np.array(known)
        self._asked += 1
        counts.asked = self._asked
        key = sequence.params.greedy, batch
        if key not in self._prices:
            self._prices[key] = self._price(batch, chances, np.array(cycles))
        return max(_FEWEST, 1 + int((counts.reach(chances) >= self._prices[key]).sum()))

    def _of(self, sequence: SequenceState) -> _Counts:
        if sequence not in self._counts:
            self._counts[sequence] = _Counts(self._depths)
        return self._counts[sequence]

    def _price(self, batch: int, known: np.ndarray, cycles: np.ndarray) -> float:
        """The chance from which on a row is worth its cost."""
        # Those that asked last are the ones that decode.
        members = heapq.nlargest(batch, self._counts.values(), key=lambda counts: counts.asked)
        reach = np.sort(np.concatenate([counts.reach(known) for counts in members]))[::-1]
        # Drafts of all members in passes that have as many rows as with blocks of 2, 3, ... rows.
        drafts = len(members) * np.arange(1, len(cycles) + 1)
        tokens = len(members) + np.cumsum(reach)[drafts - 1]
        return float(reach[drafts[np.argmax(tokens / cycles)] - 1])
