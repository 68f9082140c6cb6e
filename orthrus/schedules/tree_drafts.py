"""Trees of drafts, for the Orthrus schedule: which tree a verify turn gets, and what is learnt from its result.

Begin reading about trees here. `tree_chances` counts which candidates have been right, and chooses a tree's nodes. `draft_tree`
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
    """Makes trees of drafts, and learns from the results."""

    def __init__(self, pages: BranchPages, chances: Mapping[bool, TreeChances], planner: TreePlanner) -> None:
        """chances: for greedy text (True) and for sampled text (False). They are counted here, and `planner` reads them."""
        self.planner = planner
        self._pages = pages
        self._chances = chances

    def open(self, sequence: SequenceState, draft: Draft) -> DraftTree | None:
        """A tree of a draft's candidates, with pages for it; None if the draft is to be verified as a chain."""
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
        """Learn from a draft that was verified as a chain. picks: those of its rows."""
        chances = self._chances[greedy]
        for depth in range(accepted):
            chances.observe(depth, True, 0)
        if accepted < len(draft.tokens):
            others = [tokens[accepted] for tokens in draft.further]
            pick = picks[accepted]
            chances.observe(accepted, True, others.index(pick) + 1 if pick in others else None)

    def commit(self, sequence: SequenceState, draft: Draft, picks: Sequence[list[int]]) -> Verified:
        """Find the right path in a draft's tree, and learn from it. The pages of this path become the sequence's own."""
        tree, greedy = draft.tree, sequence.params.greedy
        assert tree is not None
        verified = follow(tree.runs, draft.candidates, picks)
        self._pages.close(sequence, tree.tables[verified.run])
        chances, on_chain = self._chances[greedy], True
        for depth, rank in enumerate(verified.ranks):
            chances.observe(depth, on_chain, rank)
            on_chain = on_chain and rank == 0
        return verified
