"""Paged attention on a GPU whose copy engine can fill shared memory by itself (compute capability 9.0 on).

The arithmetic of `attention_triton`, in the order that its work list gives. A multiprocessor's program has two consumers of 64
queries each, and producers, warps that only ask for tiles of keys or of values ahead of the consumers. A consumer, two
producers and every other place of the rings of tiles make a lane. The rows of a shared item go to both consumers, which
read the same tiles, so that they cross the L2 cache once for 128 queries; the lanes' producers take turns with them.
Afterwards a lane goes through items of one consumer's rows by itself. What a row goes through, and in which order, is the
same either way: two tiles, 128 keys, are one step of its running softmax.

Keys that this pass doesn't write are fetched before the kernels ahead in the stream have finished. A diffusion block's own keys
are further tiles. All that is read is finite, see `qk_norm_rope`, so that hidden keys take part as 0 x something.

Written in Gluon, Triton's language for explicit shared memory and copies; there is no interpreter for it.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.attention_work import HEADER, ITEM
from kernels.device import chaining

if TYPE_CHECKING:
    from kernels.attention import AttentionPlan

_SHARED_BYTES = 227 * 1024
"""Of a multiprocessor."""
_OTHER_BYTES = 2048
"""Of it for mbarriers and what the warps hand each other."""


@gluon.jit
def _segment_start(index):
    """`attention_work.segment_start`."""
    near, middle = index * 128, 1024 + (index - 8) * 512
    far, farther = 8192 + (index - 22) * 1024, 32768 + (index - 46) * 2048
    return gl.where(index < 22, gl.where(index < 8, near, middle), gl.where(index < 46, far, farther))


@gluon.jit
def _share(work, LANE: gl.constexpr, KV_HEADS: gl.constexpr, PROGRAMS: gl.constexpr):
    """A lane's part of the work list: how many shared items, how many of its own, the index of the first of these.

    Shared items go round the programs; the others go on where they end, first to one lane of each program.
    """
    program = gl.program_id(0)
    count, shared = gl.load(work) * KV_HEADS, gl.load(work + 1) * KV_HEADS
    first = shared + (program + PROGRAMS - shared % PROGRAMS) % PROGRAMS + LANE * PROGRAMS
    together = gl.cdiv(gl.maximum(shared - program, 0), PROGRAMS)
    return together, gl.cdiv(gl.maximum(count - first, 0), 2 * PROGRAMS), first


@gluon.jit
def _index(turn, together, first, PROGRAMS: gl.constexpr):
    """Which item a lane takes in its `turn`."""
    return gl.where(
        turn < together, gl.program_id(0) + turn * PROGRAMS, first + (turn - together) * 2 * PROGRAMS
    )


@gluon.jit
def _keys(item, KEYS: gl.constexpr):
    """An item's first cached key and the one behind its last, and its steps over cached keys and over its block's."""
    begin = _segment_start(gl.load(item + 3))
    end = gl.minimum(_segment_start(gl.load(item + 4)), gl.load(item + 5))
    return begin, end, gl.cdiv(gl.maximum(end - begin, 0), 2 * KEYS), gl.cdiv(gl.load(item + 8), 2 * KEYS)


@gluon.jit
def _advance(place, phase, step, RING: gl.constexpr):
    """The place in the ring `step` places on, and its phase."""
    place += step
    wraps = place >= RING
    return gl.where(wraps, place - RING, place), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def _produce(
    pages, rows_desc, work, slots, ring, full, empty,
    FIRST_COLUMN: gl.constexpr, LANE: gl.constexpr, KV_HEADS: gl.constexpr, PAGE: gl.constexpr, DIM: gl.constexpr,
    PROGRAMS: gl.constexpr, BEFORE: gl.constexpr, PER: gl.constexpr, CHAINED: gl.constexpr,
):  # fmt: skip
    """Fetch a lane's tiles of keys or of values: all of its own items, every other one of the shared items.

    From `pages` of the cache, and of blocks from the pass's rows, where FIRST_COLUMN is that of the first KV head.
    """
    RING: gl.constexpr = ring.shape[0]
    KEYS: gl.constexpr = ring.shape[1]
    tile_bytes: gl.constexpr = KEYS * ring.shape[2] * ring.dtype.primitive_bitwidth // 8
    together, alone, first = _share(work, LANE, KV_HEADS, PROGRAMS)
    place, phase, ahead = LANE, 0, CHAINED
    for turn in range(together + alone):
        index = _index(turn, together, first, PROGRAMS)
        item, kv_head = work + BEFORE + index // KV_HEADS * PER, index % KV_HEADS
        begin, end, cached_steps, block_steps = _keys(item, KEYS)
        table, fresh, block_row = work + gl.load(item + 2), gl.load(item + 6), gl.load(item + 7)
        shared = turn < together
        stride = gl.where(shared, 2, 1)
        start = gl.where(shared, LANE, 0)
        cached_tiles = 2 * cached_steps
        # Past the end, page 0, which is nobody's.
        page = gl.load(table + (begin + start * KEYS) // PAGE, mask=begin + start * KEYS < end, other=0)
        for tile in range(start, cached_tiles + 2 * block_steps, stride):
            at = begin + tile * KEYS
            # The next page is looked up while this tile waits for room.
            next_at = at + stride * KEYS
            next_page = gl.load(table + next_at // PAGE, mask=next_at < end, other=0)
            cached = tile < cached_tiles
            if ahead & ((tile >= cached_tiles) | (gl.minimum(at + KEYS, end) > fresh)):
                gdc_wait()
                ahead = False
            slot = kv_head * slots + page * PAGE + at % PAGE
            row, column = block_row + (tile - cached_tiles) * KEYS, FIRST_COLUMN + kv_head * DIM
            mbarrier.wait(empty.index(place), phase ^ 1)
            mbarrier.expect(full.index(place), tile_bytes)
            if cached:
                tma.async_copy_global_to_shared(pages, [slot, 0], full.index(place), ring.index(place))
            else:
                tma.async_copy_global_to_shared(
                    rows_desc, [row, column], full.index(place), ring.index(place)
                )
            place, phase = _advance(place, phase, 2, RING)
            page = next_page


@gluon.jit
def _leave(empty, place, second, shared):
    """Give two places back: when both consumers have said so, or the one that has them for itself has said it twice."""
    if shared:
        mbarrier.arrive(empty.index(place), count=1)
        mbarrier.arrive(empty.index(second), count=1)
    else:
        mbarrier.arrive(empty.index(place), count=2)
        mbarrier.arrive(empty.index(second), count=2)


@gluon.jit
def _merge(seen, top, norm, acc, part_top, part_norm, part_acc, layout: gl.constexpr):
    """Put a segment's running softmax behind what came before it, for the rows that have `seen` it."""
    new_top = gl.maximum(top, part_top)
    base = gl.where(new_top == float("-inf"), 0.0, new_top)
    old, new = gl.exp2(top - base), gl.exp2(part_top - base)
    norm = gl.where(seen, gl.fma(norm, old, part_norm * new), norm)
    wide: gl.constexpr = gl.SliceLayout(1, layout)
    old, new = gl.convert_layout(old, wide)[:, None], gl.convert_layout(new, wide)[:, None]
    merged = gl.fma(acc, gl.zeros_like(acc) + old, part_acc * new)
    acc = gl.where(gl.convert_layout(seen, wide)[:, None], merged, acc)
    return gl.where(seen, new_top, top), norm, acc


@gluon.jit
def _end_segment(
    divided, tops, norms, partials, record, heads, head, inside, seen, top, norm, acc, part_top, part_norm, part_acc,
    DIM: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Leave a segment's running softmax in each query's `record` where the tile is divided, else merge it."""
    if divided:
        at = record.to(gl.int64) * heads + head
        gl.store(tops + at, part_top, mask=inside)
        gl.store(norms + at, part_norm, mask=inside)
        wide: gl.constexpr = gl.SliceLayout(1, layout)
        dims = gl.arange(0, part_acc.shape[1], gl.SliceLayout(0, layout))
        place = gl.convert_layout(at, wide)[:, None] * DIM + dims[None, :]
        mask = gl.convert_layout(inside, wide)[:, None] & (dims < DIM)[None, :]
        gl.store(partials + place, part_acc, mask=mask)
    else:
        top, norm, acc = _merge(seen, top, norm, acc, part_top, part_norm, part_acc, layout)
    return top, norm, acc


@gluon.jit
def _consume(
    qkv, work, limits, records, out, partials, tops, norms, scale, query_tile, k_ring, v_ring, k_full, v_full,
    k_empty, v_empty, LANE: gl.constexpr, PER_KV: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr, PROGRAMS: gl.constexpr,
    BEFORE: gl.constexpr, PER: gl.constexpr, CHAINED: gl.constexpr,
):  # fmt: skip
    """Attend with a lane's queries: its half of the rows of shared items, then all rows of its own items."""
    QUERIES: gl.constexpr = query_tile.shape[0]
    RING: gl.constexpr = k_ring.shape[0]
    KEYS: gl.constexpr = k_ring.shape[1]
    WIDTH: gl.constexpr = k_ring.shape[2]
    ROWS: gl.constexpr = QUERIES // PER_KV
    num_warps: gl.constexpr = gl.num_warps()
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, KEYS, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, WIDTH, 16])
    by_query: gl.constexpr = gl.SliceLayout(1, scores_layout)
    by_key: gl.constexpr = gl.SliceLayout(0, scores_layout)
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    load_lanes: gl.constexpr = min(32, WIDTH // 8)
    load_layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [32 // load_lanes, load_lanes], [num_warps, 1], [1, 0]
    )
    heads: gl.constexpr = KV_HEADS * PER_KV

    query_index = gl.arange(0, QUERIES, by_query)
    load_index = gl.arange(0, QUERIES, gl.SliceLayout(1, load_layout))
    load_dims = gl.arange(0, WIDTH, gl.SliceLayout(0, load_layout))
    keys = gl.arange(0, KEYS, by_key)
    none = gl.zeros((QUERIES, KEYS), gl.float32, scores_layout)
    together, alone, first = _share(work, LANE, KV_HEADS, PROGRAMS)
    if CHAINED:
        gdc_wait()
    place, phase = 0, 0
    for turn in range(together + alone):
        shared = turn < together
        stride = gl.where(shared, 1, 2)
        if (turn == together) & (LANE == 1):
            place, phase = _advance(place, phase, 1, RING)
        index = _index(turn, together, first, PROGRAMS)
        item, kv_head = work + BEFORE + index // KV_HEADS * PER, index % KV_HEADS
        first_row, rows = gl.load(item), gl.load(item + 1)
        if LANE == 1:
            first_row += gl.where(shared, ROWS, 0)
            rows -= gl.where(shared, ROWS, 0)
        segment, last_segment, block = gl.load(item + 3), gl.load(item + 4), gl.load(item + 8)
        begin, _, cached_steps, block_steps = _keys(item, KEYS)
        # A KV head's queries: all its query heads of a row, then the next row's.
        row = first_row + query_index // PER_KV
        head = kv_head * PER_KV + query_index % PER_KV
        inside = query_index // PER_KV < gl.minimum(rows, ROWS)
        limit = gl.load(limits + row, mask=inside, other=0)
        record = gl.load(records + row, mask=inside, other=-1)
        divided = gl.load(records + first_row) >= 0
        common = gl.load(limits + first_row)  # Keys that all rows see: the first row sees least.

        load_row = first_row + load_index // PER_KV
        load_head = kv_head * PER_KV + load_index % PER_KV
        source = (load_row * (heads + 2 * KV_HEADS) + load_head).to(gl.int64) * DIM
        mask = (load_index // PER_KV < gl.minimum(rows, ROWS))[:, None] & (load_dims < DIM)[None, :]
        query_tile.store(gl.load(qkv + source[:, None] + load_dims[None, :], mask=mask, other=0.0))
        fence_async_shared()

        top = gl.full((QUERIES,), float("-inf"), gl.float32, by_query)
        norm = gl.zeros((QUERIES,), gl.float32, by_query)
        acc = gl.zeros((QUERIES, WIDTH), gl.float32, acc_layout)
        part_top, part_norm, part_acc = top, norm, acc
        here, next_start = begin, _segment_start(segment + 1)
        for step in range(cached_steps + block_steps):
            in_block = step >= cached_steps
            if gl.where(in_block, step == cached_steps, here == next_start) & (step > 0):
                top, norm, acc = _end_segment(
                    divided, tops, norms, partials, record + segment, heads, head, inside,
                    _segment_start(segment) < limit, top, norm, acc, part_top, part_norm, part_acc, DIM, acc_layout,
                )  # fmt: skip
                segment += 1
                next_start = _segment_start(segment + 1)
                part_top = gl.full((QUERIES,), float("-inf"), gl.float32, by_query)
                part_norm = gl.zeros((QUERIES,), gl.float32, by_query)
                part_acc = gl.zeros((QUERIES, WIDTH), gl.float32, acc_layout)
            second, second_phase = _advance(place, phase, stride, RING)
            mbarrier.wait(k_full.index(place), phase)
            mbarrier.wait(k_full.index(second), second_phase)
            scores = warpgroup_mma(
                query_tile, k_ring.index(place).permute((1, 0)), none, use_acc=False, is_async=True
            )
            scores2 = warpgroup_mma(
                query_tile, k_ring.index(second).permute((1, 0)), none, use_acc=False, is_async=True
            )
            scores, scores2 = warpgroup_mma_wait(0, deps=(scores, scores2))
            _leave(k_empty, place, second, shared)
            left = block - (step - cached_steps) * 2 * KEYS
            if gl.where(in_block, left, common - here) < 2 * KEYS:
                bound = gl.where(in_block, left, limit - here)
                scores = gl.where(keys[None, :] < bound[:, None], scores, float("-inf"))
                scores2 = gl.where(keys[None, :] + KEYS < bound[:, None], scores2, float("-inf"))
            new_top = gl.maximum(part_top, gl.max(gl.maximum(scores, scores2), 1) * scale)
            # A row that has seen nothing yet: any finite value will do, its weights are zero.
            base = gl.where(new_top == float("-inf"), 0.0, new_top)
            shift = gl.zeros_like(scores) - base[:, None]
            weights = gl.exp2(gl.fma(scores, gl.zeros_like(scores) + scale, shift))
            weights2 = gl.exp2(gl.fma(scores2, gl.zeros_like(scores) + scale, shift))
            fade = gl.exp2(part_top - base)
            part_norm = gl.fma(part_norm, fade, gl.sum(weights + weights2, 1))
            part_top = new_top
            part_acc = part_acc * gl.convert_layout(fade, gl.SliceLayout(1, acc_layout))[:, None]
            operand = gl.convert_layout(weights.to(k_ring.dtype), operand_layout)
            operand2 = gl.convert_layout(weights2.to(k_ring.dtype), operand_layout)
            mbarrier.wait(v_full.index(place), phase)
            mbarrier.wait(v_full.index(second), second_phase)
            part_acc = warpgroup_mma(operand, v_ring.index(place), part_acc, is_async=True)
            part_acc = warpgroup_mma(operand2, v_ring.index(second), part_acc, is_async=True)
            part_acc = warpgroup_mma_wait(0, deps=(part_acc,))
            _leave(v_empty, place, second, shared)
            place, phase = _advance(second, second_phase, stride, RING)
            here += 2 * KEYS
        last_seen = (block > 0) | (_segment_start(segment) < limit)
        last_record = gl.where(block > 0, last_segment, segment)
        top, norm, acc = _end_segment(
            divided, tops, norms, partials, record + last_record, heads, head, inside, last_seen,
            top, norm, acc, part_top, part_norm, part_acc, DIM, acc_layout,
        )  # fmt: skip
        if divided == 0:
            wide: gl.constexpr = gl.SliceLayout(1, acc_layout)
            dims = gl.arange(0, WIDTH, gl.SliceLayout(0, acc_layout))
            total = gl.convert_layout(gl.where(inside, norm, 1.0), wide)
            goal = gl.convert_layout((row * heads + head).to(gl.int64) * DIM, wide)
            wanted = gl.convert_layout(inside, wide)[:, None] & (dims < DIM)[None, :]
            result = (acc / total[:, None]).to(out.dtype.element_ty)
            gl.store(out + goal[:, None] + dims[None, :], result, mask=wanted)


@gluon.jit
def _attention_kernel(
    qkv,
    k_pages,
    v_pages,
    rows_desc,
    work,
    limits,
    records,
    out,
    partials,
    tops,
    norms,
    slots,
    scale,
    PER_KV: gl.constexpr,
    KV_HEADS: gl.constexpr,
    PAGE: gl.constexpr,
    DIM: gl.constexpr,
    WIDTH: gl.constexpr,
    QUERIES: gl.constexpr,
    KEYS: gl.constexpr,
    RING: gl.constexpr,
    PROGRAMS: gl.constexpr,
    BEFORE: gl.constexpr,
    PER: gl.constexpr,
    QUERY_TILE: gl.constexpr,
    CHAINED: gl.constexpr,
):
    query_tiles = gl.allocate_shared_memory(k_pages.dtype, [2, QUERIES, WIDTH], QUERY_TILE)
    k_ring = gl.allocate_shared_memory(k_pages.dtype, [RING, KEYS, WIDTH], k_pages.layout)
    v_ring = gl.allocate_shared_memory(v_pages.dtype, [RING, KEYS, WIDTH], v_pages.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(RING):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    if CHAINED:
        gdc_launch_dependents()
    # The work list is uploaded before the pass: no kernel writes it.
    key_column: gl.constexpr = KV_HEADS * PER_KV * DIM
    value_column: gl.constexpr = key_column + KV_HEADS * DIM
    gl.warp_specialize(
        [
            (_consume, (
                qkv, work, limits, records, out, partials, tops, norms, scale, query_tiles.index(0), k_ring, v_ring,
                k_full, v_full, k_empty, v_empty, 0, PER_KV, KV_HEADS, DIM, PROGRAMS, BEFORE, PER, CHAINED,
            )),
            (_consume, (
                qkv, work, limits, records, out, partials, tops, norms, scale, query_tiles.index(1), k_ring, v_ring,
                k_full, v_full, k_empty, v_empty, 1, PER_KV, KV_HEADS, DIM, PROGRAMS, BEFORE, PER, CHAINED,
            )),
            (_produce, (
                k_pages, rows_desc, work, slots, k_ring, k_full, k_empty,
                key_column, 0, KV_HEADS, PAGE, DIM, PROGRAMS, BEFORE, PER, CHAINED,
            )),
            (_produce, (
                v_pages, rows_desc, work, slots, v_ring, v_full, v_empty,
                value_column, 0, KV_HEADS, PAGE, DIM, PROGRAMS, BEFORE, PER, CHAINED,
            )),
            (_produce, (
                k_pages, rows_desc, work, slots, k_ring, k_full, k_empty,
                key_column, 1, KV_HEADS, PAGE, DIM, PROGRAMS, BEFORE, PER, CHAINED,
            )),
            (_produce, (
                v_pages, rows_desc, work, slots, v_ring, v_full, v_empty,
                value_column, 1, KV_HEADS, PAGE, DIM, PROGRAMS, BEFORE, PER, CHAINED,
            )),
        ],
        [4, 1, 1, 1, 1],
        [240, 24, 24, 24, 24],
    )  # fmt: skip


def launch(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: "AttentionPlan",
    scale: float,
    out: Tensor,
    partials: Tensor,
    tops: Tensor,
    norms: Tensor,
    *,
    queries: int,
    keys: int,
    width: int,
    programs: int,
) -> None:
    """The first kernel of `attention_triton.paged_attention`; scale: of scores to base 2; programs: one multiprocessor each."""
    work = plan.work
    assert work is not None
    kv_heads, pages, page_size, dim = k_cache.shape
    all_heads = qkv.shape[1]
    dtype = gl.bfloat16 if qkv.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([keys, width], dtype)
    room = _SHARED_BYTES - _OTHER_BYTES - 2 * queries * width * 2

    def tiles(tensor: Tensor, columns: int) -> TensorDescriptor:
        return TensorDescriptor(
            tensor, [tensor.numel() // columns, columns], [columns, 1], [keys, width], layout
        )

    _attention_kernel[(programs,)](
        qkv,
        tiles(k_cache, dim),
        tiles(v_cache, dim),
        tiles(qkv, all_heads * dim),
        work.items,
        work.limits,
        work.records,
        out,
        partials,
        tops,
        norms,
        pages * page_size,
        scale,
        PER_KV=plan.heads_per_kv,
        KV_HEADS=kv_heads,
        PAGE=page_size,
        DIM=dim,
        WIDTH=width,
        QUERIES=queries,
        KEYS=keys,
        # Both lanes' places, the same number for each.
        RING=2 * min(8, room // (2 * 2 * keys * width * 2)),
        PROGRAMS=programs,
        BEFORE=HEADER,
        PER=ITEM,
        QUERY_TILE=gl.NVMMASharedLayout.get_default_for([queries, width], dtype),
        num_warps=4,
        **chaining(),
    )
