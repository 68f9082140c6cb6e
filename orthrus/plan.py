"""The pass plan: which rows run in one forward pass, as a flat list in groups.

A group is consecutive positions of one sequence in one view. A schedule only decides which groups a sequence puts into a
pass; the forward, the cache and the sampler are the same for all. AR rows come first, then diffusion rows. Where a runner adds
rows of no group, to fill a pass up to a size that it is prepared for, they write to page 0, which no sequence owns, and nobody
reads them.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from torch import Tensor

from kernels import AttentionGroup, AttentionPlan


class View(Enum):
    """Which projections a row uses. AR rows are causal and written to the cache; diffusion rows see their whole block."""

    AR = "ar"
    DIFFUSION = "diffusion"


@dataclass(frozen=True)
class RowGroup:
    """Rows of one sequence: `tokens` at positions start, start + 1, ... in one view.

    tokens: a token that an earlier pass is still to pick, and that the host does not know, is -1 - its place among the
    runner's picks. pages: the sequence's page table; it covers every position that AR rows write. Rows `logits_from` up to
    but not including `logits_to`, counted within the group, need logits.
    """

    view: View
    tokens: Sequence[int]
    start: int
    pages: Sequence[int]
    logits_from: int
    logits_to: int

    @property
    def num_logits(self) -> int:
        return self.logits_to - self.logits_from


@dataclass(frozen=True)
class FlatRows:
    """The rows of a pass in order, as numpy arrays int32 [rows]; see `PassPlan`."""

    tokens: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    num_ar: int
    groups: tuple[AttentionGroup, ...]
    logit_rows: np.ndarray


@dataclass(frozen=True)
class PassPlan:
    """One forward pass, ready for the device.

    tokens, positions, slots [rows]; a slot is page * page_size + offset, where the row's AR key and value go (diffusion
    rows: slot 0). num_ar: AR rows, int32 [1]; the rest are diffusion rows. attention: what the
    rows see. logit_rows: the rows that need logits, in the order of the groups that the plan was built from.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    num_ar: Tensor
    attention: AttentionPlan
    logit_rows: Tensor

    @staticmethod
    def build(
        groups: Sequence[RowGroup], *, page_size: int, heads_per_kv: int, device: torch.device
    ) -> "PassPlan":
        """A plan for the plain PyTorch kernels from `groups` (at least one, none empty)."""
        rows = flatten(groups, page_size)

        def tensor(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values.astype(np.int64)).to(device)

        return PassPlan(
            tokens=tensor(rows.tokens),
            positions=tensor(rows.positions),
            slots=tensor(rows.slots),
            num_ar=torch.tensor([rows.num_ar], dtype=torch.int32, device=device),
            attention=AttentionPlan(rows.groups, page_size, heads_per_kv, device),
            logit_rows=tensor(rows.logit_rows),
        )


def flatten(groups: Sequence[RowGroup], page_size: int) -> FlatRows:
    """Put the rows of `groups` in order: by view, groups of one length side by side."""
    alike: dict[View, dict[int, list[int]]] = {view: defaultdict(list) for view in View}
    for index, group in enumerate(groups):
        alike[group.view][len(group.tokens)].append(index)
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    first_row = [0] * len(groups)
    seen: list[AttentionGroup] = []
    num_ar = 0
    for view, by_length in alike.items():
        for count, members in by_length.items():
            for index in members:
                group = groups[index]
                first_row[index] = len(tokens)
                seen.append(
                    AttentionGroup(len(tokens), count, group.start, group.pages, view is View.DIFFUSION)
                )
                span = range(group.start, group.start + count)
                tokens.extend(group.tokens)
                positions.extend(span)
                if view is View.AR:
                    pages = group.pages
                    slots.extend([pages[p // page_size] * page_size + p % page_size for p in span])
        if view is View.AR:
            num_ar = len(tokens)
    slots += [0] * (len(tokens) - num_ar)
    logit_rows = [
        row
        for first, group in zip(first_row, groups, strict=True)
        for row in range(first + group.logits_from, first + group.logits_to)
    ]
    arrays = (np.array(values, np.int32) for values in (tokens, positions, slots, logit_rows))
    token_array, position_array, slot_array, logit_array = arrays
    return FlatRows(token_array, position_array, slot_array, num_ar, tuple(seen), logit_array)
