"""What the engine asks of a schedule: a `Turn` for each decoding sequence in each pass, and the tokens that come of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, NamedTuple, Protocol

from orthrus.plan import RowGroup
from orthrus.requests.sequence import SequenceState

if TYPE_CHECKING:
    from orthrus.cache.kv_cache import KVCache
    from orthrus.cache.page_pool import PagePool
    from orthrus.engine.config import EngineConfig
    from orthrus.models.config import ModelConfig
    from orthrus.schedules.pass_cost import PassTimer
    from orthrus.schedules.registry import ScheduleEntry


@dataclass(slots=True)
class Turn:
    """What one sequence does in one pass, and what that means. The schedule makes it and gets it back in `commit`."""

    kind: str
    """The sort of turn, such as "draft". Observers and cost models tell turns apart by it; the engine does not read it."""
    groups: tuple[RowGroup, ...]
    """The rows, in at least one group. The sequence may still lack pages for them: the scheduler allocates these."""
    drafting: tuple[bool, ...]
    """For each group, whether its picks are drafts.

    False: the tokens that AR decoding picks, if the tokens of the group are right. Row i is picked for on top of the group's
    tokens 0 to i. True: drafts, which a later turn verifies. Row i is picked for on top of the picks of rows 0 to i - 1.
    """
    ranks: int = 1
    """How many tokens the rows of drafting groups pick, the best first: see `Schedule.commit`. Behind the best token, a
    runner may search only a part of the vocabulary."""
    ends_cycle: bool = True
    """Whether a cycle ends when this turn is committed. Tokens per cycle counts these turns."""
    num_verified: int = 0
    """How many of the rows' tokens are drafts that this turn verifies."""
    can_advance: bool = True
    """Whether the next turn can be planned while this turn's picks are unknown: `Schedule.advance` then does it."""


class Commit(NamedTuple):
    """What came of a turn."""

    tokens: list[int]
    """Tokens to append to the sequence, in order: those that AR decoding picks.

    With t of them, the turn must have had AR rows at positions n to n + t - 1, whose tokens are x_n and the first t - 1 of these:
    the engine takes these positions of the cache as final.
    """
    num_accepted: int = 0
    """How many of the turn's drafts turned out to be right."""
    rows: Sequence[int] | None = None
    """For each token, which of the turn's rows with logits, counted over all groups, it was picked at. None: the first ones."""
    drafts: Sequence[int] = ()
    """The drafts as one line. Of a block, all that were verified. Of a tree, the right ones, and then the chain's further drafts
    if the right ones are on the chain."""


@dataclass(frozen=True)
class ScheduleContext:
    """What a schedule is built from."""

    config: "EngineConfig"
    model: "ModelConfig"
    max_model_len: int
    """Context limit in tokens."""
    max_pass_rows: int
    """Most rows of all decoding sequences together in one pass."""
    mixes_views: bool
    """Whether a pass may have rows of both views. Else each group of a turn must be of the same view."""
    pool: "PagePool"
    """Pages of the cache. A schedule may take some that are to spare, for as long as they are in `SequenceState.branches`."""
    cache: "KVCache"
    """The cache, to copy pages before a pass."""
    timer: "PassTimer"
    """Times passes on this machine, before the engine has work."""


class Schedule(Protocol):
    """Decides for one decoding sequence at a time.

    All that it keeps of a sequence between passes is in `SequenceState.schedule_state`, which is None when decoding begins
    and again after a preemption.
    """

    max_groups: int
    """Most groups of a turn."""
    max_rows: int
    """Most positions that a turn writes to the cache."""
    max_logits: int
    """Most rows of a turn that need logits."""

    def plan(self, sequence: SequenceState, batch: int) -> Turn:
        """The sequence's next turn, in a pass in which up to `batch` sequences decode.

        A turn may have to wait for a later pass. Then `plan` is called again, perhaps with another `batch`, and the new turn
        takes the place of the old one. It must be of the same view.
        """
        ...

    def commit(self, sequence: SequenceState, turn: Turn, picks: Sequence[list[int]]) -> Commit:
        """What comes of a turn. picks: a list for each group, with one token for each of its rows that need logits.

        The row at position p picks for p + 1. If `turn.ranks` > 1, a drafting group's list goes on with the second best token of
        every row, then the third.
        """
        ...

    def advance(self, sequence: SequenceState, turn: Turn, placeholders: Sequence[list[int]]) -> list[int]:
        """Get ready to plan the next turn before the picks of `turn`, which can advance, are known.

        placeholders: what stands for the picks, in lists as in `commit`; a row may have one as its token. Returns those in whose
        place `commit`, which is called later, will give tokens.
        """
        ...


class ScheduleFactory(Protocol):
    """What the registry names: the schedule's class, with `build` as a class method."""

    max_groups: int
    """Most groups of a turn. Runners lay out memory for so many."""

    def build(self, context: ScheduleContext) -> Schedule:
        """The schedule for one engine. Called once the engine can run passes, and before it has work."""
        ...


def load_schedule(entry: "ScheduleEntry") -> ScheduleFactory:
    """Import the class that an entry of the registry names."""
    factory: ScheduleFactory = resolve_name(entry.factory)
    return factory
