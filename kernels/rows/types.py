"""What the row kernels give back."""

from dataclasses import dataclass

from torch import Tensor

NO_TOKEN = -1
"""The pick of a row that has a score of NaN or infinity: there is no best token."""


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
