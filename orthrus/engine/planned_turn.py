"""`PlannedTurn`: one sequence's part of a pass, and `RowBudget`: the rows that are left for further parts."""

from collections.abc import Mapping
from dataclasses import dataclass

from orthrus.plan import View
from orthrus.requests.sequence import SequenceState
from orthrus.schedules.protocol import Turn

PREFILL = "prefill"
"""The kind of turn that computes rows of a prompt, or of a preempted sequence's tokens."""


Turns = Mapping[SequenceState, Turn]
"""The turn of each sequence that decodes."""


@dataclass(slots=True)
class PlannedTurn:
    """One sequence's part of a pass."""

    sequence: SequenceState
    turn: Turn
    num_rows: int
    num_logits: int
    """Rows that need logits."""
    decoding: bool
    """Whether the schedule made the turn; else it is a prefill, with one group."""
    num_scoring: int = 0
    """How many of the rows with logits score the prompt token after them. They come first."""
    num_advanced: int = 0
    """How many placeholders its sequence has taken for this pass's picks."""


@dataclass(slots=True)
class RowBudget:
    """The rows that are left of the pass that is being planned."""

    decode_rows: int
    """Rows for decoding sequences."""
    prompt_rows: int
    score_rows: int
    """Of the prompt rows, those that may score prompt tokens."""

    def take(self, part: PlannedTurn) -> None:
        """Give rows to a part."""
        if part.decoding:
            self.decode_rows -= part.num_rows
        else:
            self.prompt_rows -= part.num_rows
            self.score_rows -= part.num_scoring


def decoding_part(sequence: SequenceState, turn: Turn, budget: RowBudget) -> PlannedTurn | None:
    """A decoding sequence's part of a pass. None if there is no room for it: then the turn waits for the next pass.

    This happens if blocks were drafted while fewer sequences decoded.
    """
    num_rows = num_logits = 0
    for group in turn.groups:  # Nearly always one, for which this is faster than sums.
        num_rows += len(group.tokens)
        num_logits += group.num_logits
    if num_rows > budget.decode_rows:
        return None
    return PlannedTurn(sequence, turn, num_rows, num_logits, decoding=True)


def is_draft(turn: Turn) -> bool:
    """Whether the turn's rows are of the diffusion view. The turn has rows of one view, since passes don't mix views."""
    return turn.groups[0].view is View.DIFFUSION
