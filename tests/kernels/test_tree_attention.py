"""Attention of trees of drafts: the trunk that their groups share, and draft blocks that follow a tree."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from orthrus.kernels.attention import (
    AttentionGroup,
    AttentionPlan,
    AttentionWork,
    paged_attention,
    place_blocks_triton,
)
from orthrus.kernels.attention import gpu as attention_gpu
from orthrus.kernels.attention.moving_blocks import MovingBlock, VerifiedTree, block_list
from orthrus.kernels.attention.place_blocks import place_blocks
from orthrus.kernels.attention.segments import segment_start
from orthrus.kernels.attention.work_list import Item, plan_work, work_size
from orthrus.kernels.rows import copy_pages_triton
from orthrus.kernels.rows.copy_pages import addresses_of, copy_pages
from orthrus.kernels.rows.sampling import noise_keys
from tests.kernels.interpreted import CPU, assert_near, int32, interpreted, randn
from tests.kernels.work_lists import divided_rows_of, items_of

PAGE, KV_HEADS, PER_KV = 64, 1, 4


def tree(start: int, first_row: int = 0, longest: int = 40) -> list[AttentionGroup]:
    """A chain of 7 rows and branches from its second, third and last row, with pages of their own from there on.

    longest: rows of the branch from the last row.
    """
    here = start // PAGE * PAGE
    main = list(range(1, (start + 7) // PAGE + 2))
    groups = [AttentionGroup(first_row, 7, start, main, False)]
    for number, (behind, rows) in enumerate([(2, 1), (3, 5), (7, longest)], 1):
        first = start + behind
        own = range(40 + 5 * number, 45 + 5 * number)
        row = groups[-1].first_row + groups[-1].num_rows
        groups.append(
            AttentionGroup(row, rows, first, [*main[: first // PAGE], *own], False, start, shared=here)
        )
    return groups


@pytest.mark.parametrize("start", [20, 130, 1000, 1090, 2044, 5000, 40_000])
@pytest.mark.parametrize(("programs", "capacity"), [(1, 1 << 15), (33, 1 << 15), (500, 1 << 15), (33, 10)])
def test_every_row_of_a_tree_attends_to_every_key_once(start: int, programs: int, capacity: int) -> None:
    groups = [*tree(start), AttentionGroup(53, 4, 300, [9] * 6, False), *tree(start + 3, 57)]
    rows = 57 + 53
    work = plan_work(groups, tile_rows=16, shared=True, programs=programs, capacity=capacity)
    assert len(work) <= work_size(
        rows=rows, programs=programs, capacity=capacity, pages=sum(len(group.pages) for group in groups)
    )
    by_row = {row: g for g in groups for row in range(g.first_row, g.first_row + g.num_rows)}
    seen = np.zeros((rows, start + 60), int)
    written: dict[int, list[int]] = {row: [] for row in by_row}
    for item in map(Item._make, items_of(work).tolist()):
        begin, end = (segment_start(at) for at in (item.first_segment, item.end_segment))
        assert 0 < item.num_rows <= 32
        for row in range(item.first_row, item.first_row + item.num_rows):
            group, last = by_row[row], item.first_row + item.num_rows - 1
            keys = min(item.num_keys - (last - row) * item.causal, end)
            assert keys <= group.start + row - group.first_row + 1
            seen[row, begin:keys] += 1
            # The pages are the row's own.
            used = slice(begin // PAGE, -(-keys // PAGE))
            table = work[item.table_at :][: len(group.pages)].tolist()
            assert table[used] == list(group.pages)[used]
            if item.record >= 0:
                written[row].append(item.record + (row - item.first_row) * item.num_records)
    for row, group in by_row.items():
        limit = group.start + row - group.first_row + 1
        assert (seen[row, :limit] == 1).all() and not seen[row, limit:].any()
    spans = sorted((record, record + count) for _, record, count, _ in divided_rows_of(work).tolist())
    assert all(a[1] <= b[0] for a, b in pairwise(spans)) and (not spans or spans[-1][1] <= capacity)
    for row, record, count, bits in divided_rows_of(work).tolist():
        assert all(record <= first < record + count for first in written[row]) and record in written[row]
        assert work[bits + (count - 1) // 32] >> (count - 1) % 32 & 1


def test_the_keys_of_the_trunk_are_read_once_for_all_runs() -> None:
    groups = tree(1100)
    work = plan_work(groups, tile_rows=16, shared=True, programs=33, capacity=1 << 15)
    apart = [replace(group, shared=0) for group in groups]
    alone = plan_work(apart, tile_rows=16, shared=True, programs=33, capacity=1 << 15)

    def keys(numbers: np.ndarray) -> int:
        return sum(
            min(segment_start(item["end_segment"]), item["num_keys"]) - segment_start(item["first_segment"])
            for item in items_of(numbers)
        )

    # Two tiles of rows for the trunk's 1,024 keys, and a tile and a half for each run behind it.
    assert keys(work) < 2 * 1024 + 6 * 130
    assert keys(alone) > 4 * 1100


@interpreted
@pytest.mark.parametrize(("start", "programs"), [(170, 1), (170, 100), (2100, 4)])
def test_a_row_of_a_tree_has_the_bits_of_a_row_alone(start: int, programs: int) -> None:
    groups = tree(start, longest=20)
    rows = sum(group.num_rows for group in groups)
    qkv = randn(rows, KV_HEADS * (PER_KV + 2), 16).half()
    keys, values = (randn(KV_HEADS, 70, PAGE, 16, seed=s, dtype=torch.float16) for s in (1, 2))

    def attend(groups: list[AttentionGroup], qkv: torch.Tensor, programs: int) -> torch.Tensor:
        numbers = plan_work(groups, tile_rows=16, shared=False, programs=programs, capacity=2000)
        work = AttentionWork(torch.from_numpy(numbers), 2000)
        plan = AttentionPlan(tuple(groups), PAGE, PER_KV, CPU, work)
        return attention_gpu.paged_attention(qkv, keys, values, plan, 0.25)

    whole = attend(groups, qkv, programs)
    plan = AttentionPlan(tuple(groups), PAGE, PER_KV, CPU)
    assert_near(whole, paged_attention(qkv.double(), keys.double(), values.double(), plan, 0.25))
    # The last row of each run, which sees all of the run's pages.
    for group in groups:
        alone = AttentionGroup(0, 1, group.start + group.num_rows - 1, group.pages, False)
        at = group.first_row + group.num_rows - 1
        assert torch.equal(attend([alone], qkv[at : at + 1], 3)[0], whole[at]), group


# The newest token is followed by drafts 0 - 1 - 2. Draft 0 is also followed by 3 - 4, and 4 by 5.
TREE = VerifiedTree([-1, 0, 1, 0, 3, 4], [0, 0, 0, 1, 1, 2], 3, [[31, 32], [33, 34], [35, 36]])
DRAFTS = [10, 11, 12, 13, 14, 15]


@interpreted
@pytest.mark.parametrize(
    ("picks", "last", "right", "group"),
    [
        ([7, 0, 0, 0, 0, 0, 0], -1, 0, 0),
        ([10, 11, 7, 0, 0, 0, 0], 1, 2, 0),
        ([10, 11, 12, 7, 14, 15, 0], 2, 3, 0),
        ([10, 13, 0, 0, 7, 15, 0], 3, 2, 1),
        ([10, 13, 0, 0, 14, 15, 7], 5, 4, 2),
    ],
)
def test_a_block_after_a_tree_begins_after_the_last_right_draft(
    picks: list[int], last: int, right: int, group: int
) -> None:
    """It has the position, the noise and the pages of a block that was planned there."""
    furthest, first_pick = 261, 40
    table = [1, 2, 3, 31, 32]
    block = AttentionGroup(0, 3, furthest, table, True)
    moving = MovingBlock(0, 3, 1, 2, first_pick, DRAFTS, 4, noise_keys([3] * 6, range(257, 263)), TREE)
    start = furthest - 4 + right
    known = replace(block, start=start, pages=[*table[:3], *TREE.pages[group]])
    qkv = randn(3, KV_HEADS * (PER_KV + 2), 16).half()
    keys, values = (randn(KV_HEADS, 70, PAGE, 16, seed=s, dtype=torch.float16) for s in (1, 2))

    def attend(numbers: torch.Tensor) -> torch.Tensor:
        plan = AttentionPlan((), PAGE, PER_KV, CPU, AttentionWork(numbers, 1000))
        return attention_gpu.paged_attention(qkv, keys, values, plan, 0.25)

    def work(group: AttentionGroup) -> torch.Tensor:
        return torch.from_numpy(
            plan_work([group], tile_rows=4, shared=False, programs=4, capacity=1000).copy()
        )

    listed = torch.from_numpy(block_list([moving]))
    picked = int32(*[99] * first_pick, *picks)
    outputs: list[torch.Tensor] = []
    for place in (place_blocks, place_blocks_triton.place_blocks):
        numbers, tokens, positions = work(block), int32(0, 6, 6), int32(*range(furthest, furthest + 3))
        noise = torch.zeros(3, 2, dtype=torch.int32)
        place(listed, 1, picked, tokens, positions, noise, numbers)
        assert tokens.tolist() == [-1 - (first_pick + last + 1), 6, 6]
        assert positions.tolist() == list(range(start, start + 3))
        assert torch.equal(noise[1:], torch.from_numpy(noise_keys([3] * 2, [257 + right, 258 + right])))
        outputs.append(numbers)
    assert torch.equal(*outputs)
    assert torch.equal(attend(numbers), attend(work(known)))


@interpreted
def test_the_first_positions_of_pages_are_copied_in_all_caches() -> None:
    caches = [randn(KV_HEADS, 9, PAGE, 16, seed=s, dtype=torch.float16) for s in range(3)]
    expected, got = ([cache.clone() for cache in caches] for _ in range(2))
    copies = int32(3, 5, 17, 4, 8, PAGE, 1, 2, 30)
    copy_pages(expected, addresses_of(expected), copies, 2)
    copy_pages_triton.copy_pages(got[0], addresses_of(got), copies, 2)
    for ours, theirs, before in zip(got, expected, caches, strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours[:, 5, :17], before[:, 3, :17]) and torch.equal(ours[:, 8], before[:, 4])
        changed = (ours != before).flatten(2).any(2).any(0).nonzero().flatten().tolist()
        assert changed == [5, 8]
