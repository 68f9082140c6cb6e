"""Attention of one pass as a work list for a GPU: which rows meet which keys, in pieces of similar cost.

A tile is up to `tile_rows` rows of one group. Keys are cut into segments at fixed positions: short ones first, so that a short
context still fills the GPU, longer ones further on, so that a long one does not drown in partial results. An item is a tile and a
run of segments, for one KV head at a time. A tile with one item is finished by it. The segments of a tile with several leave one
partial result each, a record, and are merged afterwards. How a tile is divided changes no bit of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

ITEM = 9
"""Numbers of an item: first row and number of rows; where the page table begins; first and last + 1 of its segments; keys
that the tile's last row sees; the first key that this pass writes; first row of its diffusion block and rows of the block,
0 unless this item adds it."""
HEADER = 8
"""Numbers before the items; the first says how many items there are."""


@dataclass(frozen=True)
class AttentionGroup:
    """Rows first_row .. first_row + num_rows - 1 of a pass: positions start, start + 1, ... of one sequence in one view.

    pages: the sequence's page table, which covers every key that the rows see in the cache.
    """

    first_row: int
    num_rows: int
    start: int
    pages: Sequence[int]
    diffusion: bool

    @property
    def limits(self) -> list[int]:
        """Cache keys that each row sees."""
        if self.diffusion:
            return [self.start] * self.num_rows
        return list(range(self.start + 1, self.start + self.num_rows + 1))


@dataclass(frozen=True)
class AttentionWork:
    """A work list on its device, all int32.

    limits [rows]: cache keys that a row sees. records [rows]: the row's first record, -1 if it has none. items: header,
    items, page tables. capacity: records that there is room for.
    """

    limits: Tensor
    records: Tensor
    items: Tensor
    num_ar: Tensor
    capacity: int


def segment_start(index: int) -> int:
    """First key of a segment: 8 of 128 keys, 14 of 512 (from 1,024), 24 of 1,024 (from 8,192), then 2,048 each."""
    if index < 22:
        return index * 128 if index < 8 else 1024 + (index - 8) * 512
    return 8192 + (index - 22) * 1024 if index < 46 else 32768 + (index - 46) * 2048


def num_segments(keys: int) -> int:
    """How many segments hold the first `keys` keys."""
    if keys <= 8192:
        return -(-keys // 128) if keys <= 1024 else 8 + -(-(keys - 1024) // 512)
    return 22 + -(-(keys - 8192) // 1024) if keys <= 32768 else 46 + -(-(keys - 32768) // 2048)


def plan_work(
    groups: Sequence[AttentionGroup], *, num_rows: int, tile_rows: int, programs: int, capacity: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """limits, records and items of `AttentionWork` as int32 arrays.

    num_rows: of the pass; rows of no group see nothing. programs: how many programs there are for each KV head; work is
    divided so that each gets about as many keys. Tiles that would need more than `capacity` records are not divided.
    """
    limits, records = np.zeros(num_rows, np.int32), np.full(num_rows, -1, np.int32)
    tiles: list[tuple[int, ...]] = []
    tables: list[int] = []
    keys = 0
    for group in groups:
        first, count, start = group.first_row, group.num_rows, group.start
        if group.diffusion:
            limits[first : first + count] = start
        else:
            limits[first : first + count] = np.arange(start + 1, start + count + 1, dtype=np.int32)
        place = len(tables)
        tables.extend(group.pages)
        block = count if group.diffusion else 0
        for at in range(0, count, tile_rows):
            rows = min(tile_rows, count - at)
            seen = start if group.diffusion else start + at + rows
            tiles.append((first + at, rows, place, seen, start, first, block))
            keys += seen
    share = max(128, -(-keys // programs))
    items: list[tuple[int, ...]] = []
    used = 0
    for first, rows, place, seen, fresh, block_row, block in tiles:
        segments = num_segments(seen)
        parts = max(1, min(round(seen / share), segments))
        needed = rows * (segments + (block > 0))
        if parts > 1 and used + needed <= capacity:
            stride = segments + (block > 0)
            records[first : first + rows] = used + stride * np.arange(rows, dtype=np.int32)
            used += needed
        else:
            parts = 1
        begin = 0
        for part in range(1, parts + 1):
            end = segments if part == parts else _cut(seen * part // parts, begin)
            own = block if part == parts else 0
            if end > begin or own:
                items.append((first, rows, place, begin, end, seen, fresh, block_row, own))
            begin = end
    # The longest first: what comes last should be short.
    items.sort(key=lambda item: segment_start(item[3]) - segment_start(item[4]))
    out = np.empty(HEADER + ITEM * len(items) + len(tables), np.int32)
    out[:HEADER] = 0
    out[0] = len(items)
    behind = HEADER + ITEM * len(items)
    if items:
        table = np.array(items, np.int32)
        table[:, 2] += behind
        out[HEADER:behind] = table.ravel()
    out[behind:] = tables
    return limits, records, out


def _cut(keys: int, begin: int) -> int:
    """The segment boundary nearest to `keys`, behind `begin`."""
    segment = num_segments(keys)
    if segment > 0 and keys - segment_start(segment - 1) < segment_start(segment) - keys:
        segment -= 1
    return max(segment, begin)
