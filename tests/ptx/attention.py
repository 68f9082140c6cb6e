"""Cases of the attention kernel for Hopper (kernels/attention/hopper.py) and of the kernel that merges its records."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from orthrus.kernels.attention import (
    AttentionGroup,
    AttentionPlan,
    AttentionWork,
    hopper,
    merge,
    paged_attention,
)
from orthrus.kernels.attention.moving_blocks import MovingBlock, block_list
from orthrus.kernels.attention.place_blocks import place_blocks
from orthrus.kernels.attention.work_list import plan_work
from orthrus.kernels.rounding import Rounding
from orthrus.kernels.rows.sampling import noise_keys
from tests.ptx.launches import Edit, emulating
from tests.ptx.machine import Way
from tests.ptx.tensors import check, check_stored, int32, randn, unset

PAGE, KV_HEADS, QUERIES, KEYS = 64, 2, 64, 64
CAPACITY = 1000
LOG2_E = 1.4426950408889634
CPU = torch.device("cpu")


def groups_of(shapes: Sequence[tuple[int, int, bool]]) -> tuple[AttentionGroup, ...]:
    """Groups of (rows, position of the first, whether they are a diffusion block), with pages in a random order."""
    used = [-(-(start + rows) // PAGE) for rows, start, _ in shapes]
    order = torch.randperm(sum(used), generator=torch.Generator().manual_seed(3)) + 1
    groups: list[AttentionGroup] = []
    first = 0
    for (rows, start, diffusion), pages in zip(shapes, order.split(used), strict=True):
        groups.append(AttentionGroup(first, rows, start, pages.tolist(), diffusion))
        first += rows
    return tuple(groups)


def tree_of(start: int, longest: int) -> tuple[AttentionGroup, ...]:
    """A chain of 7 drafts and branches from its second, third and last, which share the pages before `start`."""
    shared = start // PAGE * PAGE
    pages = list(range(1, (start + 7) // PAGE + 2))
    groups = [AttentionGroup(0, 7, start, pages, False)]
    for number, (behind, rows) in enumerate([(2, 1), (3, 5), (7, longest)]):
        first = start + behind
        own = range(60 + 5 * number, 65 + 5 * number)
        row = groups[-1].first_row + groups[-1].num_rows
        table = [*pages[: first // PAGE], *own]
        groups.append(AttentionGroup(row, rows, first, table, False, start, shared=shared))
    return tuple(groups)


class Pass:
    """The tensors of a pass and its work list.

    divide: among how many programs long rows are divided; 0: no row is divided.
    """

    def __init__(
        self, groups: tuple[AttentionGroup, ...], per_kv: int, dim: int, divide: int, shared: bool
    ) -> None:
        rows = max(group.first_row + group.num_rows for group in groups)
        pages = 1 + max(max(group.pages, default=0) for group in groups)
        self.qkv = randn(rows, KV_HEADS * (per_kv + 2), dim, seed=7)
        self.keys, self.values = (randn(KV_HEADS, pages, PAGE, dim, seed=seed) for seed in (4, 5))
        self.scale = dim**-0.5
        numbers = plan_work(
            groups,
            tile_rows=max(1, QUERIES // per_kv),
            shared=shared,
            programs=max(1, divide),
            capacity=CAPACITY if divide else 0,
        )
        work = AttentionWork(torch.from_numpy(numbers), CAPACITY if divide else 0)
        self.plan = AttentionPlan(groups, PAGE, per_kv, CPU, work)

    def run(
        self, way: Way, programs: int, edit: Edit | None = None, rounding: Rounding | None = None
    ) -> Tensor:
        work = self.plan.work
        assert work is not None
        rows, all_heads, dim = self.qkv.shape
        heads = all_heads - 2 * KV_HEADS
        width = max(16, 1 << (dim - 1).bit_length())
        out = unset(rows, heads * dim, dtype=torch.float8_e4m3fn if rounding else torch.bfloat16)
        # Each of a program's two lanes has records beside those of divided rows.
        spare = work.capacity * heads
        places = spare + 2 * programs * QUERIES
        accs = unset(places, dim, dtype=torch.float32)
        tops, norms = (unset(places, dtype=torch.float32) for _ in range(2))
        records = accs, tops, norms
        with emulating(hopper, way, chained=(self.qkv, out, *records), edit=edit):
            hopper.launch(
                self.qkv, self.keys, self.values, self.plan, self.scale * LOG2_E, out, records, rounding,
                spare=spare, queries=QUERIES, keys=KEYS, width=width, programs=programs,
            )  # fmt: skip
        if work.capacity:
            with emulating(merge, way, chained=(out, *records)):
                merge.merge_records(work, out, records, rounding, dim=dim, width=width, programs=4)
        return out

    def exact(self, groups: tuple[AttentionGroup, ...]) -> Tensor:
        """The result for groups of the same rows, in float64."""
        plan = AttentionPlan(groups, PAGE, self.plan.heads_per_kv, CPU)
        return paged_attention(self.qkv.double(), self.keys.double(), self.values.double(), plan, self.scale)


def check_groups(
    way: Way, groups: tuple[AttentionGroup, ...], per_kv: int, dim: int, divide: int, *,
    programs: int = 2, edit: Edit | None = None,
) -> None:  # fmt: skip
    made = Pass(groups, per_kv, dim, divide, shared=True)
    check(made.run(way, programs, edit), made.exact(groups), 6e-3)


def check_results_in_e4m3(way: Way, divide: int, rounding: Rounding) -> None:
    """Rows of both views, stored for the next layer."""
    groups = groups_of([(20, 200, False), (3, 129, True)])
    made = Pass(groups, 4, 128, divide, shared=True)
    check_stored(made.run(way, 2, rounding=rounding), made.exact(groups), rounding)


def check_shapes(
    way: Way, shapes: Sequence[tuple[int, int, bool]], per_kv: int, dim: int, divide: int, programs: int = 2
) -> None:
    check_groups(way, groups_of(shapes), per_kv, dim, divide, programs=programs)


def check_tree(way: Way, start: int, per_kv: int, divide: int, longest: int = 20) -> None:
    """A tree of drafts, whose groups share pages, and a sequence beside it."""
    tree = tree_of(start, longest)
    rows = tree[-1].first_row + tree[-1].num_rows
    beside = AttentionGroup(rows, 4, 300, [80, 81, 82, 83, 84], False)
    check_groups(way, (*tree, beside), per_kv, 128, divide)


def check_moved_block(way: Way, furthest: int, right: int, divide: int) -> None:
    """A diffusion block that was planned behind 3 drafts, and is moved to its place behind those that are right.

    furthest: the position that it was planned for. Another sequence is beside it.
    """
    drafts = [10, 11, 12]
    rows, most = 16, len(drafts)
    planned = groups_of([(rows, furthest, True), (5, 200, False)])
    made = Pass(planned, 4, 128, divide, shared=True)
    picks = int32(*[7 if number == right else drafts[min(number, 2)] for number in range(4)])
    keys = noise_keys([3] * (most + rows), range(most + rows))
    block = MovingBlock(0, rows, 0, rows, 0, drafts, most, keys)
    total = rows + 5
    positions = torch.arange(furthest, furthest + total, dtype=torch.int32)
    assert made.plan.work is not None
    place_blocks(
        torch.from_numpy(block_list([block])), 1, picks, torch.zeros(total, dtype=torch.int32), positions,
        torch.zeros(rows, 2, dtype=torch.int32), made.plan.work.numbers,
    )  # fmt: skip
    assert positions[0] == furthest - (most - right)
    moved = replace(planned[0], start=furthest - (most - right))
    check(made.run(way, 2), made.exact((moved, planned[1])), 6e-3)
