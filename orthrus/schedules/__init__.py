"""Schedules: what a decoding sequence puts into the next pass, and what it commits from the result.

A new schedule is one new file here; the forward, the cache, the sampler and the scheduler are the same for all.
"""

from typing import Protocol

from orthrus.plan import RowGroup
from orthrus.requests.sequence import Sequence


class Schedule(Protocol):
    """Decides for one decoding sequence at a time; it keeps its state between passes in `Sequence.draft` alone.

    max_rows: most positions that a pass writes to the cache for a sequence.
    """

    max_rows: int

    def groups(self, sequence: Sequence, batch: int) -> tuple[RowGroup, ...]:
        """Rows for the next pass; `batch` sequences are decoding. Pages may be missing yet: they follow from the rows."""
        ...

    def commit(self, sequence: Sequence, groups: tuple[RowGroup, ...], picks: list[list[int]]) -> list[int]:
        """Tokens to commit, given the picks of each group: a row at position p picks the token at p + 1."""
        ...

    def foresees(self, groups: tuple[RowGroup, ...]) -> bool:
        """Whether what follows `groups` is known before their picks are, but for its tokens."""
        ...

    def foresee(self, sequence: Sequence, groups: tuple[RowGroup, ...], feeds: list[list[int]]) -> None:
        """Go on as if `feeds`, which stand for the picks of `groups`, were known; `commit` is called with them later."""
        ...
