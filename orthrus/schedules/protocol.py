"""The interface of schedules: a `Turn` for each decoding sequence in each pass, and the tokens that its picks commit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, NamedTuple, Protocol

from orthrus.plan import RowGroup
from orthrus.requests.sequence import SequenceState

if TYPE_CHECKING:
    from orthrus.cache.page_pool import PagePool
    from orthrus.engine.config import EngineConfig
    from orthrus.models.config import ModelConfig
    from orthrus.schedules.pass_cost import PassTimer
    from orthrus.schedules.registry import ScheduleEntry


@dataclass(slots=True)
class Turn:
    """What one sequence does in one pass. The schedule makes it in `plan`, and gets it back in `commit`."""

    kind: str
    """The sort of turn, such as "draft". Observers and cost models tell turns apart by it; the engine does not read it."""
    groups: tuple[RowGroup, ...]
    """The rows, in at least one group. The sequence may still lack pages for them: the scheduler allocates these."""
    drafting: tuple[bool, ...]
    """For each group, whether its picks are drafts.

    False: the picks are the tokens of AR decoding, if the group's tokens are right. The pick of row i follows the group's tokens
    0 to i. True: the picks are drafts, which a later turn verifies. The pick of row i follows the picks of rows 0 to i - 1.
    """
    ranks: int = 1
    """How many tokens each row of a drafting group picks: rank 0 is the best token, rank 1 the next, and so on. See
    `Schedule.commit` for their order."""
    ends_cycle: bool = True
    """Whether a cycle ends when this turn is committed. Tokens per cycle counts these turns."""
    num_verified: int = 0
    """How many of the rows' tokens are drafts that this turn verifies."""
    can_advance: bool = True
    """Whether the next turn can be planned while this turn's picks are unknown: `Schedule.advance` then does it."""


class Commit(NamedTuple):
    """The result of a turn."""

    tokens: list[int]
    """Tokens to append to the sequence, in order: those that AR decoding picks.

    If there are t tokens, the turn must have had AR rows at positions n to n + t - 1 that held x_n and the first t - 1 of these
    tokens. The engine then treats the cache entries of these positions as final.
    """
    num_accepted: int = 0
    """How many of the turn's drafts turned out to be right."""
    rows: Sequence[int] | None = None
    """For each token, the row that picked it: its index among the rows with logits of all groups. None: the first rows."""
    drafts: Sequence[int] = ()
    """The drafts that `return_drafts` reports, as one sequence. For a block, these are all drafts that were verified. For a tree,
    they are the right drafts, and then the rest of its chain (rank 0 throughout), if the chain begins with the right ones."""


@dataclass(frozen=True)
class PassTime:
    """How long a pass took."""

    kind: str
    """The kind of its turns."""
    rows: int
    """Rows of all sequences."""
    groups: int
    """Groups of all sequences. A tree has several."""
    sequences: int
    """Sequences that took part."""
    seconds: float
    """Seconds from the end of the pass before it, or from its launch if that was later."""


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
    """Whether a pass may have rows of both views. If not, all groups of a turn must be of one view."""
    pool: "PagePool"
    """Pages of the cache. A schedule may take up to `pool.spare` pages, and must keep them in `SequenceState.branches`."""
    page_size: int
    """Positions of a page."""
    picks_ranks: bool
    """As in `ModelRunner`: whether rows of drafts pick several tokens (`Turn.ranks`) at almost no cost."""
    medusa_heads: int
    """How many Medusa heads the model has."""
    watch: Callable[[Callable[[PassTime], None]], None]
    """Registers a function that is called after each pass whose turns are of one kind."""
    timer: "PassTimer"
    """Times passes on this machine, before the engine has work."""


class Schedule(Protocol):
    """Decides for one decoding sequence at a time.

    State about a sequence's turns and cache must be in `SequenceState.schedule_state`, which is None when decoding begins and
    again after a preemption. State about its tokens alone may be elsewhere, with a weak reference to the sequence.
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
        replaces the old one. The new turn must use the same view as the old one.
        """
        ...

    def commit(self, sequence: SequenceState, turn: Turn, picks: Sequence[list[int]]) -> Commit:
        """Turn picks into tokens. picks: a list for each group, with one token for each of its rows that need logits.

        The row at position p picks for p + 1. If `turn.ranks` > 1, a drafting group's list goes on with the second best token of
        every row, then the third. If the group has Medusa heads, its list ends with one draft of each head. These drafts are for
        the positions after the pick that follows the last right token.
        """
        ...

    def advance(self, sequence: SequenceState, turn: Turn, placeholders: Sequence[list[int]]) -> list[int]:
        """Get ready to plan the next turn before the picks of `turn` are known. `turn.can_advance` is true.

        All earlier turns have been committed. placeholders: they stand for the picks, in lists as in `commit`. A row of the next
        turn may have one as its token. Returns the placeholders of those tokens that `commit`, called later, will commit.
        """
        ...


class ScheduleFactory(Protocol):
    """What the registry names: the schedule's class, with `build` as a class method."""

    max_groups: int
    """Most groups of a turn. Runners allocate memory for so many."""

    def build(self, context: ScheduleContext) -> Schedule:
        """The schedule for one engine. Called once the engine can run passes, and before it has work."""
        ...


def load_schedule(entry: "ScheduleEntry") -> ScheduleFactory:
    """Import the class that an entry of the registry names."""
    factory: ScheduleFactory = resolve_name(entry.factory)
    return factory
