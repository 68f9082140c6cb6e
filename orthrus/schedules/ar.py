"""Plain autoregressive decoding: one row in, one token out."""

from orthrus.plan import RowGroup, View
from orthrus.requests.sequence import Sequence


class ARSchedule:
    """The yardstick: every other schedule must commit exactly these tokens."""

    max_rows = 1

    def groups(self, sequence: Sequence, batch: int) -> tuple[RowGroup, ...]:
        return (RowGroup(View.AR, [sequence.newest_token], sequence.newest, sequence.pages, 0, 1),)

    def commit(self, sequence: Sequence, groups: tuple[RowGroup, ...], picks: list[list[int]]) -> list[int]:
        return picks[0]

    def foresees(self, groups: tuple[RowGroup, ...]) -> bool:
        return True

    def foresee(self, sequence: Sequence, groups: tuple[RowGroup, ...], feeds: list[list[int]]) -> None:
        sequence.foreseen += feeds[0]
