"""The work list of attention: every row attends to every key once, in pieces of similar cost."""

from itertools import pairwise

import numpy as np
import pytest

from orthrus.kernels.attention import AttentionGroup
from orthrus.kernels.attention.segments import SPAN, num_segments, segment_start
from orthrus.kernels.attention.work_list import Item, header_of, plan_work, work_size
from tests.kernels.work_lists import divided_rows_of, items_of


def test_segments_tile_the_positions() -> None:
    edges = [0, *range(128, 1025, 128), *range(1536, 8193, 512), *range(9216, 32769, 1024), 34816, 36864]
    for index, (begin, end) in enumerate(pairwise(edges)):
        assert segment_start(index) == begin
        assert num_segments(begin + 1) == num_segments(end) == index + 1


WORK_GROUPS = [
    (32, 5000, False), (16, 0, False), (17, 300, True), (1, 9000, False), (70, 200, False), (33, 0, True), (20, 40_000, True)
]  # fmt: skip


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("programs", "capacity"), [(1, 0), (33, 1 << 15), (33, 900), (500, 1 << 15)])
def test_every_row_attends_to_every_key_once(shared: bool, programs: int, capacity: int) -> None:
    """With any tiles. A divided tile has as many records as its items write, and records of different rows do not overlap."""
    groups: list[AttentionGroup] = []
    rows = 0
    for count, start, diffusion in WORK_GROUPS:
        groups.append(AttentionGroup(rows, count, start, [len(groups) + 1] * (start // 64 + 2), diffusion))
        rows += count
    work = plan_work(groups, tile_rows=16, shared=shared, programs=programs, capacity=capacity)
    assert len(work) <= work_size(
        rows=rows, programs=programs, capacity=capacity, pages=sum(len(g.pages) for g in groups)
    )
    seen, own = np.zeros((rows, 40_001), int), np.zeros((rows, 33), int)
    items, divided = items_of(work), divided_rows_of(work)
    first_records = {row: record for row, record, _, _ in divided.tolist()}
    lengths = []
    for item in map(Item._make, items.tolist()):
        first, count = item.first_row, item.num_rows
        group = next(g for g in groups if g.first_row <= first < g.first_row + g.num_rows)
        at = slice(segment_start(item.first_segment), segment_start(item.end_segment))
        assert (item.writes_from, item.block_row, item.causal) == (
            group.start,
            group.first_row,
            not group.diffusion,
        )
        assert item.num_keys == group.limits[first + count - 1 - group.first_row]
        assert work[item.table_at] == group.pages[0]
        assert 0 < count <= (32 if shared else 16)
        seen[first : first + count, at.start : min(at.stop, item.num_keys)] += 1
        own[first : first + count, : item.block_rows] += 1
        assert (item.record >= 0) == (first in first_records) == (first + count - 1 in first_records)
        if item.record >= 0:
            assert first_records[first + count - 1] == first_records[first] + item.num_records * (count - 1)
        lengths.append(at.stop - at.start)
    for group in groups:
        for row, limit in enumerate(group.limits, group.first_row):
            assert (seen[row, :limit] == 1).all()
            assert own[row].sum() == (group.num_rows if group.diffusion else 0)
    # Shared items come first. Both kinds are sorted by length, the longest first.
    big = int((items["num_rows"] > 16).sum())
    assert header_of(work)["num_shared"] == big
    assert (big > 0) == shared
    assert all(list(kind) == sorted(kind, reverse=True) for kind in (lengths[:big], lengths[big:]))
    # The last record of a row ends its last span.
    assert bool(len(divided)) == (capacity > 0)
    spans = sorted((record, record + count) for _, record, count, _ in divided.tolist())
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    assert not spans or spans[-1][1] <= capacity
    for _, _, count, bits in divided.tolist():
        assert work[bits + (count - 1) // 32] >> (count - 1) % 32 & 1


def test_work_is_divided_evenly_and_a_whole_span_has_one_record() -> None:
    group = AttentionGroup(0, 32, 32_736, range(512), False)
    work = plan_work([group], tile_rows=16, shared=True, programs=33, capacity=1000)
    runs = items_of(work)[["first_segment", "end_segment"]].tolist()
    assert [segment_start(end) - segment_start(begin) for begin, end in runs] == [SPAN] * 16
    assert divided_rows_of(work)[["row", "record", "num_records"]].tolist()[0] == (0, 0, 16)


@pytest.mark.parametrize("keys", [200, 900, 1000, 1026, 2000])
def test_a_short_context_has_an_item_for_each_segment(keys: int) -> None:
    group = AttentionGroup(0, 1, keys - 1, range(40), False)
    work = plan_work([group], tile_rows=16, shared=True, programs=33, capacity=1000)
    count = num_segments(keys)
    runs = items_of(work)[["first_segment", "end_segment"]].tolist()
    assert sorted(runs) == [(i, i + 1) for i in range(count)]


def test_a_block_is_an_item_of_its_own_where_items_are_short() -> None:
    for start, blocks in ((992, [0] * 8 + [32]), (32_736, [0] * 15 + [32])):
        group = AttentionGroup(0, 32, start, range(512), True)
        work = plan_work([group], tile_rows=16, shared=True, programs=33, capacity=1000)
        assert sorted(items_of(work)["block_rows"].tolist()) == blocks


@pytest.mark.parametrize(
    ("sequences", "rows", "keys", "parts"),
    [
        (1, 1, 1024, 8),
        (4, 1, 1024, 8),
        (4, 16, 1024, 4),
        (16, 16, 1024, 1),
        (1, 1, 32768, 32),
        (1, 16, 32768, 16),
    ],
)
def test_many_rows_are_divided_less(sequences: int, rows: int, keys: int, parts: int) -> None:
    """Each part of a row has a record. With many rows, records cost more than programs without work."""
    groups = [AttentionGroup(i * rows, rows, keys - rows, range(512), False) for i in range(sequences)]
    work = plan_work(groups, tile_rows=16, shared=True, programs=33, capacity=4096)
    assert len(items_of(work)) == sequences * parts
