"""Orthrus' two-pass cycle (arXiv 2605.12825, section 3): a diffusion pass drafts a block, an AR pass verifies it.

Let x_n be the newest token, at position n.

- The *draft* turn has diffusion rows [x_n, MASK, ..., MASK] at positions n, n + 1, ... Each row predicts the token after it.
  The last row's prediction would not fit the verify turn, so its logits are not computed.
- The *verify* turn has AR rows [x_n, drafts]. The drafts up to the first wrong one are committed, and then the AR view's own
  pick after them.

A draft turn may have a *lead*: the AR row of x_n, beside the block. Its pick is exactly x_n+1 and is committed at once, so each
cycle commits at least two tokens. The price is to read the AR view's attention weights in the draft pass too. The verify turn
then starts from x_n+1, and the prediction of the block's last row is of use.
"""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from orthrus.kernels.rows.types import NO_TOKEN
from orthrus.loading import stages
from orthrus.requests.sequence import SequenceState
from orthrus.schedules.ar import STEP, ARSchedule, ar_rows
from orthrus.schedules.blocks import DRAFT, LEAD_DRAFT, VERIFY, draft_rows
from orthrus.schedules.decode_cost import DecodeCost
from orthrus.schedules.planner import BlockPlan, Draft, DraftPlanner
from orthrus.schedules.protocol import Commit, ScheduleContext, Turn

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Choice:
    """The block that the planner chose for a sequence. It holds until the turn has taken part in a pass."""

    position: int
    """Of the newest token that it was chosen for."""
    block: BlockPlan


class OrthrusSchedule:
    """`planner` chooses the length of each block and whether it has a lead. A block of one row is an AR step.

    As `SequenceState.schedule_state` it keeps the `Draft` that waits to be verified, or else the `_Choice` of the next block.
    """

    max_groups = 2

    def __init__(self, planner: DraftPlanner, mask_token_id: int) -> None:
        self.max_rows = planner.max_rows
        self.max_logits = planner.max_rows + 1  # A block's and its lead's.
        self._planner = planner
        self._mask = mask_token_id
        self._ar = ARSchedule()

    @classmethod
    def build(cls, context: ScheduleContext) -> "OrthrusSchedule":
        config, model = context.config, context.model
        assert model.block_size is not None and model.mask_token_id is not None, (
            "the registry asks for diffusion"
        )
        cost = None
        if config.adaptive_draft and context.max_model_len > 2:  # Else no block fits.
            stages.info("measuring what passes cost")
            cost = DecodeCost.measured(context.timer, model.mask_token_id, leads=context.mixes_views)
            logger.info("decode cost: %s", cost)
        planner = DraftPlanner(
            config.draft_length or model.block_size,
            cost,
            context.max_pass_rows,
            config.draft_lead if context.mixes_views else False,
        )
        return cls(planner, model.mask_token_id)

    def plan(self, sequence: SequenceState, batch: int) -> Turn:
        n, block_table = sequence.newest_position, sequence.block_table
        if isinstance(draft := sequence.schedule_state, Draft):
            tokens = [sequence.newest_token, *draft.tokens]
            if len(tokens) == 1:
                return self._ar.plan(sequence, batch)
            # Where the next block begins is known only when this one is verified.
            return Turn(
                VERIFY,
                ar_rows(tokens, n, block_table),
                (False,),
                num_verified=len(draft.tokens),
                can_advance=False,
            )
        # With one token to go, two rows would draft it and verify it: the AR step is one pass.
        room = sequence.max_length - n
        if room <= 2:
            return self._ar.plan(sequence, batch)
        plan = self._choose(sequence, batch)
        # A cycle commits at most as many tokens as the block has rows, and the lead's.
        num_rows = min(plan.rows, room - plan.lead)
        if num_rows < 2:
            return self._ar.plan(sequence, batch)
        # A grammar says what may follow x_n, but not yet what may follow the token after it.
        lead = plan.lead and sequence.mask is None
        groups = draft_rows(sequence.newest_token, num_rows, n, block_table, self._mask, lead=lead)
        if lead:
            return Turn(LEAD_DRAFT, groups, (False, True), ends_cycle=False)
        return Turn(DRAFT, groups, (True,), ends_cycle=False)

    def _choose(self, sequence: SequenceState, batch: int) -> BlockPlan:
        """The next block. The planner counts its answers, so it is asked once for each block."""
        choice, position = sequence.schedule_state, sequence.newest_position
        if not isinstance(choice, _Choice) or choice.position != position:
            block = self._planner.plan(sequence.params.greedy, batch, begins=sequence.cycles == 0)
            choice = sequence.schedule_state = _Choice(position, block)
        return choice.block

    def commit(self, sequence: SequenceState, turn: Turn, picks: Sequence[list[int]]) -> Commit:
        if turn.kind in (DRAFT, LEAD_DRAFT):
            sequence.schedule_state = _draft(turn, [_tokens(group) for group in picks])
            return Commit(picks[0] if turn.kind == LEAD_DRAFT else [])
        draft = sequence.schedule_state
        if turn.kind == STEP:
            if isinstance(draft, Draft) and not draft.tokens:
                sequence.schedule_state = None
            return Commit(picks[0])
        assert isinstance(draft, Draft), "what a block verifies has been drafted"
        sequence.schedule_state = None
        differing = (i for i, (d, p) in enumerate(zip(draft.tokens, picks[0], strict=False)) if d != p)
        accepted = next(differing, len(draft.tokens))
        self._planner.observe(sequence.params.greedy, draft, accepted)
        return Commit(picks[0][: accepted + 1], accepted)

    def advance(self, sequence: SequenceState, turn: Turn, placeholders: Sequence[list[int]]) -> list[int]:
        if turn.kind in (DRAFT, LEAD_DRAFT):
            sequence.schedule_state = _draft(turn, placeholders)
        return [] if turn.kind == DRAFT else placeholders[0]


def _tokens(picks: list[int]) -> list[int]:
    """The picks before the first NO_TOKEN: nothing can be drafted on top of that."""
    return list(itertools.takewhile(lambda token: token != NO_TOKEN, picks))


def _draft(turn: Turn, picks: Sequence[list[int]]) -> Draft:
    """What a draft turn drafted. Behind a lead, the block's first pick is of no use: the lead has picked the same position."""
    if turn.kind == DRAFT:
        return Draft(picks[0])
    lead, block = picks
    return Draft(block[1:], lead=True, first_agreed=block[:1] == lead)
