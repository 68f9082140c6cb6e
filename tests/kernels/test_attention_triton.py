"""The Triton kernels of attention in the interpreter: near float64, and batch-invariant."""

from collections.abc import Callable
from dataclasses import replace

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
from orthrus.kernels.attention.moving_blocks import MovingBlock, block_list
from orthrus.kernels.attention.place_blocks import place_blocks
from orthrus.kernels.attention.work_list import plan_work
from orthrus.kernels.rows import qk_norm_rope_triton
from orthrus.kernels.rows.qk_norm_rope import qk_norm_rope
from orthrus.kernels.rows.sampling import noise_keys
from orthrus.kernels.rows.types import KVWrites
from tests.kernels.interpreted import CPU, assert_near, int32, interpreted, randn
from tests.kernels.work_lists import items_of

pytestmark = interpreted

PAGE, KV_HEADS = 64, 2


def attention_case(
    groups: list[tuple[int, int, bool]], per_kv: int, dtype: torch.dtype, dim: int = 16, padding: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionPlan]:
    """qkv, the caches, and a plan for groups (rows, start, diffusion). A group's numbers depend on its start alone."""
    heads = KV_HEADS * (per_kv + 2)
    rows: list[torch.Tensor] = []
    plan: list[AttentionGroup] = []
    for count, start, diffusion in groups:
        pages = torch.randperm(99, generator=torch.Generator().manual_seed(start))[
            : (start + count) // PAGE + 1
        ]
        first_row = sum(len(part) for part in rows)
        plan.append(AttentionGroup(first_row, count, start, (pages + 1).tolist(), diffusion))
        rows.append(randn(150, heads, dim, seed=20 + start)[:count])
    rows.append(torch.full((padding, heads, dim), float("nan")))
    keys, values = (randn(KV_HEADS, 100, PAGE, dim, seed=s, dtype=dtype) for s in (1, 2))
    return torch.cat(rows).to(dtype), keys, values, AttentionPlan(tuple(plan), PAGE, per_kv, CPU)


def with_work(plan: AttentionPlan, tile_rows: int, programs: int) -> AttentionPlan:
    """The plan with a work list. With more programs, items have fewer segments. With 0 programs, every tile is one item."""
    capacity = 1000 if programs else 0
    numbers = plan_work(
        plan.groups, tile_rows=tile_rows, shared=False, programs=max(1, programs), capacity=capacity
    )
    return replace(plan, work=AttentionWork(torch.from_numpy(numbers), capacity))


@pytest.mark.parametrize(
    ("groups", "per_kv", "dtype"),
    [
        ([(4, 0, False), (2, 37, False), (1, 260, False)], 3, torch.float16),
        ([(4, 0, False), (2, 37, False), (1, 260, False)], 3, torch.float32),
        ([(3, 1022, False), (3, 140, True)], 2, torch.float16),
        ([(4, 0, True), (2, 1, True), (2, 1100, True)], 2, torch.float16),
        ([(3, 140, True)], 2, torch.float32),
        ([(1, 40, False)], 5, torch.float16),
        ([(3, 2046, False), (2, 4100, True), (1, 2048, True)], 2, torch.float16),
    ],
)
def test_attention_matches_its_reference_however_the_work_is_divided(
    groups: list[tuple[int, int, bool]], per_kv: int, dtype: torch.dtype
) -> None:
    qkv, keys, values, plan = attention_case(groups, per_kv, dtype, padding=3)
    num_rows = qkv.shape[0]
    exact = paged_attention(qkv.double(), keys.double(), values.double(), plan, 0.25)[: num_rows - 3]
    results = [
        attention_gpu.paged_attention(qkv, keys, values, with_work(plan, 3, programs), 0.25)
        for programs in (100, 3, 0)
    ]
    for result in results:
        assert torch.equal(result[: num_rows - 3], results[0][: num_rows - 3])
    assert_near(results[0][: num_rows - 3], exact)


def test_attention_is_batch_invariant() -> None:
    """Rows alone, on both sides of a segment's end within a group, and together with so many that heads are merged together."""
    qkv, keys, values, plan = attention_case([(20, 250, False), (20, 300, False)], 4, torch.float16)
    full = attention_gpu.paged_attention(qkv, keys, values, with_work(plan, 4, 4), 0.25)
    for g, row in ((0, 0), (0, 5), (0, 6), (0, 19), (1, 3), (1, 18)):
        group = plan.groups[g]
        alone = replace(plan, groups=(replace(group, first_row=0, num_rows=1, start=group.start + row),))
        at = 20 * g + row
        out = attention_gpu.paged_attention(qkv[at : at + 1], keys, values, with_work(alone, 4, 4), 0.25)
        assert torch.equal(out[0], full[at]), (g, row)


@pytest.mark.parametrize(("furthest", "missing"), [(272, 1), (272, 127), (1040, 60)])
def test_a_block_that_is_moved_back_has_the_bits_of_one_planned_there(furthest: int, missing: int) -> None:
    """Also if it is moved back over the end of a segment."""
    drafts = list(range(127))
    blocks = [(2, 300, True), (3, furthest, True)]
    qkv, keys, values, plan = attention_case(blocks, 2, torch.float16)
    other, block = plan.groups
    known = replace(plan, groups=(other, replace(block, start=furthest - missing)))
    exact = attention_gpu.paged_attention(qkv, keys, values, with_work(known, 4, 3), 0.25)
    picks = torch.tensor([*drafts[: 127 - missing], *[-5] * (missing + 1)], dtype=torch.int32)
    moving = MovingBlock(2, 3, 1, 2, 0, drafts, 127, noise_keys([3] * 129, range(900, 1029)))
    for programs in (0, 3, 100):
        moved = with_work(plan, 4, programs)
        assert moved.work is not None
        outputs: list[torch.Tensor] = []
        for place in (place_blocks, place_blocks_triton.place_blocks):
            work = moved.work.numbers.clone()
            tokens, positions = int32(4, 6, 0, 6, 6), int32(300, 301, *range(furthest, furthest + 3))
            noise = torch.zeros(5, 2, dtype=torch.int32)
            place(torch.from_numpy(block_list([moving])), 1, picks, tokens, positions, noise, work)
            outputs.append(torch.cat([tokens, positions, noise.flatten(), work]))
        assert torch.equal(outputs[0], outputs[1])
        placed = replace(moved, work=replace(moved.work, numbers=work))
        assert torch.equal(attention_gpu.paged_attention(qkv, keys, values, placed, 0.25), exact), programs
        assert positions.tolist() == [300, 301, *range(furthest - missing, furthest - missing + 3)]
        assert tokens.tolist() == [4, 6, -1 - (127 - missing), 6, 6]


def test_a_block_longer_than_a_segment_has_one_record() -> None:
    qkv, keys, values, plan = attention_case([(2, 90, False), (130, 140, True)], 1, torch.float16)
    whole, divided = (
        attention_gpu.paged_attention(qkv, keys, values, with_work(plan, 64, programs), 0.25)
        for programs in (0, 20)
    )
    assert torch.equal(divided, whole)
    assert_near(whole, paged_attention(qkv.double(), keys.double(), values.double(), plan, 0.25))


def test_attention_refuses_pages_that_tiles_of_keys_would_straddle() -> None:
    qkv, keys, values, plan = attention_case([(1, 40, False)], 2, torch.float16)
    keys, values = (cache.view(KV_HEADS, 200, 32, 16) for cache in (keys, values))
    with pytest.raises(ValueError, match="page_size must be a multiple of 64"):
        attention_gpu.paged_attention(qkv, keys, values, with_work(plan, 4, 4), 0.25)


@pytest.mark.parametrize("programs", [0, 3])
def test_a_block_reads_the_keys_that_rows_of_its_own_pass_write(programs: int) -> None:
    """A draft block anchored behind 6 verify rows of the same pass sees these rows' keys, as in two passes."""
    rows, block, start, per_kv, dim = 6, 5, 200, 2, 16
    pages = [4, 2, 7, 5]
    heads = KV_HEADS * (per_kv + 2)
    group = AttentionGroup(0, rows, start, pages, False)
    behind = AttentionGroup(rows, block, start + rows, pages, True, writes_from=start)
    plan = AttentionPlan((group, behind), PAGE, per_kv, CPU)
    inputs = randn(rows + block, heads, dim)
    weight, angles = torch.ones(2, heads - KV_HEADS, dim), torch.ones(rows + block, 1, dim)
    slots = torch.tensor(
        [pages[p // PAGE] * PAGE + p % PAGE for p in range(start, start + rows)] + [0] * block
    ).int()

    def run(
        attend: Callable[..., torch.Tensor],
        norm: Callable[..., None],
        plan: AttentionPlan,
        stale: bool = False,
    ) -> torch.Tensor:
        qkv = inputs.clone()
        caches = [randn(KV_HEADS, 8, PAGE, dim, seed=s) for s in (1, 2)]
        written = [cache.clone() if stale else cache for cache in caches]
        norm(
            qkv,
            weight,
            angles,
            0 * angles,
            1e-6,
            int32(rows),
            KVWrites.single(slots),
            *(c.flatten(1, 2) for c in written),
        )
        return attend(qkv, *caches, plan, 0.25)

    work = with_work(plan, 4, programs)
    assert work.work is not None
    items = items_of(work.work.numbers.numpy())
    assert (items["writes_from"] == start).all()
    together = run(attention_gpu.paged_attention, qk_norm_rope_triton.qk_norm_rope, work)
    assert_near(together, run(paged_attention, qk_norm_rope, plan))
    # With the cache from before the pass, the result would differ.
    assert (together[rows:] - run(paged_attention, qk_norm_rope, plan, stale=True)[rows:]).abs().max() > 0.05
