"""Attention of one pass as a work list for a GPU: which rows attend to which keys, in pieces of similar cost.

A *tile* is up to `tile_rows` rows of one group. A *shared* tile has up to twice as many, for a kernel that loads keys once
for two consumers. Keys are cut into *segments* at fixed positions: short ones first, so that a short context still fills the
GPU, and longer ones further on. A *span* is 2,048 keys. The segments of a span are merged in order, and then the spans. A
row's diffusion block is merged after the last segment of its last span.

An *item* is a tile and a run of segments. It is processed once for each KV head. If a tile is one item, that item writes the
result. If it is *divided* into several (split-KV), they write partial results, *records*, which are merged afterwards. Of a span
that an item has from its beginning, it writes one record. Of a span that it enters midway, it writes one record per segment. So
the order of merging is fixed, and no bit of the result depends on how a tile is divided.

A tree of drafts is several groups that see their first keys in the same pages. The segments in these pages are its *trunk*. There
the rows of all its groups make tiles together, so that a key is read once for many rows. Behind it, each group has its own tiles.

The list is one array of int32: a `HEADER`, the `ITEM`s, the `DIVIDED_ROW`s, a bit for each record of these rows (whether it is
the last of its span), and the block tables. Indices in it count int32 numbers.
"""

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np

from orthrus.kernels.attention.segments import (
    ends_spans,
    nearest_segment,
    num_segments,
    segment_start,
    spans_from,
)
from orthrus.kernels.attention.types import AttentionGroup

_SHORTEST = 128
"""The fewest keys of an item: those of the shortest segment."""
_LONG_SHARE = 1024
"""If a tile's items have this many keys or more, the last one also takes its diffusion block. Else the block is an item."""
_MANY_ROWS = 16
"""Rows of a pass from which on records cost more than programs without work. Measured with contexts of 1,024 and 4,096 tokens."""


class Header(NamedTuple):
    """The beginning of the list."""

    num_items: int
    num_shared: int  # Items with a shared tile; they come first.
    num_divided: int  # Divided rows.
    divided_at: int  # Index of the first divided row in the list.


class Item(NamedTuple):
    """A tile and a run of segments. In a kernel each field is a scalar tensor."""

    first_row: int  # The tile's first row in the pass.
    num_rows: int  # Rows of the tile.
    table_at: int  # Index of the block table in the list.
    first_segment: int
    end_segment: int  # Exclusive.
    num_keys: int  # Keys in the cache that the tile's last row sees.
    writes_from: int  # `AttentionGroup.writes_from`.
    block_row: int  # First row of the tile's diffusion block.
    block_rows: int  # Rows of that block; 0 unless this item adds it.
    # How many more keys each row sees than the previous row: 1 for AR rows, 0 for a diffusion block.
    causal: int
    record: int  # First record of the tile's first row; -1 if the tile is not divided.
    num_records: int  # Records of each row.
    # Number of keys at the end of `num_keys` that no row sees. A block whose position is not known yet is planned for the
    # furthest one, and `place_blocks` sets this.
    unseen: int = 0

    def part(self, begin: int, end: int, block_rows: int, record: int, num_records: int) -> "Item":
        """The same tile with segments begin .. end - 1. Written for speed: there are thousands in a pass."""
        return Item(*self[:3], begin, end, *self[5:8], block_rows, self.causal, record, num_records)


class DividedRow(NamedTuple):
    """A row of a divided tile."""

    row: int
    record: int  # The row's first record.
    num_records: int
    # Index of the row's bits in the list, 32 to a number: whether each record is the last of its span.
    span_ends_at: int


def _as_dtype(record: type[tuple], size: int) -> np.dtype:
    """A structured dtype of int32 with the record's fields, padded to `size` numbers."""
    names = record._fields  # type: ignore[attr-defined]
    offsets = [4 * place for place in range(len(names))]
    return np.dtype(
        {"names": names, "formats": ["<i4"] * len(names), "offsets": offsets, "itemsize": 4 * size}
    )


HEADER = _as_dtype(Header, 8)
ITEM = _as_dtype(Item, 16)
DIVIDED_ROW = _as_dtype(DividedRow, 4)


def offset(record: np.dtype, field: str) -> int:
    """Index of a field among the int32 numbers of a record."""
    fields = record.fields
    assert fields is not None
    return fields[field][1] // 4


def header_of(numbers: np.ndarray) -> np.void:
    """The list's `HEADER`."""
    header: np.void = numbers[: HEADER.itemsize // 4].view(HEADER)[0]
    return header


class _Part(NamedTuple):
    """An item of a divided tile."""

    begin: int  # First segment.
    end: int  # End segment, exclusive.
    block_rows: int  # Rows of the diffusion block if the item adds it, else 0.
    span_ends: list[bool]  # For each record that it writes: whether that is the last of its span.


def plan_work(
    groups: Sequence[AttentionGroup], *, tile_rows: int, shared: bool, programs: int, capacity: int
) -> np.ndarray:
    """The work list of a pass, int32.

    tile_rows: most rows of a tile that is not shared.
    shared: whether to make shared tiles, each for two programs.
    programs: number of programs for each KV head. Work is divided so that each gets about the same number of keys, or with many
    rows every other one.
    capacity: the most records. A tile that would need more than are left is not divided.
    """
    tiles, trees, tables = _tiles(groups, 2 * tile_rows if shared else tile_rows)
    keys = sum([tile.num_keys for tile in tiles]) + sum([tree.num_keys for tree in trees])
    items: list[Item] = []
    divided: list[tuple[int, int, int, int]] = []  # By the fields of `DividedRow`.
    span_ends: list[int] = []
    used = 0
    # Keys of an item, for tiles that are not shared and for shared ones. A shared tile is for two programs. With many rows, other
    # tiles get as many keys, so that every other program has none.
    many = shared and sum([group.num_rows for group in groups]) >= _MANY_ROWS
    shares = [max(_SHORTEST, -(-keys * count // programs)) for count in (2 if many else 1, 2)]
    for tree in trees:
        runs = _runs(tree.trunk[0].num_keys, shares[tree.trunk[0].num_rows > tile_rows])
        if (records := tree.num_records(runs)) > capacity - used:
            tiles += tree.tiles
            continue
        items += tree.items(runs, used)
        divided += tree.divided_rows(runs, used, span_ends)
        used += records
    for tile in tiles:
        parts = _divide(tile, shares[tile.num_rows > tile_rows])
        bits = [bit for part in parts for bit in part.span_ends]
        if not parts or used + tile.num_rows * len(bits) > capacity:
            items.append(tile)
            continue
        record = used
        for part in parts:
            items.append(tile.part(part.begin, part.end, part.block_rows, record, len(bits)))
            record += len(part.span_ends)
        for row in range(tile.first_row, tile.first_row + tile.num_rows):
            divided.append((row, used, len(bits), len(span_ends)))
            used += len(bits)
        span_ends += _as_numbers(bits)
    # Shared items first. Within both kinds the longest come first: what runs last should be short.
    items.sort(key=lambda item: (item.num_rows <= tile_rows, -_length(item)))
    num_shared = sum([item.num_rows > tile_rows for item in items])
    return _as_list(items, num_shared, divided, span_ends, tables)


def _as_numbers(bits: Sequence[bool]) -> list[int]:
    """The bits as numbers of 32 bits each, the first bit lowest."""
    return [sum(bit << i for i, bit in enumerate(bits[at : at + 32])) for at in range(0, len(bits), 32)]


def _length(item: Item) -> int:
    """Keys of the item's segments."""
    return segment_start(item.end_segment) - segment_start(item.first_segment)


def _as_list(
    items: list[Item],
    num_shared: int,
    divided: list[tuple[int, int, int, int]],
    span_ends: list[int],
    tables: list[int],
) -> np.ndarray:
    """Concatenate the parts of the list. In `items` and `divided`, indices are relative to the part that they point into."""
    divided_at = (HEADER.itemsize + len(items) * ITEM.itemsize) // 4
    span_ends_at = divided_at + len(divided) * DIVIDED_ROW.itemsize // 4
    tables_at = span_ends_at + len(span_ends)
    numbers = np.zeros(tables_at + len(tables), np.int32)
    header = Header(len(items), num_shared, len(divided), divided_at)
    numbers[: len(header)] = header
    _fill(numbers[HEADER.itemsize // 4 : divided_at], items, ITEM, "table_at", tables_at)
    _fill(numbers[divided_at:span_ends_at], divided, DIVIDED_ROW, "span_ends_at", span_ends_at)
    numbers[span_ends_at:tables_at] = np.array(span_ends, np.uint32).view(np.int32)
    numbers[tables_at:] = tables
    return numbers


def _fill(
    numbers: np.ndarray, rows: Sequence[tuple[int, ...]], record: np.dtype, place: str, start: int
) -> None:
    """Write records, given as rows of their fields, to this part of the list. `start` is added to their field `place`.

    They are written as plain numbers, because numpy takes far longer to assign tuples to a structured array.
    """
    if rows:
        table = numbers.reshape(len(rows), record.itemsize // 4)
        width = len(rows[0])
        table[:, :width] = np.fromiter(chain.from_iterable(rows), np.int32, len(rows) * width).reshape(
            -1, width
        )
        table[:, offset(record, place)] += start


class _Tree(NamedTuple):
    """The tiles of a tree of drafts. All of its rows are divided where the trunk ends. The trunk may be divided further."""

    tiles: list[Item]  # The tiles of each group with all its keys, as without a tree.
    trunk: list[Item]  # Tiles of the rows of all groups, with the keys of the trunk.

    @property
    def num_keys(self) -> int:
        """Keys of all tiles. The trunk's keys count once for each tile of the trunk."""
        within = self.trunk[0].num_keys
        return sum(tile.num_keys - within for tile in self.tiles) + within * len(self.trunk)

    def _span_ends(self, tile: Item, runs: Sequence[tuple[int, int]]) -> list[bool]:
        """For each record of a row of `tile`: whether it is the last of its span. runs: runs of the trunk's segments."""
        behind = self.trunk[0].end_segment, tile.end_segment
        return [end for run in (*runs, behind) for end in ends_spans(tile.num_keys, *run)]

    def _stride(self, runs: Sequence[tuple[int, int]]) -> int:
        """How many records are kept for each row: the most that a row of the tree needs."""
        return max(len(self._span_ends(tile, runs)) for tile in self.tiles)

    def num_records(self, runs: Sequence[tuple[int, int]]) -> int:
        return self._stride(runs) * sum(tile.num_rows for tile in self.tiles)

    def items(self, runs: Sequence[tuple[int, int]], record: int) -> list[Item]:
        """The tree as items. record: the first record of the tree's first row."""
        items: list[Item] = []
        stride, first_row = self._stride(runs), self.tiles[0].first_row

        def add(tile: Item, begin: int, end: int) -> None:
            items.append(tile.part(begin, end, 0, record + (tile.first_row - first_row) * stride, stride))

        for begin, end in runs:
            for tile in self.trunk:
                add(tile, begin, end)
            record += len(ends_spans(self.tiles[0].num_keys, begin, end))
        for tile in self.tiles:
            add(tile, self.trunk[0].end_segment, tile.end_segment)
        return items

    def divided_rows(
        self, runs: Sequence[tuple[int, int]], record: int, span_ends: list[int]
    ) -> list[tuple[int, int, int, int]]:
        """The tree's rows as the fields of `DividedRow`. Appends their bits to `span_ends`."""
        rows: list[tuple[int, int, int, int]] = []
        stride, first_row = self._stride(runs), self.tiles[0].first_row
        for tile in self.tiles:
            bits = self._span_ends(tile, runs)
            rows += [
                (row, record + (row - first_row) * stride, len(bits), len(span_ends))
                for row in range(tile.first_row, tile.first_row + tile.num_rows)
            ]
            span_ends += _as_numbers(bits)
        return rows


def _tiles(groups: Sequence[AttentionGroup], most_rows: int) -> tuple[list[Item], list[_Tree], list[int]]:
    """The tiles of up to `most_rows` rows that are in no tree, as one item each; the trees; and all block tables concatenated."""
    tiles: list[Item] = []
    trees: list[_Tree] = []
    tables: list[int] = []
    branches = {i for i, group in enumerate(groups) if group.shared >= segment_start(1)}
    first = 0
    while first < len(groups):
        end = first + 1
        while end in branches:
            end += 1
        own: list[Item] = []
        for group in groups[first:end]:
            own += _tiles_of(group, len(tables), most_rows)
            tables.extend(group.pages)
        if end - first > 1:
            shared = min(group.shared for group in groups[first + 1 : end])
            trees.append(_Tree(own, _trunk(own, shared, most_rows)))
        else:
            tiles += own
        first = end
    return tiles, trees, tables


def _tiles_of(group: AttentionGroup, table_at: int, most_rows: int) -> list[Item]:
    writes_from = group.start if group.writes_from is None else group.writes_from
    tiles: list[Item] = []
    for at in range(0, group.num_rows, most_rows):
        rows = min(most_rows, group.num_rows - at)
        keys = group.start if group.diffusion else group.start + at + rows
        tiles.append(
            # By place, which takes a third of the time: there are hundreds in a pass.
            Item(
                group.first_row + at,
                rows,
                table_at,
                0,  # first_segment
                num_segments(keys),
                keys,
                writes_from,
                group.first_row,
                group.num_rows if group.diffusion else 0,
                int(not group.diffusion),
                -1,  # record
                0,  # num_records
            )
        )
    return tiles


def _trunk(tiles: Sequence[Item], shared: int, most_rows: int) -> list[Item]:
    """The tiles of a tree's trunk. tiles: of its groups. shared: keys in the pages that these share."""
    segments = num_segments(shared)
    segments -= segment_start(segments) > shared
    keys = segment_start(segments)
    first, end = tiles[0].first_row, tiles[-1].first_row + tiles[-1].num_rows
    return [
        tiles[0]._replace(
            first_row=row,
            num_rows=min(most_rows, end - row),
            end_segment=segments,
            num_keys=keys,
            writes_from=keys,
            block_row=row,
            causal=0,
        )
        for row in range(first, end, most_rows)
    ]


def _divide(tile: Item, share: int) -> list[_Part]:
    """The tile in parts of about `share` keys; none if it is not worth dividing."""
    if tile.num_keys < share or len(runs := _runs(tile.num_keys, share)) < 2:
        return []
    parts = [_Part(*run, 0, ends_spans(tile.num_keys, *run)) for run in runs]
    if not tile.block_rows:
        return parts
    last = parts.pop()
    begin, end, ends = last.begin, last.end, last.span_ends
    if share < _LONG_SHARE:  # The block is an item of its own, so it runs in parallel.
        return [*parts, _Part(begin, end, 0, [*ends[:-1], False]), _Part(end, end, tile.block_rows, [True])]
    if segment_start(end) <= spans_from(begin):
        # The last segment has a record of its own, and so has the block.
        ends = [*ends[:-1], False, True]
    return [*parts, _Part(begin, end, tile.block_rows, ends)]


def work_size(*, rows: int, programs: int, capacity: int, pages: int) -> int:
    """Length of the longest list for so many rows and pages, where every row is a tile, has a block, and is divided."""
    items, divided = 2 * (rows + programs) * ITEM.itemsize // 4, rows * DIVIDED_ROW.itemsize // 4
    return HEADER.itemsize // 4 + items + divided + rows + capacity // 32 + pages


def _runs(keys: int, share: int) -> list[tuple[int, int]]:
    """The segments of `keys` keys in runs of about `share` keys."""
    segments, parts = num_segments(keys), round(keys / share)
    if share == _SHORTEST and parts > 1:
        # There are enough programs for an item per segment. An item of two segments would take twice as long.
        return list(pairwise(range(segments + 1)))
    cuts = [nearest_segment(keys * part // parts) for part in range(1, parts)]
    return [(begin, end) for begin, end in pairwise([0, *cuts, segments]) if end > begin]
