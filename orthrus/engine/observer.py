"""The records of passes that `Engine.observer` gets. Without an observer, none are made."""

from collections.abc import Callable
from dataclasses import dataclass

from orthrus.schedules.protocol import Turn


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """One sequence's part of a pass."""

    request_id: str
    index: int
    """Which of the request's choices it is."""
    turn: Turn
    """The rows and their meaning. `turn.kind` is "prefill" for rows of a prompt."""
    picks: tuple[list[int], ...]
    """The picks, as in `Schedule.commit`."""
    num_accepted: int
    """How many of the `turn.num_verified` drafts were right."""


@dataclass(frozen=True, slots=True)
class PassRecord:
    """One pass, after its picks have been committed."""

    turns: tuple[TurnRecord, ...]
    """One for each sequence that had picks, and that had not ended while the pass was in flight."""
    num_rows: int
    """Rows of the pass, those of other sequences included."""
    seconds: float
    """Time from its launch, or from the end of the pass before it if that was later, until its picks were read."""
    next_launched_ahead: bool
    """Whether the next pass could be launched before the picks of this one were read."""


Observer = Callable[[PassRecord], None]
"""Called on the engine's thread between passes, so it should be quick."""
