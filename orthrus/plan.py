"""The pass plan: which rows run in one forward pass, as a flat list in groups.

A group is consecutive positions of one sequence in one view. A schedule only decides which groups a sequence puts into a
pass; the forward, the cache and the sampler are the same for all. AR rows come first, then diffusion rows, each padded
to `ROW_TILE` with rows that belong to no group: they write to page 0, which no sequence owns, and nobody reads them.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from kernels import ROW_TILE, AttentionBatch
from kernels.attention import KV_SPLIT


class View(Enum):
    """Which projections a row uses. AR rows are causal and written to the cache; diffusion rows see their whole block."""

    AR = "ar"
    DIFFUSION = "diffusion"


@dataclass(frozen=True)
class RowGroup:
    """Rows of one sequence: `tokens` at positions start, start + 1, ... in one view.

    pages: the sequence's page table; it covers every position that AR rows write. Rows `logits_from` up to but not
    including `logits_to`, counted within the group, need logits.
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
class PassPlan:
    """One forward pass, ready for the device.

    tokens, positions, slots: int64 [rows]; a slot is page * page_size + offset, where the row's AR key and value go
    (diffusion and padding rows: slot 0). num_ar: AR rows, padding included; the rest are diffusion rows.
    attention: the groups in batches of one view and row count. logit_rows: int64, the rows that need logits, in the order of
    the groups that the plan was built from, padded to `ROW_TILE` by repeating row 0. num_logits: without that padding.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    num_ar: int
    attention: tuple[AttentionBatch, ...]
    logit_rows: Tensor
    num_logits: int

    @property
    def num_rows(self) -> int:
        return self.tokens.shape[0]

    @staticmethod
    def build(
        groups: Sequence[RowGroup], *, page_size: int, heads_per_kv: int, device: torch.device
    ) -> "PassPlan":
        """Flatten `groups` (at least one, none empty)."""
        alike: dict[View, dict[int, list[int]]] = {view: defaultdict(list) for view in View}
        for index, group in enumerate(groups):
            alike[group.view][len(group.tokens)].append(index)
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        first_row: dict[int, int] = {}
        attention: list[AttentionBatch] = []
        num_ar = 0
        for view, by_length in alike.items():
            for members in by_length.values():
                batch = [groups[i] for i in members]
                attention.append(_attention_batch(batch, len(tokens), page_size, heads_per_kv, device))
                for index, group in zip(members, batch, strict=True):
                    first_row[index] = len(tokens)
                    span = range(group.start, group.start + len(group.tokens))
                    tokens.extend(group.tokens)
                    positions.extend(span)
                    if view is View.AR:
                        slots.extend(group.pages[p // page_size] * page_size + p % page_size for p in span)
            padding = [0] * (-len(tokens) % ROW_TILE)
            tokens += padding
            positions += padding
            if view is View.AR:
                slots += padding
                num_ar = len(tokens)
        slots += [0] * (len(tokens) - num_ar)
        logit_rows = [
            row
            for index, group in enumerate(groups)
            for row in range(first_row[index] + group.logits_from, first_row[index] + group.logits_to)
        ]
        num_logits = len(logit_rows)
        logit_rows += [0] * (-num_logits % ROW_TILE)
        return PassPlan(
            tokens=_int64(tokens, device),
            positions=_int64(positions, device),
            slots=_int64(slots, device),
            num_ar=num_ar,
            attention=tuple(attention),
            logit_rows=_int64(logit_rows, device),
            num_logits=num_logits,
        )


def _int64(values: Iterable[int] | list[list[int]], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def _attention_batch(
    groups: list[RowGroup], first_row: int, page_size: int, heads_per_kv: int, device: torch.device
) -> AttentionBatch:
    """Batch groups of one view and row count, whose rows follow one another from `first_row` on."""
    count = len(groups[0].tokens)
    diffusion = groups[0].view is View.DIFFUSION
    limits = [
        [g.start] * count if diffusion else list(range(g.start + 1, g.start + count + 1)) for g in groups
    ]
    pages_per_split = max(1, KV_SPLIT // page_size)
    used = max(-(-limit[-1] // page_size) for limit in limits)
    width = max(1, -(-used // pages_per_split)) * pages_per_split
    tables = [[*g.pages[:used], *([0] * (width - min(used, len(g.pages))))] for g in groups]
    run = groups[0].pages[:used]
    in_place = len(groups) == 1 and bool(run) and list(run) == list(range(run[0], run[0] + used))
    return AttentionBatch(
        first_row=first_row,
        page_table=_int64(tables, device),
        limits=_int64(limits, device),
        page_size=page_size,
        heads_per_kv=heads_per_kv,
        diffusion=diffusion,
        first_page=run[0] if in_place else None,
    )
