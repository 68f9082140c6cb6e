"""Medusa's cycle (Cai et al., 2024, arXiv 2401.10774): one pass verifies drafts, and its heads draft for the next one.

Let x_n be the newest token, at position n. A turn has AR rows [x_n, drafts]. The drafts up to the first wrong one are committed,
and then the AR view's own pick, as in every schedule. Medusa heads read the hidden state of the row that made that pick. Their
drafts for the positions behind it come with the turn's picks, and are the next turn's drafts: a cycle is one pass. The drafts
are one chain; the paper's trees are not built here. Acceptance is exact, so the text is that of AR decoding.

Where drafts don't pay, turns are AR steps without heads. The first drafts then take a step with heads.
"""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from orthrus.errors import ConfigError
from orthrus.kernels.rows.types import NO_TOKEN
from orthrus.loading import stages
from orthrus.plan import num_right
from orthrus.requests.sequence import SequenceState
from orthrus.schedules.ar import STEP, ARSchedule, ar_rows
from orthrus.schedules.blocks import VERIFY
from orthrus.schedules.decode_cost import step_shape, verify_shape
from orthrus.schedules.one_pass_cost import OnePassCost
from orthrus.schedules.pass_cost import PassShape, PassTimer
from orthrus.schedules.planner import BlockPlan, Draft, DraftPlanner
from orthrus.schedules.protocol import Commit, ScheduleContext, Turn

logger = logging.getLogger(__name__)

MEDUSA_STEP = "medusa step"
"""The newest token alone; heads draft behind it."""
MEDUSA_VERIFY = "medusa verify"
"""The newest token and its drafts; heads draft behind the last right one."""


@dataclass(frozen=True)
class MedusaCost(OnePassCost):
    """Seconds of an AR step, and of a cycle: a verify pass with heads."""

    @staticmethod
    def measured(timer: PassTimer, heads: int) -> "MedusaCost":
        """Time the passes on this machine. heads: how many the model has."""
        plain = verify_shape(ahead=False)
        verify = PassShape(
            VERIFY, lambda rows, start, block_table: ar_rows([0] * rows, start, block_table, heads)
        )
        curves = timer.curves([step_shape(plain), verify])
        return MedusaCost(curves[STEP], curves[VERIFY], timer.sampled_row(plain))

    def cycle(
        self, block_rows: float, batch: int, greedy: bool, lead: bool = False, tree_rows: int = 0
    ) -> float:
        """Seconds of a verify pass of `batch` sequences with `block_rows` rows each, and heads."""
        return self.verify_pass(block_rows * batch, batch, greedy)


@dataclass(frozen=True)
class _Next:
    """What is known of a sequence's next turn."""

    position: int
    """Position of the newest token that it begins with."""
    drafts: list[int]
    """What the heads drafted behind it. Empty if they did not run."""
    block: BlockPlan | None = None
    """The planner's answer for this turn. It is kept, because the planner must be asked only once: it counts its answers."""


class MedusaSchedule:
    """`planner` chooses how many drafts of the heads are verified. It keeps `_Next` as `SequenceState.schedule_state`."""

    max_groups = 1

    def __init__(self, planner: DraftPlanner, heads: int) -> None:
        """heads: how many the model has."""
        self.max_rows = self.max_logits = planner.max_rows
        self._planner, self._heads = planner, heads
        self._ar = ARSchedule()

    @classmethod
    def build(cls, context: ScheduleContext) -> "MedusaSchedule":
        """Raises ConfigError if the model has no heads."""
        heads, config = context.medusa_heads, context.config
        if not heads:
            raise ConfigError(
                f"schedule 'medusa' needs Medusa heads, and {context.model.name} was loaded without any: train some with "
                "`orthrus train medusa`, and set medusa_heads to their folder"
            )
        cost = None
        if config.adaptive_draft and context.max_model_len > 2:  # Else no draft fits.
            stages.info("measuring what passes cost")
            cost = MedusaCost.measured(context.timer, heads)
            logger.info("medusa cost: %s", cost)
        most = min(config.draft_length or heads + 1, heads + 1)
        return cls(DraftPlanner(most, cost, context.max_pass_rows, lead=False), heads)

    def plan(self, sequence: SequenceState, batch: int) -> Turn:
        n = sequence.newest_position
        # The last token of the sequence comes from an AR step.
        room = sequence.max_length - n - 2
        if room < 1:
            return self._ar.plan(sequence, batch)
        state = sequence.schedule_state
        if not isinstance(state, _Next) or state.position != n:
            state = _Next(n, [])
        if state.block is None:
            block = self._planner.plan(sequence.params.greedy, batch, begins=sequence.cycles == 0)
            state = replace(state, block=block)
        sequence.schedule_state = state
        assert state.block is not None
        count = min(state.block.rows - 1, room)
        if count < 1:
            return self._ar.plan(sequence, batch)
        drafts = state.drafts[:count]
        groups = ar_rows([sequence.newest_token, *drafts], n, sequence.block_table, self._heads)
        kind = MEDUSA_VERIFY if drafts else MEDUSA_STEP
        # Where the next turn begins, and what it verifies, is known only when this one's picks are.
        return Turn(kind, groups, (False,), num_verified=len(drafts), can_advance=False)

    def commit(self, sequence: SequenceState, turn: Turn, picks: Sequence[list[int]]) -> Commit:
        if turn.kind == STEP:
            return Commit(picks[0])
        [group], [own] = turn.groups, picks
        rows, of_heads = own[: group.num_logits], own[group.num_logits :]
        drafts = group.tokens[1:]
        accepted = num_right(drafts, rows)
        if drafts:
            self._planner.observe(sequence.params.greedy, Draft(list(drafts)), accepted)
        # A step with heads has made the drafts for the block that the planner had chosen, so this choice still holds.
        asked = (
            sequence.schedule_state.block
            if not drafts and isinstance(sequence.schedule_state, _Next)
            else None
        )
        known = list(itertools.takewhile(lambda token: token != NO_TOKEN, of_heads))
        position = len(sequence.tokens) + accepted  # The newest token's, once these are committed.
        sequence.schedule_state = _Next(position, known, asked)
        return Commit(rows[: accepted + 1], accepted, drafts=drafts)

    def advance(self, sequence: SequenceState, turn: Turn, placeholders: Sequence[list[int]]) -> list[int]:
        return placeholders[0]
