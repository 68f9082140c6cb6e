"""Chooses whether the drafts of a block are verified as a chain or as a tree, and how many rows the tree has.

A tree verifies the likeliest drafts of all ranks. So a row goes to the second best draft of a position rather than to a deep one
that is hardly ever reached. Its pass costs more than that of a chain of as many rows: its runs see different keys. The planner
compares expected tokens per second, from the chances that `TreeChances` counts and from measured costs.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate

from orthrus.schedules.decode_cost import CycleCost
from orthrus.schedules.planner import BlockPlan
from orthrus.schedules.tree_chances import TreeChances

MOST_SEQUENCES = 16
"""With more sequences in a pass there are no trees: it has too few rows for each of them."""
_SIZES = (6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Rows of the trees that are compared."""
_LOOK_EVERY = 8
"""One pass in so many drafts several candidates for each position although no tree is made of them, to learn how often they are
right."""
_MARGIN = 1.02
"""A tree must promise this many times the speed of the best chain."""


class TreePlanner:
    """Chooses trees for the sequences of a pass, which all get the same number of rows."""

    def __init__(
        self,
        chances: Mapping[bool, TreeChances],
        cost: CycleCost | None,
        *,
        max_rows: int,
        block_rows: int,
        pass_rows: int,
    ) -> None:
        """chances: for greedy text (True) and for sampled text (False). cost: None makes all blocks trees of `max_rows` rows, or
        of what fits a pass.

        max_rows: most rows of a tree, the newest token's included. block_rows: most rows of a block. pass_rows: most rows of all
        sequences in a pass.
        """
        self._chances = chances
        self._cost = cost
        self.max_rows = max_rows
        self._block_rows = block_rows
        self._pass_rows = pass_rows
        # By (greedy, batch): the version of chances and costs, and the block with the best tree; None if a chain is better.
        self._best: dict[tuple[bool, int], tuple[int, BlockPlan | None]] = {}
        self._chains = 0  # Blocks that are verified as chains.

    def plan(self, greedy: bool, batch: int, block: BlockPlan) -> BlockPlan:
        """The block to draft, with a tree or without. block: the best one of those that are verified as chains."""
        most = self._most_rows(batch)
        if block.rows < 2 or most < 2:
            return block
        if self._cost is None:
            return BlockPlan(block.rows, block.lead, most, candidates=True)
        if block.lead:
            return block
        version, best = self._best.get((greedy, batch), (-1, None))
        now = self._chances[greedy].version + self._cost.version
        if version != now:
            best = self._choose(self._cost, greedy, batch)
            self._best[greedy, batch] = now, best
        if best is not None:
            return best
        self._chains += 1
        return replace(block, candidates=self._chains // batch % _LOOK_EVERY == 0)

    def _most_rows(self, batch: int) -> int:
        return 0 if batch > MOST_SEQUENCES else min(self.max_rows, self._pass_rows // batch)

    def _choose(self, cost: CycleCost, greedy: bool, batch: int) -> BlockPlan | None:
        """The block with the best tree; None if a chain promises about as many tokens per second, or more."""
        chances, depths = self._chances[greedy], min(self._block_rows, self._pass_rows // batch) - 1
        reached = accumulate(chances.chain(depths))
        chain = max((1 + right) / cost.cycle(rows, batch, greedy) for rows, right in enumerate(reached, 2))
        nodes = chances.tree(self._most_rows(batch) - 1, depths)
        most = len(nodes) + 1  # Shallow trees have few nodes.
        right = list(accumulate(node.chance for node in nodes))
        deepest = list(accumulate((node.depth for node in nodes), max))
        trees = [
            (
                (1 + right[rows - 2]) / cost.cycle(deepest[rows - 2] + 2, batch, greedy, tree_rows=rows),
                BlockPlan(deepest[rows - 2] + 2, tree_rows=rows, candidates=True),
            )
            for rows in sorted({*(size for size in _SIZES if size < most), most} - {1})
        ]
        speed, block = max(trees, key=lambda tree: tree[0], default=(0.0, None))
        return block if speed >= _MARGIN * chain else None
