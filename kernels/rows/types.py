"""What the row kernels take and give back."""

from dataclasses import dataclass

import torch
from torch import Tensor

NO_TOKEN = -1
"""The pick of a row that has a score of NaN or infinity: there is no best token."""


@dataclass(frozen=True)
class KVWrites:
    """Where the AR rows of a pass write their keys and values: each to a slot of its own, and some to further slots.

    Several continuations of a sequence in one pass have pages of their own for the same positions. A row that they share is
    computed once, and written to all of these pages.
    """

    # int32 or int64 [rows]: page * page_size + offset in the page.
    slots: Tensor
    # int32 or int64 [rows]: row r also writes to the places from more_ends[r - 1] (0 for the first row) up to more_ends[r] of
    # `more_slots`.
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
