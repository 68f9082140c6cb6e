"""Attention of one pass as a work list for a GPU: which rows meet which keys, in pieces of similar cost.

A tile is up to `tile_rows` rows of one group; a shared tile, twice as many, for a kernel that brings keys once for two consumers.
Keys are cut into segments at fixed positions: short ones first, so that a short context still fills the GPU, longer ones
further on. The segments of a span of 2,048 keys are merged in order, then the spans; a row's diffusion block is merged behind
the last segment of its last span. An item is a tile and a run of segments, for one KV head at a time. A tile with one item is
finished by it. The items of a divided tile leave partial results, records, which are merged afterwards: one for each span that
an item begins, one for each segment of a span that it doesn't. How a tile is divided changes no bit of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

SPAN = 2048
"""Keys whose segments are merged with one another before anything else."""
_SHORTEST = 128
"""Keys of an item, at least: the shortest segment."""
_LONG_SHARE = 1024
"""Keys of an item from which on it takes its tile's block along rather than leave it to another program."""
HEADER = 8
"""Numbers before the items: how many there are, how many of them have a shared tile (these come first), how many rows are
divided, and where these rows' list begins."""
DIVIDED_ROWS = 2
"""Which of them says how many rows are divided."""
ITEM = 16
"""Numbers of an item: first row and number of rows; where the page table begins; first and last + 1 of its segments; keys
that the tile's last row sees; the first key that this pass writes; first row of its diffusion block and rows of the block,
0 unless this item adds it; keys that each row sees more than the one before; first record of the first row, -1 if the tile
isn't divided, and how many a row has. The rest is unused."""
DIVIDED_ROW = 4
"""Numbers of a divided row: itself, its first record, how many it has, and where a bit for each begins: whether it is the last of
its span."""


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
    """A work list on its device. capacity: records that there is room for.

    numbers, int32: header, items, divided rows, their bits, page tables.
    """

    numbers: Tensor
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


@dataclass(frozen=True)
class _Tile:
    """Numbers of an item that are its tile's."""

    first_row: int
    rows: int
    table: int
    seen: int
    fresh: int
    block_row: int
    block: int
    causal: int

    def item(self, begin: int, end: int, block: int, record: int = -1, records: int = 0) -> tuple[int, ...]:
        """Segments begin .. end - 1; block: its rows, 0 if another item adds it."""
        tile = (self.first_row, self.rows, self.table, begin, end, self.seen, self.fresh, self.block_row)
        return (*tile, block, self.causal, record, records, 0, 0, 0, 0)


def plan_work(
    groups: Sequence[AttentionGroup], *, tile_rows: int, shared: bool, programs: int, capacity: int
) -> np.ndarray:
    """`AttentionWork.numbers`.

    shared: make shared tiles, each for two programs. programs: how many there are for each KV head; work is divided so that
    each gets about as many keys. Tiles that would need more than `capacity` records are not divided.
    """
    tiles: list[_Tile] = []
    tables: list[int] = []
    most = 2 * tile_rows if shared else tile_rows
    for group in groups:
        count, start = group.num_rows, group.start
        for at in range(0, count, most):
            rows = min(most, count - at)
            seen, block = (start, count) if group.diffusion else (start + at + rows, 0)
            where = (group.first_row + at, rows, len(tables), seen, start, group.first_row)
            tiles.append(_Tile(*where, block, int(not group.diffusion)))
        tables.extend(group.pages)
    keys = sum(tile.seen for tile in tiles)
    items: list[tuple[int, ...]] = []
    rows_divided: list[tuple[int, ...]] = []
    span_ends: list[int] = []
    used = 0
    for tile in tiles:
        share = max(_SHORTEST, -(-keys * (1 + (tile.rows > tile_rows)) // programs))
        whole = tile.item(0, num_segments(tile.seen), tile.block)
        runs = _runs(tile.seen, share)
        if len(runs) < 2:
            items.append(whole)
            continue
        # Segments, rows of the block, and for each record whether it is the last of its span.
        parts = [(*run, 0, _span_ends(tile.seen, *run)) for run in runs]
        if tile.block:
            begin, end, _, ends = parts.pop()
            if share < _LONG_SHARE:  # The block is an item of its own, at the same time.
                parts += [(begin, end, 0, [*ends[:-1], False]), (end, end, tile.block, [True])]
            elif segment_start(end) > _spans_from(begin):
                parts.append((begin, end, tile.block, ends))
            else:
                parts.append((begin, end, tile.block, [*ends[:-1], False, True]))
        bits = [bit for part in parts for bit in part[3]]
        if used + tile.rows * len(bits) > capacity:
            items.append(whole)
            continue
        record = used
        for begin, end, block, ends in parts:
            items.append(tile.item(begin, end, block, record, len(bits)))
            record += len(ends)
        for row in range(tile.first_row, tile.first_row + tile.rows):
            rows_divided.append((row, used, len(bits), len(span_ends)))
            used += len(bits)
        for at in range(0, len(bits), 32):
            span_ends.append(sum(bit << i for i, bit in enumerate(bits[at : at + 32])))
    # Shared items first, and of either kind the longest: what comes last should be short.
    items.sort(key=lambda item: (item[1] <= tile_rows, segment_start(item[3]) - segment_start(item[4])))
    shared_items = sum(item[1] > tile_rows for item in items)
    item_table = np.array(items, np.int32).reshape(-1, ITEM)
    row_table = np.array(rows_divided, np.int32).reshape(-1, DIVIDED_ROW)
    rows_at = HEADER + item_table.size
    ends_at = rows_at + row_table.size
    item_table[:, 2] += ends_at + len(span_ends)
    row_table[:, 3] += ends_at
    header = np.array([len(items), shared_items, len(row_table), rows_at, 0, 0, 0, 0], np.int32)
    bits_table = np.array(span_ends, np.uint32).view(np.int32)
    return np.concatenate(
        [header, item_table.ravel(), row_table.ravel(), bits_table, np.array(tables, np.int32)]
    )


def work_size(*, rows: int, programs: int, capacity: int, pages: int) -> int:
    """Length of the longest list for so many rows and pages: rows that are tiles, each with a block, and divided."""
    return HEADER + ITEM * 2 * (rows + programs) + (DIVIDED_ROW + 1) * rows + capacity // 32 + pages


def _runs(keys: int, share: int) -> list[tuple[int, int]]:
    """The segments of `keys` keys in runs of about `share` keys."""
    segments, parts = num_segments(keys), round(keys / share)
    if share == _SHORTEST and parts > 1:
        # Programs to spare: one for every segment, since two would take one twice as long.
        return list(pairwise(range(segments + 1)))
    cuts = [_nearest_segment(keys * part // parts) for part in range(1, parts)]
    return [(begin, end) for begin, end in pairwise([0, *cuts, segments]) if end > begin]


def _nearest_segment(keys: int) -> int:
    """The segment whose start is nearest to `keys`."""
    segment = num_segments(keys)
    if segment > 0 and keys - segment_start(segment - 1) < segment_start(segment) - keys:
        segment -= 1
    return segment


def _spans_from(begin: int) -> int:
    """The first key from which on an item whose first segment is `begin` leaves records of spans or their beginnings."""
    return -(-segment_start(begin) // SPAN) * SPAN


def _span_ends(keys: int, begin: int, end: int) -> list[bool]:
    """For each record that a run of the segments of `keys` keys leaves: whether it is the last of its span.

    A record for each segment as far as the run's first span isn't there from its beginning, then one for each span.
    """
    ends: list[bool] = []
    for behind in range(begin + 1, end + 1):
        at = segment_start(behind)
        ends_span = at % SPAN == 0 or behind == num_segments(keys)
        if ends_span or behind == end or at <= _spans_from(begin):
            ends.append(ends_span)
    return ends
