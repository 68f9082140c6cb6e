"""The list of draft blocks of a pass that `place_blocks` moves."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FIELDS = 8
"""Numbers of a block in the list: the first five fields of `MovingBlock`, the number of drafts, their place in the list, and a
zero. Behind those of all blocks come the drafts of each block, each time with the noise keys behind them."""


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
    """Place, among the runner's picks, of the pick that the first draft is compared with."""
    drafts: Sequence[int]
    """The drafts that the pass before verifies."""
    noise_keys: np.ndarray
    """int32 [len(drafts) + num_logits, 2]: of the rows with logits if no draft is right, then of a position for each draft."""


def block_list(blocks: Sequence[MovingBlock]) -> np.ndarray:
    """The blocks as one array of int32, for `place_blocks`."""
    parts: list[Sequence[int] | np.ndarray] = []
    behind = FIELDS * len(blocks)
    for block in blocks:
        fields = (block.first_row, block.num_rows, block.first_logit, block.num_logits, block.first_pick)
        parts.append((*fields, len(block.drafts), behind, 0))
        behind += len(block.drafts) + block.noise_keys.size
    for block in blocks:
        parts += [block.drafts, block.noise_keys.reshape(-1)]
    return np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)
