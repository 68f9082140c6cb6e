"""Counts how often drafts of each depth and rank are right while the engine runs, and chooses the nodes of trees from that.

A draft pass gives the best few tokens of each position without knowing which ones are right. So the token of a rank at a depth
may follow any token of the depth before it. A *node* of a tree is such a token after a certain path. A node's chance is the
product of the chances along its path. A tree has the likeliest nodes (as in DDTree); a node's parent is always among them.

The *chain* is the path of the best tokens, those of rank 0. A node that follows the chain is right more often than one that
follows another token, because a draft pass predicts what comes after the best tokens. So the two are counted apart.
"""

import heapq
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

_DECAY = 0.99
"""What an earlier count is multiplied by at each observation at the same depth."""
_PRIOR_WEIGHT = 4.0
"""How many observations the assumed chances count as."""
_PRIOR = ((0.75, 0.1, 0.04, 0.02), (0.6, 0.1, 0.04, 0.02))
"""Assumed chances of the ranks before anything has been verified: of nodes that follow the chain, and of others."""
_KEPT_FOR = 64
"""For how many observations trees are kept."""


@dataclass(frozen=True)
class Node:
    """A draft in a tree."""

    parent: int
    """The node before it, by its place in the tree; -1 for the newest token."""
    depth: int
    """How many drafts come before it."""
    rank: int
    """Its token's place among those of its depth, counted from 0, the best."""
    on_chain: bool
    """Whether it and all nodes before it are of rank 0."""
    chance: float
    """How likely it and all nodes before it are right."""


class TreeChances:
    """Counts how often each rank is right at each depth, and grows trees."""

    def __init__(self, depths: int, ranks: int) -> None:
        """depths: most drafts in a row. ranks: tokens that a draft pass gives for each depth."""
        self._ranks = ranks
        self._tried = [[_PRIOR_WEIGHT] * depths for _ in _PRIOR]
        self._right = [
            [[_PRIOR_WEIGHT * chance for chance in prior[:ranks]] for _ in range(depths)] for prior in _PRIOR
        ]
        self._trees: dict[int, list[Node]] = {}
        self._observed = 0
        self.version = 0
        """Grows whenever trees may have changed."""

    def observe(self, depth: int, on_chain: bool, rank: int | None) -> None:
        """Note which rank was right at a depth, after drafts that were right. on_chain: whether all of these had rank 0.

        rank: None if no candidate was right.
        """
        off = not on_chain
        self._tried[off][depth] = self._tried[off][depth] * _DECAY + 1
        right = self._right[off][depth]
        for index in range(self._ranks):
            right[index] = right[index] * _DECAY + (index == rank)
        self._observed += 1
        if self._observed >= _KEPT_FOR:
            self._observed = 0
            self._trees.clear()
            self.version += 1

    def tree(self, nodes: int, depths: int) -> list[Node]:
        """The `nodes` likeliest nodes of up to `depths` drafts in a row, the likeliest first."""
        tree = self._trees.get(depths, [])
        if len(tree) < nodes:
            tree = self._trees[depths] = self._grow(nodes, depths)
        return tree[:nodes]

    def chain(self, depths: int) -> list[float]:
        """The chance that the first 1, 2, ... `depths` drafts of the chain are all right."""
        right = [rights[0] / tried for rights, tried in zip(self._right[0], self._tried[0], strict=True)]
        return list(accumulate(right[:depths], mul))

    def _grow(self, nodes: int, depths: int) -> list[Node]:
        tree: list[Node] = []
        # Ordered by chance. Among equals, shallow nodes and low ranks come first.
        candidates: list[tuple[float, int, int, int]] = []

        def add(parent: int, depth: int, on_chain: bool, chance: float) -> None:
            """Add the drafts that may follow a node to the candidates."""
            if depth < depths:
                off = not on_chain
                for rank, right in enumerate(self._right[off][depth]):
                    item = -chance * right / self._tried[off][depth], depth, rank, parent
                    heapq.heappush(candidates, item)

        add(-1, 0, True, 1.0)
        while candidates and len(tree) < nodes:
            negative, depth, rank, parent = heapq.heappop(candidates)
            on_chain = rank == 0 and (parent < 0 or tree[parent].on_chain)
            tree.append(Node(parent, depth, rank, on_chain, -negative))
            add(len(tree) - 1, depth + 1, on_chain, -negative)
        return tree
