"""Schedules: what a decoding sequence puts into the next pass, and what it commits from the result.

A new schedule is one new file here; the forward, the cache, the sampler and the scheduler are the same for all.
"""

from typing import Protocol

from orthrus.plan import RowGroup
from orthrus.sequence import Sequence


class Schedule(Protocol):
    """Decides for one decoding sequence at a time; it keeps its state between passes in `Sequence.draft` alone.

    max_rows: most rows of a group.
    """

    max_rows: int

    def group(self, sequence: Sequence, batch: int) -> RowGroup:
        """Rows for the next pass; `batch` sequences are decoding. Pages may be missing yet: they follow from the rows."""
        ...

    def commit(self, sequence: Sequence, group: RowGroup, picks: list[int]) -> list[int]:
        """Tokens to commit, given the pick at every row of `group`: row at position p picks the token at p + 1."""
        ...

    def foresees(self, group: RowGroup) -> bool:
        """Whether the group after `group` follows from its picks as they are, without knowing them."""
        ...

    def foresee(self, sequence: Sequence, group: RowGroup, feeds: list[int]) -> None:
        """Go on as if `feeds`, which stand for the picks of `group`, were known; `commit` is called with them later."""
        ...
