"""What attention is told about a pass: which rows see which keys."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


# Not frozen: a pass makes one for every sequence, and freezing would take half of flattening it.
@dataclass(slots=True)
class AttentionGroup:
    """Consecutive rows of a pass that hold consecutive positions of one sequence in one view."""

    # The group's first row in the pass.
    first_row: int
    num_rows: int
    # Position of the first row.
    start: int
    # The sequence's block table: the pages, in order, of every key in the cache that the rows see.
    pages: Sequence[int]
    # Whether the rows are a diffusion block, which sees the keys before `start` and all of itself, or else causal AR rows.
    diffusion: bool
    # The lowest position whose key the group sees and this pass itself writes. None means `start`: an AR group sees the keys of
    # its own rows, and a diffusion block sees no key of the pass. Where a block follows AR rows of the same pass, it must give
    # the lowest of those rows' positions, or it may read the cache before they have been written.
    writes_from: int | None = None
    # How many keys, from the first on, it sees in the same pages as the group before it. Its rows come right behind the rows of
    # that group.
    shared: int = 0

    @property
    def limits(self) -> list[int]:
        """Number of keys in the cache that each row sees."""
        if self.diffusion:
            return [self.start] * self.num_rows
        return list(range(self.start + 1, self.start + self.num_rows + 1))


@dataclass(frozen=True)
class AttentionWork:
    """A work list on its device."""

    # int32, see `plan_work`.
    numbers: Tensor
    # Number of partial results that there is room for. 0: no tile is divided, and nothing is merged.
    capacity: int


@dataclass(frozen=True)
class AttentionPlan:
    """What the rows of a pass see. Rows of no group may see anything."""

    groups: tuple[AttentionGroup, ...]
    # Keys of a page of the cache.
    page_size: int
    # Query heads for each KV head.
    heads_per_kv: int
    device: torch.device
    # The same groups for the Triton kernels, which need nothing else.
    work: AttentionWork | None = None
    # What the plain version has worked out for the first layer, kept for the others.
    layouts: dict[Hashable, Any] = field(default_factory=dict, init=False, compare=False)
