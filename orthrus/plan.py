"""What one forward pass computes: groups of rows, and their order in the pass.

A row is one token at one position of one sequence. A `RowGroup` is a run of rows, and all that a schedule has to produce: the
forward pass, the cache and the sampler are the same for all schedules. `flatten` puts the groups of all sequences into one
list of rows, AR rows before diffusion rows. A runner may pad a pass with rows that belong to no group. Their keys and values go
to page 0, which no sequence owns, and their results are not read.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from orthrus.kernels.attention import AttentionGroup, AttentionPlan
from orthrus.kernels.attention.moving_blocks import VerifiedTree, last_right
from orthrus.kernels.rows.types import KVWrites

MAX_RANKS = 4
"""Most tokens that a row can pick."""
MORE_SLOTS = 4
"""Most further slots per row of a turn, on average over its rows: see `RowGroup.parent`."""


class View(Enum):
    """Which of the model's two sets of attention projections a row uses."""

    AR = "ar"
    """Causal attention; keys and values are written to the cache."""
    DIFFUSION = "diffusion"
    """Attention to the cached keys before the group and to all rows of the group; nothing is written."""


@dataclass
class Verifying:
    """Drafts that a pass in flight verifies."""

    drafts: Sequence[int]
    """The drafts, in the order of their rows."""
    first_pick: int
    """Place, among the runner's picks, of the pick behind the newest token. The picks behind the drafts follow, in order."""
    tree: VerifiedTree | None = None
    """None for a chain, where each draft follows the one before it."""

    @cached_property
    def furthest(self) -> int:
        """Most drafts that can be right."""
        if self.tree is None:
            return len(self.drafts)
        depths: list[int] = []
        for parent in self.tree.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return max(depths, default=0)

    def right(self, picks: Sequence[int]) -> tuple[int, int]:
        """The place of the last right draft, -1 if none is right; and how many are right. picks: from `first_pick` on."""
        return last_right(self.drafts, None if self.tree is None else self.tree.parents, picks)


def num_right(drafts: Sequence[int], picks: Sequence[int]) -> int:
    """How many drafts, from the first on, equal the picks. picks: at least one for each draft."""
    return next((i for i, draft in enumerate(drafts) if draft != picks[i]), len(drafts))


# Not frozen: a pass makes one for every sequence, and making frozen ones takes four times as long.
@dataclass(slots=True)
class RowGroup:
    """Rows at consecutive positions of one sequence, in one view."""

    view: View
    tokens: Sequence[int]
    """The rows' input tokens. -1 - i stands for the token at place i of the runner's picks, which the host does not know yet."""
    start: int
    """Position of the first row."""
    block_table: list[int]
    """The block table, in vLLM's sense: the pages that hold the sequence's positions, in order. Groups of one sequence may have
    different tables. Then the pages differ where the tokens differ. The scheduler appends the pages that AR rows need before the
    pass runs."""
    logits_from: int
    """The first row that needs logits, counted within the group."""
    logits_to: int
    """The row after the last one that needs logits."""
    parent: "RowGroup | None" = None
    """The group of the same pass that these rows branch off from. They see only its rows before `start`. None: they branch off
    from no group. If the branch begins inside a page, it has its own copy of that page, and the rows of its ancestors whose
    positions are in the page are written to both copies. What the page holds from before the pass is copied as the pass begins.
    A group comes right behind its parent, or behind other groups that branch off from the same tree."""
    behind: Verifying | None = None
    """Drafts that the pass before this one verifies. This group is then a diffusion block, which follows those that are right.
    `start` is where the block begins if as many as possible are right. For each one that is not, the runner moves the block back
    by a position. The first row gets the pick behind the last right draft, whatever `tokens` has. Behind a tree, the block table
    becomes that of the group with the last right draft."""
    heads: int = 0
    """How many Medusa heads draft behind these rows. They read the hidden state of the row whose pick follows the last right
    token. All groups of a pass that have heads have the same number."""

    @property
    def end(self) -> int:
        """The position after the last row's."""
        return self.start + len(self.tokens)

    @property
    def num_logits(self) -> int:
        return self.logits_to - self.logits_from


@dataclass(frozen=True)
class FlatRows:
    """The rows of a pass in the order in which it computes them."""

    tokens: np.ndarray
    """int32 [rows], as in `RowGroup.tokens`."""
    positions: np.ndarray
    """int32 [rows]."""
    slots: np.ndarray
    """int32 [rows], where an AR row's key and value go, page * page_size + offset in the page; 0 for diffusion rows."""
    more_ends: np.ndarray
    """int32 [rows], the end of each row's part of `more_slots`, as in `KVWrites`."""
    more_slots: np.ndarray
    """int32, further slots that AR rows write to."""
    num_ar: int
    """How many rows are AR rows; these come first."""
    groups: tuple[AttentionGroup, ...]
    """What the rows attend to, in the order of the rows."""
    logit_rows: np.ndarray
    """int32, the rows that need logits, in the order of the groups that were flattened."""
    copies: np.ndarray
    """int32 [copies, 3], pages that have to be copied first: from where, to where, and how many positions."""
    moving: tuple[tuple[int, int, RowGroup], ...] = ()
    """The groups that come behind drafts in flight: each with its first row, and the place of its first row in `logit_rows`."""


@dataclass(frozen=True)
class PassPlan:
    """The input of the forward pass: the fields of `FlatRows` as tensors on its device."""

    tokens: Tensor
    """int32 or int64 [rows]."""
    positions: Tensor
    """int32 or int64 [rows]."""
    writes: KVWrites
    """Where AR rows write their keys and values."""
    num_ar: Tensor
    """int32 [1]."""
    attention: AttentionPlan
    """What the rows attend to."""
    logit_rows: Tensor
    """int32 or int64, the rows that need logits."""

    @staticmethod
    def build(
        groups: Sequence[RowGroup], *, page_size: int, heads_per_kv: int, device: torch.device
    ) -> "PassPlan":
        """A plan for the plain PyTorch kernels from `groups` (at least one, none empty)."""
        return PassPlan.of(
            flatten(groups, page_size), page_size=page_size, heads_per_kv=heads_per_kv, device=device
        )

    @staticmethod
    def of(rows: FlatRows, *, page_size: int, heads_per_kv: int, device: torch.device) -> "PassPlan":
        """A plan for the plain PyTorch kernels from rows that are flat already."""

        def tensor(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values.astype(np.int64)).to(device)

        return PassPlan(
            tokens=tensor(rows.tokens),
            positions=tensor(rows.positions),
            writes=KVWrites(tensor(rows.slots), tensor(rows.more_ends), tensor(rows.more_slots)),
            num_ar=torch.tensor([rows.num_ar], dtype=torch.int32, device=device),
            attention=AttentionPlan(rows.groups, page_size, heads_per_kv, device),
            logit_rows=tensor(rows.logit_rows),
        )


def flatten(groups: Sequence[RowGroup], page_size: int) -> FlatRows:
    """The rows of `groups` (none empty): AR groups first, otherwise in their order. page_size: positions of a cache page."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    written: dict[int, int] = {}
    more: dict[int, list[int]] = {}
    order = [index for index, group in enumerate(groups) if group.view is View.AR]
    order += [index for index, group in enumerate(groups) if group.view is not View.AR]
    first_rows = [0] * len(groups)
    for index in order:
        group = groups[index]
        first_rows[index] = len(tokens)
        tokens.extend(group.tokens)
        positions.extend(range(group.start, group.end))
        if group.view is View.AR:
            _append_slots(slots, written, group, page_size)
    trunks = _trunks(groups)
    if trunks:
        more = _slots_in_branches(groups, first_rows, written, page_size)
    attention = [
        AttentionGroup(
            first_rows[index],
            len(groups[index].tokens),
            groups[index].start,
            groups[index].block_table,
            groups[index].view is View.DIFFUSION,
            _writes_from(groups[index], written, page_size),
            # A branch's own pages begin no earlier than the page of its trunk's first row.
            trunks[index].start // page_size * page_size if index in trunks else 0,
        )
        for index in order
    ]
    num_ar = len(slots)
    slots.extend([0] * (len(tokens) - num_ar))
    logit_rows: list[int] = []
    moving: list[tuple[int, int, RowGroup]] = []
    for first_row, group in zip(first_rows, groups, strict=True):
        if group.behind is not None:
            moving.append((first_row, len(logit_rows), group))
        logit_rows.extend(range(first_row + group.logits_from, first_row + group.logits_to))
    return FlatRows(
        tokens=np.array(tokens, np.int32),
        positions=np.array(positions, np.int32),
        slots=np.array(slots, np.int32),
        more_ends=np.cumsum([len(more.get(row, ())) for row in range(len(tokens))], dtype=np.int32)
        if more
        else np.zeros(len(tokens), np.int32),
        more_slots=np.array([slot for row in sorted(more) for slot in more[row]], np.int32),
        num_ar=num_ar,
        groups=tuple(attention),
        logit_rows=np.array(logit_rows, np.int32),
        copies=_copies(groups, trunks, page_size),
        moving=tuple(moving),
    )


def _append_slots(slots: list[int], written: dict[int, int], group: RowGroup, page_size: int) -> None:
    """Append the cache slot of every row of an AR group, and add the group's pages to `written`.

    written: for each page that the pass writes to, the first position in it that is written.
    """
    start, end = group.start, group.end
    while start < end:
        index, offset = divmod(start, page_size)
        page = group.block_table[index]
        if written.get(page, start) >= start:
            written[page] = start
        count = min(page_size - offset, end - start)
        slot = page * page_size + offset
        slots.extend(range(slot, slot + count))
        start += count


def _trunks(groups: Sequence[RowGroup]) -> dict[int, RowGroup]:
    """For each group that branches off, by its index: the group in which its tree begins."""
    trunks: dict[int, RowGroup] = {}
    for index, group in enumerate(groups):
        if group.parent is not None:
            trunk = group.parent
            while trunk.parent is not None:
                trunk = trunk.parent
            trunks[index] = trunk
    return trunks


def _copies(groups: Sequence[RowGroup], trunks: dict[int, RowGroup], page_size: int) -> np.ndarray:
    """`FlatRows.copies`: the page in which a branch begins has keys from before the pass, if the tree begins in it too."""
    copies: list[tuple[int, int, int]] = []
    for index, trunk in trunks.items():
        page, filled = divmod(trunk.start, page_size)
        branch = groups[index].block_table
        if filled and groups[index].start // page_size == page:
            copies.append((trunk.block_table[page], branch[page], filled))
    return np.array(copies, np.int32).reshape(-1, 3)


def _slots_in_branches(
    groups: Sequence[RowGroup], first_rows: Sequence[int], written: dict[int, int], page_size: int
) -> dict[int, list[int]]:
    """For each row: its position's slots in the pages of groups that branch off from its group in the middle of a page.

    written: as in `_append_slots`.
    """
    more: dict[int, list[int]] = defaultdict(list)
    rows = {id(group): row for group, row in zip(groups, first_rows, strict=True)}
    for group in groups:
        if group.parent is None:
            continue
        index, offset = divmod(group.start, page_size)
        page, page_start = group.block_table[index], group.start - offset
        end = group.start
        parent: RowGroup | None = group.parent
        while parent is not None and end > page_start:
            begin = max(parent.start, page_start)
            for position in range(begin, end):
                more[rows[id(parent)] + position - parent.start].append(
                    page * page_size + position - page_start
                )
            written[page] = begin
            end, parent = begin, parent.parent
    return more


def _writes_from(group: RowGroup, written: dict[int, int], page_size: int) -> int | None:
    """The lowest position that `group` sees in the cache and that this pass writes. None: the pass writes none that it sees.

    Another group may write it, because groups can share pages. If a pass writes a position, it also writes all positions between
    it and the group. So the search goes back page by page from the group, and stops at the first page that is not written.
    """
    end = group.end if group.view is View.AR else group.start
    first, index = None, (end - 1) // page_size
    while index >= 0 and (position := written.get(group.block_table[index])) is not None:
        first, index = position, index - 1
    return first
