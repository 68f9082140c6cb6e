"""`PassBuffer`: all numbers of one pass in one piece of memory, and what each of them means.

The host writes a pass into a buffer in page-locked memory. One copy brings it to a buffer of the same layout on the device, from
which the captured graphs read it. Besides the weights and the cache, a buffer holds all that a device needs to run the pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from orthrus.kernels.attention.moving_blocks import FIELDS, MovingBlock, block_list
from orthrus.plan import MORE_SLOTS, FlatRows
from orthrus.runner.sampler import PickRows, keys_from, row_keys, row_temperatures

Array = TypeVar("Array", np.ndarray, Tensor)

_HEADER = 12
"""Numbers before the LM head's fields. The last two are unused, and align what follows to 16 bytes."""
_ROW = 4 + MORE_SLOTS
"""Numbers of a row."""
_LISTS = FIELDS + 16
"""Most numbers that the two lists behind the work list take for each row that needs logits. A block that moves has such a row,
with a noise key. Each draft that it comes behind had such a row in the pass before: it takes another key, its parent and group,
and pages if it begins a group. A branch takes a page to copy."""
_ALIGNED = 4
"""The list of blocks that move begins at a multiple of so many numbers: kernels are compiled for one alignment."""


@dataclass(frozen=True)
class PassFields(Generic[Array]):
    """The fields of a pass as views of its buffer: numpy arrays on the host, tensors on the device.

    All are int32 except for the temperatures. The graphs that run a pass are for fixed numbers of rows, so a pass may be padded
    with rows that belong to no group. These come last, and hold zeros.
    """

    num_ar: Array
    """[1] Number of AR rows, which come first."""
    first_pick: Array
    """[1] Place of the pass's first pick among the runner's."""
    wants_logits: Array
    """[1] Whether logits are to be written, not only picks: 0 or 1."""
    num_rows: Array
    """[1] Number of rows, padding included."""
    num_logits: Array
    """[1] Number of rows that need logits."""
    num_copies: Array
    """[1] Number of pages that are copied before the pass."""
    copies_at: Array
    """[1] Place of their list in `work`, behind the list of blocks that move: `FlatRows.copies`."""
    num_used: Array
    """[1] How many numbers of the buffer this pass uses, from its beginning."""
    num_moving: Array
    """[1] Number of blocks whose place depends on the picks of the pass before, as in `place_blocks`."""
    moving_at: Array
    """[1] Place of their list in `work`, behind the work list."""
    logit_rows: Array
    """[max_logits] The rows that need logits."""
    temperatures: Array
    """float32 [max_logits] For each row that needs logits; 0 for a greedy pick."""
    noise_keys: Array
    """[max_logits, 2] For each row that needs logits: the key of its sampling noise."""
    tokens: Array
    """[num_rows] As in `RowGroup.tokens`."""
    positions: Array
    """[num_rows]"""
    slots: Array
    """[num_rows] Where an AR row's key and value go in the cache."""
    more_ends: Array
    """[num_rows] The end of each row's part of `more_slots`."""
    more_slots: Array
    """[MORE_SLOTS * num_rows] Further slots that AR rows write to, as in `KVWrites`."""
    work: Array
    """[the rest] Attention's work list, see `kernels.attention`, and behind it two more lists: blocks that move, and copies."""

    @staticmethod
    def of(buffer: Array, num_rows: int, max_logits: int) -> "PassFields[Array]":
        """The fields of a pass of `num_rows` rows in `buffer`, int32 [size]. This function alone defines the layout."""
        head, rows = _HEADER, _HEADER + 4 * max_logits
        by_row = buffer[rows : rows + 4 * num_rows].reshape(4, num_rows)
        temperatures = buffer[head + max_logits : head + 2 * max_logits]
        floats = torch.float32 if isinstance(temperatures, Tensor) else np.float32
        return PassFields(
            num_ar=buffer[0:1],
            first_pick=buffer[1:2],
            wants_logits=buffer[2:3],
            num_rows=buffer[3:4],
            num_logits=buffer[4:5],
            num_used=buffer[5:6],
            num_moving=buffer[6:7],
            moving_at=buffer[7:8],
            num_copies=buffer[8:9],
            copies_at=buffer[9:10],
            logit_rows=buffer[head : head + max_logits],
            temperatures=temperatures.view(floats),
            noise_keys=buffer[head + 2 * max_logits : rows].reshape(max_logits, 2),
            tokens=by_row[0],
            positions=by_row[1],
            slots=by_row[2],
            more_ends=by_row[3],
            more_slots=buffer[rows + 4 * num_rows : rows + _ROW * num_rows],
            work=buffer[rows + _ROW * num_rows :],
        )


def buffer_size(*, max_rows: int, max_logits: int, max_work: int) -> int:
    """Numbers of a buffer that holds any pass of up to so many rows, rows that need logits, and numbers of the work list."""
    return _HEADER + (4 + _LISTS) * max_logits + _ROW * max_rows + max_work + _ALIGNED


@dataclass
class PassBuffer:
    """The host's buffer of one pass."""

    size: int
    """Numbers that it holds, from `buffer_size`."""
    max_logits: int
    pinned: bool
    """Whether in page-locked memory, which a GPU can read by itself."""
    numbers: Tensor = field(init=False)
    """int32 [size]."""

    def __post_init__(self) -> None:
        self.numbers = torch.zeros(self.size, dtype=torch.int32, pin_memory=self.pinned)
        self._array = self.numbers.numpy()
        # By number of rows, kept because making them takes as long as filling them.
        self._fields: dict[int, PassFields[np.ndarray]] = {}

    def fields(self, num_rows: int) -> PassFields[np.ndarray]:
        """The fields of a pass of `num_rows` rows, to read and to write."""
        if num_rows not in self._fields:
            self._fields[num_rows] = PassFields.of(self._array, num_rows, self.max_logits)
        return self._fields[num_rows]

    def dump(self, fields: PassFields[np.ndarray]) -> bytes:
        """The numbers that the pass in the buffer uses, as bytes."""
        return self._array[: int(fields.num_used[0])].tobytes()

    def load(self, numbers: bytes) -> PassFields[np.ndarray]:
        """Fill the buffer with what `dump` gave on another rank, whose buffer has the same size."""
        found = np.frombuffer(numbers, np.int32)
        self._array[: len(found)] = found
        return self.fields(int(PassFields.of(self._array, 0, self.max_logits).num_rows[0]))

    def fill(
        self,
        rows: FlatRows,
        picking: Sequence[PickRows],
        work: np.ndarray,
        *,
        num_rows: int,
        first_pick: int,
        wants_logits: bool,
    ) -> PassFields[np.ndarray]:
        """Write a pass into the buffer. What was in it is lost.

        rows: the rows of the pass's groups. num_rows: how many rows the pass is padded to. picking: how to pick from the rows
        that need logits, in their order; empty if nothing is picked. work: attention's work list. Returns the fields. Raises
        ValueError, naming the limit, for a pass that does not fit.
        """
        used, num_logits = len(rows.tokens), len(rows.logit_rows)
        if used > num_rows:
            raise ValueError(f"a pass of {used} rows is over its limit, {num_rows} rows")
        if num_logits > self.max_logits:
            raise ValueError(
                f"a pass with {num_logits} rows that need logits is over the limit, {self.max_logits}"
            )
        fields = self.fields(num_rows)
        if len(rows.more_slots) > len(fields.more_slots):
            raise ValueError(
                f"a pass of {num_rows} rows that writes to {len(rows.more_slots)} further slots is over the limit, "
                f"{len(fields.more_slots)} further slots"
            )
        room = len(fields.work) - _LISTS * self.max_logits - _ALIGNED
        if len(work) > room:
            raise ValueError(
                f"attention's work list has {len(work)} numbers, and a pass of {num_rows} rows has room for "
                f"{room}: its block tables have more pages than the buffer was made for"
            )
        # Padding belongs to the view that comes last.
        fields.num_ar[0] = rows.num_ar if rows.num_ar < used else num_rows
        fields.first_pick[0] = first_pick
        fields.wants_logits[0] = wants_logits
        fields.num_rows[0] = num_rows
        fields.num_logits[0] = num_logits
        self._fill_lists(fields, rows, picking, len(work))
        _write(fields.logit_rows, rows.logit_rows)
        if picking:
            fields.temperatures[:num_logits] = row_temperatures(picking)
            fields.noise_keys[:num_logits] = row_keys(picking)
        _write(fields.tokens, rows.tokens)
        _write(fields.positions, rows.positions)
        _write(fields.slots, rows.slots)
        fields.more_ends[:used] = rows.more_ends
        fields.more_ends[used:] = len(rows.more_slots)
        fields.more_slots[: len(rows.more_slots)] = rows.more_slots
        fields.work[: len(work)] = work
        return fields

    def _fill_lists(
        self, fields: PassFields[np.ndarray], rows: FlatRows, picking: Sequence[PickRows], begin: int
    ) -> None:
        """Write the lists behind the work list, which ends at place `begin` of its field."""
        moving, copies = block_list(_moving_blocks(rows, picking)), rows.copies.ravel()
        moving_at = -(-begin // _ALIGNED) * _ALIGNED if rows.moving else begin
        copies_at = moving_at + len(moving)
        end = copies_at + len(copies)
        if end > len(fields.work):
            raise ValueError(
                f"the lists behind the work list have {end - begin} numbers, and there is room for {len(fields.work) - begin}"
            )
        fields.num_used[0] = self.size - len(fields.work) + end
        fields.num_moving[0], fields.moving_at[0] = len(rows.moving), moving_at
        fields.num_copies[0], fields.copies_at[0] = len(rows.copies), copies_at
        fields.work[moving_at:copies_at] = moving
        fields.work[copies_at:end] = copies


def _moving_blocks(rows: FlatRows, picking: Sequence[PickRows]) -> list[MovingBlock]:
    """The blocks of a pass that come behind drafts in flight."""
    if not rows.moving:
        return []
    # By the first row with logits that they pick from. All rows of a block have one `PickRows`.
    ends = accumulate(picks.count for picks in picking)
    picks_at = {end - picks.count: picks for end, picks in zip(ends, picking, strict=True)}
    own = [picks_at[first_logit] for _, first_logit, _ in rows.moving]
    behind = [group.behind for _, _, group in rows.moving if group.behind is not None]
    keys = keys_from(
        [picks.seed for picks in own],
        [picks.position - before.furthest for picks, before in zip(own, behind, strict=True)],
        counts := [picks.count + before.furthest for picks, before in zip(own, behind, strict=True)],
    )
    ends = accumulate(counts)
    return [
        MovingBlock(
            first_row,
            len(group.tokens),
            first_logit,
            picks.count,
            before.first_pick,
            before.drafts,
            before.furthest,
            keys[end - count : end],
            before.tree,
        )
        for (first_row, first_logit, group), before, picks, count, end in zip(
            rows.moving, behind, own, counts, ends, strict=True
        )
    ]


def _write(target: np.ndarray, values: np.ndarray) -> None:
    """target[:] = values, then zeros."""
    target[: len(values)] = values
    target[len(values) :] = 0
