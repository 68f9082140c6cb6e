"""Orthrus' two-pass cycle (arXiv 2605.12825, section 3): a diffusion pass drafts a block, an AR pass verifies it.

Let x_n be the newest token, at position n.

- The *draft* turn has diffusion rows [x_n, MASK, ..., MASK] at positions n, n + 1, ... Each row predicts the token after it.
  The last row's prediction would not fit the verify turn, so its logits are not computed.
- The *verify* turn has AR rows [x_n, drafts]. The drafts up to the first wrong one are committed, and then the AR view's own
  pick after them.

A draft turn may have a *lead*: the AR row of x_n, beside the block. Its pick is exactly x_n+1 and is committed at once, so each
cycle commits at least two tokens. The price is to read the AR view's attention weights in the draft pass too. The verify turn
then starts from x_n+1, and the prediction of the block's last row is of use.

Where the next block begins depends on the picks of the verify turn. A block without a lead is planned before these are known: its
group comes behind `Verifying` drafts, and the device finds out which of them are right.

A verify turn may have a *tree* of drafts: several continuations, made of the best few tokens of each position. Each run of drafts
is one group of rows. A run that branches off from another one has pages of its own from there on.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from orthrus.kernels.rows.types import NO_TOKEN
from orthrus.loading import stages
from orthrus.plan import MAX_RANKS, RowGroup, Verifying, num_right
from orthrus.requests.sequence import SequenceState
from orthrus.schedules.ar import STEP, ARSchedule, ar_rows
from orthrus.schedules.blocks import DRAFT, LEAD_DRAFT, VERIFY, draft_rows
from orthrus.schedules.decode_cost import DecodeCost
from orthrus.schedules.draft_tree import MAX_RUNS, BranchPages
from orthrus.schedules.planner import BlockPlan, Draft, DraftPlanner
from orthrus.schedules.protocol import Commit, ScheduleContext, Turn
from orthrus.schedules.row_shares import RowShares
from orthrus.schedules.tree_chances import TreeChances
from orthrus.schedules.tree_drafts import TreeDrafts
from orthrus.schedules.tree_planner import TreePlanner

logger = logging.getLogger(__name__)

_MOST_TREE_ROWS = 64
"""Most rows of a tree with `draft_tree: auto`."""


@dataclass(slots=True)
class _Choice:
    """The block that the planner chose for a sequence. It is kept as long as the turn waits for a pass."""

    position: int
    """Position of the newest token that it was chosen for."""
    block: BlockPlan


@dataclass(slots=True)
class _InFlight:
    """A draft in a verify turn that has been launched."""

    draft: Draft
    verifying: Verifying


class OrthrusSchedule:
    """`planner` chooses the length of each block and whether it has a lead. A block of one row is an AR step.

    `SequenceState.schedule_state` is the `Draft` that waits to be verified. It is `_InFlight` while the verify turn is in flight
    and the next block can be planned. Otherwise it is the `_Choice` of the next block.
    """

    max_groups = MAX_RUNS

    def __init__(
        self,
        planner: DraftPlanner,
        mask_token_id: int,
        max_model_len: int,
        trees: TreeDrafts | None = None,
        shares: RowShares | None = None,
    ) -> None:
        """max_model_len: context limit in tokens. trees: None if drafts are verified as one continuation.

        shares: lengths by sequence; None if `planner` chooses them for all sequences of a pass together.
        """
        self._shares = shares
        self.max_rows = planner.max_rows
        # The rows of a block and its lead, or of a tree.
        self.max_logits = max(planner.max_rows + 1, trees.planner.max_rows if trees is not None else 0)
        self._trees = trees
        self._planner = planner
        self._mask = mask_token_id
        self._max_model_len = max_model_len
        self._ar = ARSchedule()

    @classmethod
    def build(cls, context: ScheduleContext) -> "OrthrusSchedule":
        return cls.with_cost(context, cls.measured_cost(context))

    @staticmethod
    def measured_cost(context: ScheduleContext) -> DecodeCost | None:
        """What passes cost on this machine; None if the settings fix the blocks, or no block fits."""
        config, mask = context.config, context.model.mask_token_id
        assert mask is not None, "the registry asks for diffusion"
        if not config.adaptive_draft or context.max_model_len <= 2:
            return None
        stages.info("measuring what passes cost")
        cost = DecodeCost.measured(
            context.timer, mask, leads=context.mixes_views, trees=_most_tree_rows(context) > 1
        )
        logger.info("decode cost: %s", cost)
        context.watch(cost.observe)
        return cost

    @classmethod
    def with_cost(cls, context: ScheduleContext, cost: DecodeCost | None) -> "OrthrusSchedule":
        """As `build`, with these costs of passes. cost: None makes blocks as long as possible."""
        config, model = context.config, context.model
        assert model.block_size is not None and model.mask_token_id is not None, (
            "the registry asks for diffusion"
        )
        block_rows = config.draft_length or model.block_size
        trees = None
        if (tree_rows := _most_tree_rows(context)) > 1:
            chances = {greedy: TreeChances(block_rows, MAX_RANKS) for greedy in (True, False)}
            tree_planner = TreePlanner(
                chances,
                cost,
                max_rows=tree_rows,
                block_rows=block_rows,
                pass_rows=context.max_pass_rows,
            )
            trees = TreeDrafts(BranchPages(context.pool, context.page_size), chances, tree_planner)
        planner = DraftPlanner(
            block_rows,
            cost,
            context.max_pass_rows,
            config.draft_lead if context.mixes_views else False,
        )
        shares = RowShares(cost, block_rows, context.max_pass_rows) if cost is not None else None
        return cls(planner, model.mask_token_id, context.max_model_len, trees, shares)

    def plan(self, sequence: SequenceState, batch: int) -> Turn:
        n, block_table = sequence.newest_position, sequence.block_table
        if isinstance(draft := sequence.schedule_state, Draft):
            tokens = [sequence.newest_token, *draft.tokens]
            if len(tokens) == 1:
                return self._ar.plan(sequence, batch)
            groups: tuple[RowGroup, ...] = ar_rows(tokens, n, block_table)
            if draft.tree is None and self._trees is not None:
                draft.tree = self._trees.open(sequence, draft)
            if draft.tree is not None:
                groups = draft.tree.groups(draft.candidates, sequence.newest_token, n)
            return Turn(
                VERIFY,
                groups,
                (False,) * len(groups),
                num_verified=sum(len(group.tokens) for group in groups) - 1,
                can_advance=self._plan_following(sequence, draft, batch),
            )
        if isinstance(state := sequence.schedule_state, _InFlight):
            return self._plan_behind(sequence, state)
        # For the last token, a block would take two passes to draft and verify it. An AR step takes one. Where no block could
        # pay, none is chosen, so that no choice has to be kept.
        room = sequence.max_length - n
        if room <= 2 or not self._planner.could_pay(sequence.params.greedy, batch):
            return self._ar.plan(sequence, batch)
        plan = self._choose(sequence, batch)
        # A cycle commits at most as many tokens as the block has rows, and one more with a lead.
        num_rows = min(plan.rows, room - plan.lead)
        if num_rows < 2:
            return self._ar.plan(sequence, batch)
        # No lead under a grammar: it says what may follow x_n, but not yet what may follow the lead's pick.
        lead = plan.lead and sequence.mask is None
        groups = draft_rows(sequence.newest_token, num_rows, n, block_table, self._mask, lead=lead)
        ranks = _ranks(sequence, plan)
        if lead:
            return Turn(LEAD_DRAFT, groups, (False, True), ranks, ends_cycle=False)
        return Turn(DRAFT, groups, (True,), ranks, ends_cycle=False)

    def _plan_following(self, sequence: SequenceState, draft: Draft, batch: int) -> bool:
        """Choose the block to draft behind a draft that is about to be verified.

        Returns whether its turn can be planned before it is known where the block begins.
        """
        greedy, block = sequence.params.greedy, draft.following
        if block is None:
            if not self._planner.pays(greedy, batch):
                return False
            block = self._next_block(sequence, batch)
            draft.following = block
        furthest = sequence.newest_position + len(draft.tokens) + 1
        return block.rows > 1 and not block.lead and furthest + block.rows <= self._max_model_len

    def _plan_behind(self, sequence: SequenceState, state: _InFlight) -> Turn:
        """A draft turn behind the drafts of a verify turn that is in flight."""
        block, verifying = state.draft.following, state.verifying
        assert block is not None
        furthest = sequence.newest_position + verifying.furthest + 1
        table = sequence.block_table
        if (tree := verifying.tree) is not None:
            table = table[: tree.first_page] + list(tree.pages[0])
        [group] = draft_rows(0, block.rows, furthest, table, self._mask, lead=False)
        group.behind = verifying
        return Turn(DRAFT, (group,), (True,), _ranks(sequence, block), ends_cycle=False)

    def _choose(self, sequence: SequenceState, batch: int) -> BlockPlan:
        """The next block. It is kept in the state, since the planner counts its answers and must be asked once for each block."""
        choice, position = sequence.schedule_state, sequence.newest_position
        if not isinstance(choice, _Choice) or choice.position != position:
            block = self._next_block(sequence, batch)
            choice = sequence.schedule_state = _Choice(position, block)
        return choice.block

    def _next_block(self, sequence: SequenceState, batch: int) -> BlockPlan:
        greedy = sequence.params.greedy
        block = self._planner.plan(greedy, batch, begins=sequence.cycles == 0)
        if not self._planner.pays(greedy, batch):
            return block
        if self._shares is not None and not block.lead:
            rows = self._shares.rows(sequence, batch)
            if rows is not None:
                return BlockPlan(rows)
        if self._trees is None or sequence.mask is not None:
            return block
        return self._trees.planner.plan(greedy, batch, block)

    def speed(self, greedy: bool, batch: int) -> float:
        """Expected tokens per second of blocks over those of AR steps, while `batch` sequences decode; 1 if blocks don't pay."""
        return self._planner.speed(greedy, batch)

    def commit(self, sequence: SequenceState, turn: Turn, picks: Sequence[list[int]]) -> Commit:
        if turn.kind in (DRAFT, LEAD_DRAFT):
            return self._commit_draft(sequence, turn, picks)
        drafted = sequence.schedule_state
        if isinstance(drafted, _InFlight):
            drafted = drafted.draft
        if turn.kind == STEP:
            if isinstance(drafted, Draft) and not drafted.tokens:
                sequence.schedule_state = None
            return Commit(picks[0])
        assert isinstance(drafted, Draft), "what a block verifies has been drafted"
        commit_verified = self._commit_chain if drafted.tree is None else self._commit_tree
        commit = commit_verified(sequence, drafted, picks)
        sequence.schedule_state = None
        if drafted.following is not None:
            # The position of the newest token, once these are committed.
            position = len(sequence.tokens) + commit.num_accepted
            sequence.schedule_state = _Choice(position, drafted.following)
        return commit

    def _commit_draft(self, sequence: SequenceState, turn: Turn, picks: Sequence[list[int]]) -> Commit:
        """Keep what a draft turn drafted. Only a lead's pick is committed."""
        planned, draft = sequence.schedule_state, _draft(sequence, turn, picks)
        draft.tokens = _tokens(draft.tokens)
        if isinstance(planned, Draft):  # The verify turn may have been planned already.
            draft.tree, draft.tree_rows, draft.following = planned.tree, planned.tree_rows, planned.following
        sequence.schedule_state = draft
        return Commit(picks[0] if turn.kind == LEAD_DRAFT else [])

    def _commit_chain(self, sequence: SequenceState, drafted: Draft, picks: Sequence[list[int]]) -> Commit:
        """The result of a turn that verified a draft as a chain."""
        accepted = num_right(drafted.tokens, picks[0])
        if self._trees is not None:
            self._trees.observe(sequence.params.greedy, drafted, picks[0], accepted)
        self._learn(sequence, drafted, accepted)
        return Commit(picks[0][: accepted + 1], accepted, drafts=drafted.tokens)

    def _commit_tree(self, sequence: SequenceState, drafted: Draft, picks: Sequence[list[int]]) -> Commit:
        """The result of a turn that verified a tree."""
        assert self._trees is not None and drafted.tree is not None
        verified = self._trees.commit(sequence, drafted, picks)
        right = verified.tokens[:-1]
        # The tree's drafts of rank 0, and how many of them the accepted path begins with.
        chain = drafted.tokens[: drafted.tree.chain_length]
        accepted = num_right(chain[: len(right)], right)
        if chain:
            self._learn(sequence, replace(drafted, tokens=chain), accepted)
        rest = chain[len(right) :] if accepted == len(right) else []
        return Commit(verified.tokens, len(right), verified.rows, [*right, *rest])

    def _learn(self, sequence: SequenceState, draft: Draft, accepted: int) -> None:
        """Count that the first `accepted` tokens of a draft were right, and the next one, if there is one, was wrong."""
        self._planner.observe(sequence.params.greedy, draft, accepted)
        if self._shares is not None:
            self._shares.observe(sequence, len(draft.tokens), accepted)

    def advance(self, sequence: SequenceState, turn: Turn, placeholders: Sequence[list[int]]) -> list[int]:
        if turn.kind == VERIFY:
            draft = sequence.schedule_state
            assert isinstance(draft, Draft), "what a block verifies has been drafted"
            first_pick = -1 - placeholders[0][0]
            verifying = (
                draft.tree.verifying(draft.candidates, first_pick)
                if draft.tree is not None
                else Verifying(draft.tokens, first_pick)
            )
            sequence.schedule_state = _InFlight(draft, verifying)
            return []
        if turn.kind in (DRAFT, LEAD_DRAFT):
            sequence.schedule_state = _draft(sequence, turn, placeholders)
        return [] if turn.kind == DRAFT else placeholders[0]


def _tokens(picks: list[int]) -> list[int]:
    """The picks before the first NO_TOKEN: nothing can be drafted on top of that."""
    return picks[: picks.index(NO_TOKEN)] if NO_TOKEN in picks else picks


def _draft(sequence: SequenceState, turn: Turn, picks: Sequence[list[int]]) -> Draft:
    """What a draft turn drafted. Behind a lead, the block's first pick is of no use: the lead has picked the same position."""
    count, lead = turn.groups[-1].num_logits, turn.kind == LEAD_DRAFT
    first, *further = [
        picks[-1][rank * count + lead : (rank + 1) * count] for rank in range(len(picks[-1]) // count or 1)
    ]
    if turn.groups[-1].behind is not None:
        # When the block was planned, its position was not known. So it may have more drafts than there is room for.
        first = first[: sequence.max_length - sequence.newest_position - 1]
    choice = sequence.schedule_state
    tree_rows = choice.block.tree_rows if isinstance(choice, _Choice) else 0
    return Draft(first, lead, lead and picks[-1][:1] == picks[0], further, tree_rows=tree_rows)


def _ranks(sequence: SequenceState, block: BlockPlan) -> int:
    """How many tokens a draft picks at each row."""
    return MAX_RANKS if block.candidates and sequence.mask is None else 1


def _most_tree_rows(context: ScheduleContext) -> int:
    """Most rows of a tree; 0 if there are none."""
    config = context.config
    if not config.wants_trees:
        return 0
    if config.draft_tree != "auto":
        return config.draft_tree
    # A tree needs several picks for each row, and many rows. Both cost a CPU too much.
    return _MOST_TREE_ROWS if context.picks_ranks else 0
