"""N-gram drafts (prompt lookup): what followed the newest tokens where they occurred before, in the prompt or in the text.

The last few tokens are looked up in an index of the sequence. What followed them at their last occurrence is the draft, and one
verify turn, [x_n, drafts], checks it as it checks every draft. There is no draft pass and no second model. Answers that quote
their prompt, edited code, and tools' output gain most.

Where the lookup finds nothing, or what it finds does not pay, another schedule makes the turn: *the schedule below*. It takes AR
steps, or Orthrus' turns if the checkpoint has diffusion weights.

How often drafts are right depends on how many tokens match. So each length has counts and a `DraftPlanner` of its own, which
chooses the number of drafts, or that there are none.

While a pass is in flight, the newest token is unknown. Then the tokens before it are looked up. The first token that followed
them is taken for the newest one, and the drafts are the tokens after it. If that first token is wrong, so are the drafts. So
these lookups have counts of their own.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

from orthrus.loading import stages
from orthrus.plan import num_right
from orthrus.requests.sequence import SequenceState
from orthrus.schedules.ar import STEP, ARSchedule, ar_rows
from orthrus.schedules.blocks import VERIFY
from orthrus.schedules.ngram_cost import NgramCost
from orthrus.schedules.ngram_index import NgramIndex
from orthrus.schedules.orthrus import OrthrusSchedule
from orthrus.schedules.pass_cost import PassCost
from orthrus.schedules.planner import Draft, DraftPlanner
from orthrus.schedules.protocol import Commit, Schedule, ScheduleContext, Turn
from orthrus.schedules.registry import NGRAM

logger = logging.getLogger(__name__)

NGRAM_VERIFY = "ngram verify"
"""The newest token and n-gram drafts as AR rows."""
_MOST_ROWS = 32
"""Rows of a verify turn, the newest token's included, where no setting says how many."""
_QUIET_CYCLES, _LOOK_EVERY = 32, 16
"""A lookup can follow a block only if the engine waits for the block's picks. After `_QUIET_CYCLES` cycles without a verified
lookup, it waits in only one cycle of `_LOOK_EVERY`. In the others, the next block is drafted before the host knows the tokens."""
_OTHER_EVERY = 64
"""One in so many drafts that seem worse than a diffusion block is verified nevertheless, in case the text has changed."""


class _Choice(NamedTuple):
    """The result of the lookup at a position. It is kept as long as the turn waits for a pass."""

    position: int
    """Position of the newest token."""
    drafts: Sequence[int] = ()
    """Empty where the schedule below is to make the turn."""
    planner: DraftPlanner | None = None
    """The planner that counts how many drafts were right."""


@dataclass
class _Lookups:
    """The lookups of one sequence. They depend on its tokens alone, so they stay valid after a preemption."""

    index: NgramIndex
    choice: _Choice = field(default_factory=lambda: _Choice(-1))
    has_drafted: bool = False
    """Whether some lookup has been verified."""
    in_cycle: bool = False
    """Whether the schedule below has begun a cycle that it has to end."""
    ahead: list[Turn] = field(default_factory=list)
    """Turns of the schedule below that are in flight and have advanced."""

    @property
    def may_draft(self) -> bool:
        """Whether the next turn may begin a cycle, at a position that is known."""
        return not self.in_cycle and all(turn.kind == STEP for turn in self.ahead)

    def advance(self, turn: Turn) -> None:
        """Note that the schedule below has advanced."""
        self.ahead.append(turn)
        self.in_cycle = not turn.ends_cycle

    def commit(self, turn: Turn) -> None:
        """Note that a turn of the schedule below is over."""
        if self.ahead:
            self.ahead.pop(0)
        else:
            self.in_cycle = not turn.ends_cycle


class NgramSchedule:
    """Looks up drafts for sequences of plain checkpoints. Turns without drafts are AR steps."""

    max_groups = 1

    def __init__(
        self,
        cost: NgramCost | None,
        lengths: range,
        max_rows: int,
        pass_rows: int,
        blocks: OrthrusSchedule | None = None,
    ) -> None:
        """cost: None fixes the number of drafts at `max_rows` - 1, or at what fits a pass. lengths: of the n-grams to look up.

        max_rows: most rows of a verify turn. pass_rows: most rows of all sequences in a pass. blocks: the schedule that drafts
        where lookups do not. Without costs it makes all turns, except for requests that choose the schedule "ngram".
        """
        self.max_rows = max(max_rows, blocks.max_rows if blocks is not None else 0)
        self.max_logits = max(max_rows, blocks.max_logits if blocks is not None else 0)
        self._measured = cost is not None
        self._lengths = lengths
        self._blocks = blocks
        self._ar = ARSchedule()
        # By length of the match, and by whether the newest token is known.
        self._planners = {
            (length, known): DraftPlanner(max_rows, cost, pass_rows, lead=False)
            for length in lengths
            for known in (True, False)
        }
        self._lookups: WeakKeyDictionary[SequenceState, _Lookups] = WeakKeyDictionary()
        self._outdone = 0  # Drafts that seemed worse than a diffusion block.

    @classmethod
    def build(cls, context: ScheduleContext) -> Schedule:
        return cls._build(context)

    @classmethod
    def _build(
        cls, context: ScheduleContext, blocks: OrthrusSchedule | None = None, step: PassCost | None = None
    ) -> "NgramSchedule":
        """blocks: as in `__init__`. step: what AR steps cost, if they have been timed already."""
        config = context.config
        cost = None
        if config.adaptive_draft and context.max_model_len > 2:  # Else no draft fits.
            stages.info("measuring what n-gram drafts cost")
            cost = NgramCost.measured(context.timer, step)
            logger.info("n-gram cost: %s", cost)
        lengths = range(config.prompt_lookup_min, config.prompt_lookup_max + 1)
        return cls(cost, lengths, config.draft_length or _MOST_ROWS, context.max_pass_rows, blocks)

    def plan(self, sequence: SequenceState, batch: int) -> Turn:
        lookups = self._lookups.get(sequence)
        if lookups is None:
            index = NgramIndex(sequence.tokens, self._lengths[0], self._lengths[-1])
            lookups = self._lookups[sequence] = _Lookups(index)
        if lookups.may_draft:
            n = sequence.newest_position
            if lookups.choice.position != n:
                lookups.choice = self._choose(sequence, lookups, batch)
            if drafts := lookups.choice.drafts:
                groups = ar_rows([sequence.newest_token, *drafts], n, sequence.block_table)
                # Where the next cycle begins depends on the picks of this turn.
                return Turn(NGRAM_VERIFY, groups, (False,), num_verified=len(drafts), can_advance=False)
        return self._below(sequence).plan(sequence, batch)

    def _choose(self, sequence: SequenceState, lookups: _Lookups, batch: int) -> _Choice:
        """Look up drafts, and decide whether they pay. Call it once for each position, since the planner counts its answers."""
        n, unknown = sequence.newest_position, len(sequence.placeholders)
        below = self._below(sequence)
        # The last token of the sequence is the verify turn's own pick.
        room = sequence.max_length - n - 2
        if room < 1 or (below is self._blocks and not self._measured):
            return _Choice(n)
        match = lookups.index.match()
        if match is None:
            return _Choice(n)
        planner, greedy = self._planners[match.length, not unknown], sequence.params.greedy
        if self._blocks is not None and below is self._blocks:
            speed = self._blocks.speed(greedy, batch)
            if speed > 1.0 and planner.speed(greedy, batch) <= speed:
                self._outdone += 1
                if self._outdone % _OTHER_EVERY:
                    return _Choice(n)
        block = planner.plan(greedy, batch, begins=not lookups.has_drafted)
        count = min(block.rows - 1, room)
        if count < 1:
            return _Choice(n)
        return _Choice(n, lookups.index.continuation(match, unknown + count)[unknown:], planner)

    def _below(self, sequence: SequenceState) -> OrthrusSchedule | ARSchedule:
        """The schedule that makes the turns without n-gram drafts."""
        if self._blocks is None or sequence.params.schedule == NGRAM:
            return self._ar
        return self._blocks

    def commit(self, sequence: SequenceState, turn: Turn, picks: Sequence[list[int]]) -> Commit:
        lookups = self._lookups[sequence]
        if turn.kind != NGRAM_VERIFY:
            lookups.commit(turn)
            return self._below(sequence).commit(sequence, turn, picks)
        lookups.has_drafted = True
        drafts = turn.groups[0].tokens[1:]
        accepted = num_right(drafts, picks[0])
        planner = lookups.choice.planner
        assert planner is not None, "it has chosen the drafts"
        planner.observe(sequence.params.greedy, Draft(list(drafts)), accepted)
        return Commit(picks[0][: accepted + 1], accepted, drafts=drafts)

    def advance(self, sequence: SequenceState, turn: Turn, placeholders: Sequence[list[int]]) -> list[int]:
        self._lookups[sequence].advance(turn)
        return self._below(sequence).advance(sequence, turn, placeholders)


class OrthrusNgramSchedule(NgramSchedule):
    """Diffusion blocks and n-gram drafts: whichever promises more tokens per second where a cycle begins."""

    max_groups = OrthrusSchedule.max_groups

    def __init__(
        self,
        cost: NgramCost | None,
        lengths: range,
        max_rows: int,
        pass_rows: int,
        blocks: OrthrusSchedule | None,
    ) -> None:
        """See `NgramSchedule`."""
        super().__init__(cost, lengths, max_rows, pass_rows, blocks)
        self._verified = 0  # Verify turns of diffusion blocks planned so far.
        self._looked_up_at = 0  # `_verified` when the last lookup's verify turn was planned.

    @classmethod
    def build(cls, context: ScheduleContext) -> Schedule:
        cost = OrthrusSchedule.measured_cost(context)
        blocks = OrthrusSchedule.with_cost(context, cost)
        if not context.config.prompt_lookup_max:
            return blocks
        return cls._build(context, blocks, None if cost is None else cost.step)

    def plan(self, sequence: SequenceState, batch: int) -> Turn:
        turn = super().plan(sequence, batch)
        if turn.kind == NGRAM_VERIFY:
            self._looked_up_at = self._verified
        elif turn.kind == VERIFY and self._measured:
            quiet = self._verified - self._looked_up_at >= _QUIET_CYCLES * batch
            # Counted over all sequences, because all sequences of a pass have to wait together.
            looks = self._verified // batch % _LOOK_EVERY == 0
            self._verified += 1
            turn.can_advance = turn.can_advance and quiet and not looks
        return turn
