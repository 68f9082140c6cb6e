"""Which rows of a pass see which keys: the input of the attention kernels beside tensors."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


# Not frozen: a pass makes one for every sequence. Making frozen ones would be half of the time that flattening a pass takes.
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
    # Whether the rows are a diffusion block. Its rows see the keys before `start` and the whole block. Other rows are causal.
    diffusion: bool
    # The lowest position whose key this pass writes and the group sees. None means `start`: the group sees no key that another
    # group of the pass writes. A group behind AR rows of the same pass must give the lowest position of those rows. Otherwise the
    # kernels may read the cache before it is written.
    writes_from: int | None = None
    # How many of the first keys lie in the same pages as those of the previous group. If it is not 0, the group's rows follow the
    # rows of the previous group directly.
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
    # How many records (partial results) of each query head there is room for. With 0 no tile is divided, and nothing is merged.
    capacity: int


@dataclass(frozen=True)
class AttentionPlan:
    """Which keys the rows of a pass see. The results of rows that belong to no group are undefined."""

    groups: tuple[AttentionGroup, ...]
    # Keys of a page of the cache.
    page_size: int
    # Query heads for each KV head.
    heads_per_kv: int
    device: torch.device
    # The same groups as a work list. The GPU kernels need it, and do not read `groups`.
    work: AttentionWork | None = None
    # Index tensors of the reference implementation, made in the first layer and kept for the others.
    layouts: dict[Hashable, Any] = field(default_factory=dict, init=False, compare=False)
