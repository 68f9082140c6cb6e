"""Arguments and results of the row kernels."""

from dataclasses import dataclass

import torch
from torch import Tensor

NO_TOKEN = -1
"""The pick of a row that has a score of NaN or infinity: there is no best token."""


@dataclass(frozen=True)
class KVWrites:
    """The cache slots to which the AR rows of a pass write their keys and values. Each row has one slot, and some have more.

    Several continuations of a sequence in one pass have pages of their own for the same positions. A row that they share is
    computed once, and written to all of these pages.
    """

    # int32 or int64 [rows]: page * page_size + offset in the page.
    slots: Tensor
    # int32 or int64 [rows]: row r also writes to the slots more_slots[more_ends[r - 1] : more_ends[r]], from 0 for the first row.
    more_ends: Tensor
    # int32 or int64, at least as many as the highest of `more_ends`: slots, as in `slots`.
    more_slots: Tensor

    @staticmethod
    def single(slots: Tensor) -> "KVWrites":
        """Each row writes to one slot."""
        return KVWrites(slots, torch.zeros_like(slots), slots[:0])


@dataclass(frozen=True)
class EmbeddedRows:
    """The rows of a pass before the first layer."""

    # The token embeddings [rows, hidden_size].
    hidden: Tensor
    # Their RMS norm by the first layer's weight [rows, hidden_size].
    normed: Tensor
    # The rotary angles of the rows' positions [rows, 1, head_dim], as `apply_rope` takes them.
    cos: Tensor
    sin: Tensor
