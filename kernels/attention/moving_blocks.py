"""The draft blocks that `place_blocks` moves, as a list for the device.

A draft is *right* if the previous pass picked it after its parent, and the parent is the newest token or itself right.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MOST_NODES = 128
"""The most drafts that a tree may have. A chain may have any number."""


@dataclass(frozen=True, slots=True)
class VerifiedTree:
    """The tree of drafts before a block, which the previous pass verifies."""

    parents: Sequence[int]
    """For each draft the index of its parent; -1 if that is the newest token. A draft comes after its parent."""
    groups: Sequence[int]
    """For each draft, its group. The newest token is in group 0."""
    first_page: int
    """Index in the block tables of the first page that may differ between the groups."""
    pages: Sequence[Sequence[int]]
    """For each group, the pages of its block table from `first_page` on. They are as many as in the block's own table."""


def last_right(drafts: Sequence[int], parents: Sequence[int] | None, picks: Sequence[int]) -> tuple[int, int]:
    """The index of the last right draft, -1 if none is right; and how many are right.

    parents: as in `VerifiedTree`; None for a chain. picks: the pick after the newest token, then the pick after each draft.
    """
    last, right = -1, 0
    for place, draft in enumerate(drafts):
        parent = place - 1 if parents is None else parents[place]
        # Drafts with the same parent differ, and a draft comes after its parent. So one loop finds the path of right drafts.
        if parent == last and draft == picks[parent + 1]:
            last, right = place, right + 1
    return last, right


@dataclass(slots=True)
class MovingBlock:
    """A draft block whose position depends on the picks of the previous pass."""

    first_row: int
    """The block's first row in the pass."""
    num_rows: int
    first_logit: int
    """Index of its first row with logits among all rows of the pass with logits."""
    num_logits: int
    first_pick: int
    """Index, among the runner's picks, of the pick after the newest token. The picks after the drafts follow it."""
    drafts: Sequence[int]
    """The drafts that the previous pass verifies."""
    furthest: int
    """The most drafts that can be right. The block is planned for the position behind so many."""
    noise_keys: np.ndarray
    """int32 [furthest + num_logits, 2]: noise keys of consecutive positions. If no draft is right, the rows with logits use the
    first `num_logits` of them. For each right draft they use those one position later."""
    tree: VerifiedTree | None = None
    """None for a chain, where each draft follows the one before it."""


class Fields(NamedTuple):
    """The fields of a block in the list. Those that end in `_at` are indices in the list."""

    first_row: int
    num_rows: int
    first_logit: int
    num_logits: int
    first_pick: int
    num_drafts: int
    # The drafts. For a tree, their parents, their groups, and the pages of the groups follow.
    drafts_at: int
    furthest: int
    keys_at: int  # The noise keys.
    first_page: int
    num_pages: int  # Pages of each group; 0 for a chain.
    unused: int = 0


FIELDS = len(Fields._fields)
"""Number of fields. The list begins with the fields of all blocks. What their indices point to follows."""


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
