"""Plain autoregressive decoding: one row in, one token out."""

from orthrus.plan import RowGroup, View
from orthrus.sequence import Sequence


class ARSchedule:
    """The yardstick: every other schedule must commit exactly these tokens."""

    max_rows = 1

    def group(self, sequence: Sequence, batch: int) -> RowGroup:
        return RowGroup(View.AR, [sequence.newest_token], sequence.newest, sequence.pages, 0, 1)

    def commit(self, sequence: Sequence, group: RowGroup, picks: list[int]) -> list[int]:
        return picks

    def foresees(self, group: RowGroup) -> bool:
        return True

    def foresee(self, sequence: Sequence, group: RowGroup, feeds: list[int]) -> None:
        sequence.foreseen += feeds
