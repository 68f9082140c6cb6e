"""Plain autoregressive decoding: one row in, one token out."""

from collections.abc import Sequence

from orthrus.plan import RowGroup, View
from orthrus.requests.sequence import SequenceState
from orthrus.schedules.protocol import Commit, ScheduleContext, Turn

STEP = "step"


class ARSchedule:
    """The reference: every other schedule must commit exactly these tokens."""

    max_groups = 1
    max_rows = 1
    max_logits = 1

    @classmethod
    def build(cls, context: ScheduleContext) -> "ARSchedule":
        return cls()

    def plan(self, sequence: SequenceState, batch: int) -> Turn:
        return Turn(
            STEP, ar_rows([sequence.newest_token], sequence.newest_position, sequence.block_table), (False,)
        )

    def commit(self, sequence: SequenceState, turn: Turn, picks: Sequence[list[int]]) -> Commit:
        return Commit(picks[0])

    def advance(self, sequence: SequenceState, turn: Turn, placeholders: Sequence[list[int]]) -> list[int]:
        return placeholders[0]


def ar_rows(tokens: Sequence[int], start: int, block_table: list[int], heads: int = 0) -> tuple[RowGroup]:
    """AR rows with logits: `tokens` at positions start, start + 1, ... heads: as in `RowGroup`."""
    return (RowGroup(View.AR, tokens, start, block_table, 0, len(tokens), heads=heads),)
