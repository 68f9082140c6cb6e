"""Trees of drafts, for the Orthrus schedule: which tree a verify turn gets, and what is learnt from its result.

This is where to begin reading. `tree_chances` counts which candidates have been right and chooses a tree's nodes. `draft_tree`
lays the nodes out as groups of rows, gives them pages, and finds the right path.
"""

from collections.abc import Sequence
from dataclasses import replace

from orthrus.plan import MAX_RANKS
from orthrus.requests.sequence import SequenceState
from orthrus.schedules.draft_tree import BranchPages, DraftTree, Verified, follow, runs_of
from orthrus.schedules.planner import Draft, DraftPlanner
from orthrus.schedules.tree_chances import TreeChances


class TreeDrafts:
    """Makes a tree of each draft that may have one, and learns from its result."""

    def __init__(self, pages: BranchPages, *, max_rows: int, depths: int, pass_rows: int) -> None:
        """max_rows: of a tree, the newest token's included. depths: most drafts on one path.

        pass_rows: most rows of all sequences in a pass.
        """
        self.max_rows = max_rows
        self._pages = pages
        self._pass_rows = pass_rows
        self._chances = {greedy: TreeChances(depths, MAX_RANKS) for greedy in (True, False)}

    def open(self, sequence: SequenceState, draft: Draft, batch: int) -> DraftTree | None:
        """A tree of a draft's candidates, with pages for it; None if one continuation has to do."""
        rows = min(self.max_rows, self._pass_rows // batch)
        # A grammar would have to be followed along each branch.
        if sequence.mask is not None or not draft.further or rows < 2:
            return None
        nodes = self._chances[sequence.params.greedy].tree(rows - 1, len(draft.tokens))
        runs = runs_of(nodes, sequence.newest_position, self._pages.page_size)
        return self._pages.open(sequence, runs) if len(runs) > 1 else None

    def commit(
        self, sequence: SequenceState, draft: Draft, picks: Sequence[list[int]], planner: DraftPlanner
    ) -> Verified:
        """What the picks say of a draft's tree. The pages of the right drafts become the sequence's own.

        planner: it is told how many drafts of the chain were right.
        """
        tree, greedy = draft.tree, sequence.params.greedy
        assert tree is not None
        verified = follow(tree.runs, draft.candidates, picks)
        self._pages.close(sequence, tree.tables[verified.run])
        chances, on_chain, accepted = self._chances[greedy], True, 0
        for depth, rank in enumerate(verified.ranks):
            chances.observe(depth, on_chain, rank)
            on_chain = on_chain and rank == 0
            accepted += on_chain
        if length := tree.chain_length:
            chain = replace(draft, tokens=draft.tokens[:length])
            planner.observe(greedy, chain, min(accepted, length))
        return verified
