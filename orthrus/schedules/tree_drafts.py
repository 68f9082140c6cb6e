"""Trees of drafts, for the Orthrus schedule: which tree a verify turn gets, and what is learnt from its result.

This is where to begin reading. `tree_chances` counts which candidates have been right and chooses a tree's nodes. `draft_tree`
lays the nodes out as groups of rows, gives them pages, and finds the right path.
"""

from collections.abc import Mapping, Sequence

from orthrus.kernels.rows.types import NO_TOKEN
from orthrus.requests.sequence import SequenceState
from orthrus.schedules.draft_tree import BranchPages, DraftTree, Verified, follow, runs_of
from orthrus.schedules.planner import Draft
from orthrus.schedules.tree_chances import TreeChances
from orthrus.schedules.tree_planner import TreePlanner


class TreeDrafts:
    """Makes a tree of each draft that is to have one, and learns from its result."""

    def __init__(self, pages: BranchPages, chances: Mapping[bool, TreeChances], planner: TreePlanner) -> None:
        """chances: of greedy and of sampled text. They are counted here. planner: knows the same."""
        self.planner = planner
        self._pages = pages
        self._chances = chances

    def open(self, sequence: SequenceState, draft: Draft) -> DraftTree | None:
        """A tree of a draft's candidates, with pages for it; None if one continuation has to do."""
        # A grammar would have to be followed along each branch.
        if sequence.mask is not None or not draft.further or draft.tree_rows < 2:
            return None
        nodes = self._chances[sequence.params.greedy].tree(draft.tree_rows - 1, len(draft.tokens))
        # Where filters leave few tokens, a row has fewer candidates than ranks.
        missing = {
            (depth, rank)
            for rank, tokens in enumerate(draft.further, 1)
            for depth, token in enumerate(tokens)
            if token == NO_TOKEN
        }
        runs = runs_of(nodes, sequence.newest_position, self._pages.page_size, missing)
        return self._pages.open(sequence, runs) if len(runs) > 1 else None

    def observe(self, greedy: bool, draft: Draft, picks: Sequence[int], accepted: int) -> None:
        """Learn from a draft that was verified as one continuation. picks: its rows'."""
        chances = self._chances[greedy]
        for depth in range(accepted):
            chances.observe(depth, True, 0)
        if accepted < len(draft.tokens):
            others = [tokens[accepted] for tokens in draft.further]
            pick = picks[accepted]
            chances.observe(accepted, True, others.index(pick) + 1 if pick in others else None)

    def commit(self, sequence: SequenceState, draft: Draft, picks: Sequence[list[int]]) -> Verified:
        """What the picks say of a draft's tree. The pages of the right drafts become the sequence's own."""
        tree, greedy = draft.tree, sequence.params.greedy
        assert tree is not None
        verified = follow(tree.runs, draft.candidates, picks)
        self._pages.close(sequence, tree.tables[verified.run])
        chances, on_chain = self._chances[greedy], True
        for depth, rank in enumerate(verified.ranks):
            chances.observe(depth, on_chain, rank)
            on_chain = on_chain and rank == 0
        return verified
