"""The list of draft blocks of a pass that `place_blocks` moves."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MOST_NODES = 128
"""Most drafts of a tree. A chain may have any number."""


@dataclass(frozen=True, slots=True)
class VerifiedTree:
    """What a block has to know of the tree of drafts that it comes behind."""

    parents: Sequence[int]
    """For each draft the one before it, by its place; -1 for those behind the newest token. A draft comes after its parent."""
    groups: Sequence[int]
    """For each draft, its group. The newest token is in group 0."""
    first_page: int
    """Place in the block tables from which on those of the groups may differ."""
    pages: Sequence[Sequence[int]]
    """For each group, what its block table has from there on: as many pages as the block's own table."""


def last_right(drafts: Sequence[int], parents: Sequence[int] | None, picks: Sequence[int]) -> tuple[int, int]:
    """The place of the last right draft, -1 if none is right, and how many are right.

    parents: as in `VerifiedTree`; None for a chain. picks: behind the newest token, and then behind each draft.
    """
    last, right = -1, 0
    for place, draft in enumerate(drafts):
        parent = place - 1 if parents is None else parents[place]
        # No two drafts behind the same one are alike, and none comes before its parent.
        if parent == last and draft == picks[parent + 1]:
            last, right = place, right + 1
    return last, right


@dataclass(frozen=True, slots=True)
class MovingBlock:
    """A draft block whose place depends on the picks of the pass before it."""

    first_row: int
    """The block's first row in the pass."""
    num_rows: int
    first_logit: int
    """Place of its first row with logits among all rows that need them."""
    num_logits: int
    first_pick: int
    """Place, among the runner's picks, of the pick behind the newest token. Those behind the drafts follow."""
    drafts: Sequence[int]
    """The drafts that the pass before verifies."""
    furthest: int
    """Most drafts that can be right: the place that the block is planned for."""
    noise_keys: np.ndarray
    """int32 [furthest + num_logits, 2]: of the rows with logits if no draft is right, then of a position for each right draft."""
    tree: VerifiedTree | None = None
    """None for a chain, where each draft follows the one before it."""


class Fields(NamedTuple):
    """A block in the list. The places are in the list."""

    first_row: int
    num_rows: int
    first_logit: int
    num_logits: int
    first_pick: int
    num_drafts: int
    drafts_at: (
        int  # The drafts; of a tree, their parents and their groups follow, and then the pages of the groups.
    )
    furthest: int
    keys_at: int
    first_page: int
    num_pages: int  # Pages of each group; 0 for a chain.
    unused: int = 0


FIELDS = len(Fields._fields)
"""Numbers of a block in the list. Behind those of all blocks comes what belongs to each of them."""


def block_list(blocks: Sequence[MovingBlock]) -> np.ndarray:
    """The blocks as one array of int32, for `place_blocks`."""
    fields: list[int] = []
    numbers: list[int] = []
    start = FIELDS * len(blocks)
    for block in blocks:
        drafts_at, num_pages = start + len(numbers), 0
        numbers += block.drafts
        if (tree := block.tree) is not None:
            numbers += [*tree.parents, *tree.groups]
            num_pages = len(tree.pages[0])
            for pages in tree.pages:
                numbers += pages
        fields += Fields(
            block.first_row,
            block.num_rows,
            block.first_logit,
            block.num_logits,
            block.first_pick,
            len(block.drafts),
            drafts_at,
            block.furthest,
            start + len(numbers),
            tree.first_page if tree is not None else 0,
            num_pages,
        )
        numbers += block.noise_keys.ravel().tolist()
    return np.array(fields + numbers, np.int32)
