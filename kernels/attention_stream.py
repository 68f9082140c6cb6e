"""Paged attention on Hopper (compute capability 9.0), whose copy engine fills shared memory by itself.

The arithmetic of `attention_triton`, in the order that its work list gives. What differs is how keys and values arrive: a program
keeps a ring of tiles in shared memory filled, over the end of one item and the beginning of the next, and starts with keys
that this pass doesn't write before the kernels ahead in the stream have finished. A diffusion block's own keys are a
further tile. All that is read is finite, see `qk_norm_rope`, so that hidden keys take part as 0 x something.

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


@gluon.jit
def _segment_start(index):
    """`attention_work.segment_start`."""
    near, middle = index * 128, 1024 + (index - 8) * 512
    far, farther = 8192 + (index - 22) * 1024, 32768 + (index - 46) * 2048
    return gl.where(index < 22, gl.where(index < 8, near, middle), gl.where(index < 46, far, farther))


@gluon.jit
def _open(
    work, index, count, PAGE: gl.constexpr, BEFORE: gl.constexpr, PER: gl.constexpr, KV_HEADS: gl.constexpr
):  # fmt: skip
    """The index-th item's tiles: cached keys at .. end, block rows 0 .. block, where both lie. None past the last item."""
    there = index < count
    item = work + BEFORE + index // KV_HEADS * PER
    table = gl.load(item + 2, mask=there, other=0)
    first, last = gl.load(item + 3, mask=there, other=0), gl.load(item + 4, mask=there, other=0)
    seen, fresh = gl.load(item + 5, mask=there, other=0), gl.load(item + 6, mask=there, other=0)
    block_row, block = gl.load(item + 7, mask=there, other=0), gl.load(item + 8, mask=there, other=0)
    at = _segment_start(first)
    end = gl.minimum(_segment_start(last), seen)
    page = gl.load(work + table + at // PAGE, mask=at < end, other=0)
    return at, end, 0, block, table, fresh, block_row, page


@gluon.jit
def _advance(
    work, index, at, end, own, block, table, fresh, block_row, page, count,
    KEYS: gl.constexpr, PAGE: gl.constexpr, PROGRAMS: gl.constexpr, BEFORE: gl.constexpr, PER: gl.constexpr,
    KV_HEADS: gl.constexpr,
):  # fmt: skip
    """The tile after this one; the next item's first after an item's last."""
    cached = at < end
    at += gl.where(cached, KEYS, 0)
    own += gl.where(cached, 0, KEYS)
    if (at >= end) & (own >= block):
        index += PROGRAMS
        at, end, own, block, table, fresh, block_row, page = _open(
            work, index, count, PAGE, BEFORE, PER, KV_HEADS
        )
    else:
        page = gl.load(work + table + at // PAGE, mask=at < end, other=0)
    return index, at, end, own, block, table, fresh, block_row, page


@gluon.jit
def _fetch(pages, rows, barrier, target, cached, slot, row, column, BYTES: gl.constexpr):
    """Ask for a tile of keys or values: from the cache at `slot`, or rows of the pass from `row` on."""
    mbarrier.expect(barrier, BYTES)
    if cached:
        tma.async_copy_global_to_shared(pages, [slot, 0], barrier, target)
    else:
        tma.async_copy_global_to_shared(rows, [row, column], barrier, target)


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
    num_warps: gl.constexpr,
):
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, KEYS, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, WIDTH, 16])
    by_query: gl.constexpr = gl.SliceLayout(1, scores_layout)
    by_key: gl.constexpr = gl.SliceLayout(0, scores_layout)
    lanes: gl.constexpr = min(32, WIDTH // 8)
    load_layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // lanes, lanes], [num_warps, 1], [1, 0])
    tile_bytes: gl.constexpr = KEYS * WIDTH * k_pages.dtype.primitive_bitwidth // 8
    heads: gl.constexpr = KV_HEADS * PER_KV
    key_column: gl.constexpr = heads * DIM
    value_column: gl.constexpr = (heads + KV_HEADS) * DIM

    k_ring = gl.allocate_shared_memory(k_pages.dtype, [RING, KEYS, WIDTH], k_pages.layout)
    v_ring = gl.allocate_shared_memory(v_pages.dtype, [RING, KEYS, WIDTH], v_pages.layout)
    query_tile = gl.allocate_shared_memory(k_pages.dtype, [QUERIES, WIDTH], QUERY_TILE)
    k_full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(RING):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
    if CHAINED:
        gdc_launch_dependents()

    # The work list is uploaded before the pass: no kernel writes it.
    count = gl.load(work) * KV_HEADS
    program = gl.program_id(0)
    # The first tiles: those that this pass doesn't write at once, the others when the kernels ahead are done.
    index = program
    at, end, own, block, table, fresh, block_row, page = _open(
        work, index, count, PAGE, BEFORE, PER, KV_HEADS
    )
    for i in gl.static_range(RING):
        if (at < end) & (at + KEYS <= fresh):
            slot = index % KV_HEADS * slots + page * PAGE + at % PAGE
            _fetch(k_pages, rows_desc, k_full.index(i), k_ring.index(i), True, slot, 0, 0, tile_bytes)
            _fetch(v_pages, rows_desc, v_full.index(i), v_ring.index(i), True, slot, 0, 0, tile_bytes)
        index, at, end, own, block, table, fresh, block_row, page = _advance(
            work, index, at, end, own, block, table, fresh, block_row, page, count,
            KEYS, PAGE, PROGRAMS, BEFORE, PER, KV_HEADS,
        )  # fmt: skip
    if CHAINED:
        gdc_wait()
    index = program
    at, end, own, block, table, fresh, block_row, page = _open(
        work, index, count, PAGE, BEFORE, PER, KV_HEADS
    )
    for i in gl.static_range(RING):
        if (index < count) & ((at >= end) | (at + KEYS > fresh)):
            slot = index % KV_HEADS * slots + page * PAGE + at % PAGE
            column = index % KV_HEADS * DIM
            _fetch(
                k_pages, rows_desc, k_full.index(i), k_ring.index(i), at < end, slot, block_row + own,
                key_column + column, tile_bytes,
            )  # fmt: skip
            _fetch(
                v_pages, rows_desc, v_full.index(i), v_ring.index(i), at < end, slot, block_row + own,
                value_column + column, tile_bytes,
            )  # fmt: skip
        index, at, end, own, block, table, fresh, block_row, page = _advance(
            work, index, at, end, own, block, table, fresh, block_row, page, count,
            KEYS, PAGE, PROGRAMS, BEFORE, PER, KV_HEADS,
        )  # fmt: skip

    # Scores are computed one tile ahead of what follows from them, so keys are one place further in their ring than values.
    # v_*: where the tile of values lies that follows the keys fetched last.
    k_stage, k_phase, v_stage, v_phase = 0, 0, 0, 0
    query_index = gl.arange(0, QUERIES, by_query)
    keys = gl.arange(0, KEYS, by_key)
    for this in range(program, count, PROGRAMS):
        item = work + BEFORE + this // KV_HEADS * PER
        this_head = this % KV_HEADS
        first_row, rows = gl.load(item), gl.load(item + 1)
        segment, last_segment = gl.load(item + 3), gl.load(item + 4)
        seen, this_block = gl.load(item + 5), gl.load(item + 8)
        # A KV head's queries: all its query heads of a row, then the next row's.
        row = first_row + query_index // PER_KV
        head = this_head * PER_KV + query_index % PER_KV
        inside = query_index // PER_KV < rows
        limit = gl.load(limits + row, mask=inside, other=0)
        record = gl.load(records + row, mask=inside, other=-1)
        divided = gl.load(records + first_row) >= 0
        begin = _segment_start(segment)
        past = gl.minimum(_segment_start(last_segment), seen)
        cached_tiles = gl.cdiv(gl.maximum(past - begin, 0), KEYS)
        common = gl.load(limits + first_row)  # Keys that all rows see: the tile's first row sees least.

        load_index = gl.arange(0, QUERIES, gl.SliceLayout(1, load_layout))
        load_dims = gl.arange(0, WIDTH, gl.SliceLayout(0, load_layout))
        load_row = first_row + load_index // PER_KV
        load_head = this_head * PER_KV + load_index % PER_KV
        place = (load_row * (heads + 2 * KV_HEADS) + load_head).to(gl.int64) * DIM
        mask = (load_index // PER_KV < rows)[:, None] & (load_dims < DIM)[None, :]
        query_tile.store(gl.load(qkv + place[:, None] + load_dims[None, :], mask=mask, other=0.0))
        fence_async_shared()

        none = gl.zeros((QUERIES, KEYS), gl.float32, scores_layout)
        mbarrier.wait(k_full.index(k_stage), k_phase)
        scores = warpgroup_mma(
            query_tile, k_ring.index(k_stage).permute((1, 0)), none, use_acc=False, is_async=True
        )
        scores = warpgroup_mma_wait(0, deps=(scores,))
        v_wanted, v_cached, v_row = index < count, at < end, block_row + own
        v_slot = index % KV_HEADS * slots + page * PAGE + at % PAGE
        v_column = index % KV_HEADS * DIM
        if v_wanted:
            _fetch(
                k_pages, rows_desc, k_full.index(k_stage), k_ring.index(k_stage), v_cached, v_slot, v_row,
                key_column + v_column, tile_bytes,
            )  # fmt: skip
        index, at, end, own, block, table, fresh, block_row, page = _advance(
            work, index, at, end, own, block, table, fresh, block_row, page, count,
            KEYS, PAGE, PROGRAMS, BEFORE, PER, KV_HEADS,
        )  # fmt: skip
        k_stage += 1
        if k_stage == RING:
            k_stage = 0
            k_phase ^= 1

        top = gl.full((QUERIES,), float("-inf"), gl.float32, by_query)
        norm = gl.zeros((QUERIES,), gl.float32, by_query)
        acc = gl.zeros((QUERIES, WIDTH), gl.float32, acc_layout)
        part_top, part_norm, part_acc = top, norm, acc
        here, next_start = begin, _segment_start(segment + 1)
        tiles = cached_tiles + gl.cdiv(this_block, KEYS)
        for tile in range(tiles):
            in_block = tile >= cached_tiles
            if gl.where(in_block, tile == cached_tiles, here == next_start) & (tile > 0):
                top, norm, acc = _end_segment(
                    divided, tops, norms, partials, record + segment, heads, head, inside,
                    _segment_start(segment) < limit, top, norm, acc, part_top, part_norm, part_acc, DIM, acc_layout,
                )  # fmt: skip
                segment += 1
                next_start = _segment_start(segment + 1)
                part_top = gl.full((QUERIES,), float("-inf"), gl.float32, by_query)
                part_norm = gl.zeros((QUERIES,), gl.float32, by_query)
                part_acc = gl.zeros((QUERIES, WIDTH), gl.float32, acc_layout)
            # After an item's last tile this computes scores that nobody reads, of whatever is in the ring.
            more = tile + 1 < tiles
            mbarrier.wait(k_full.index(k_stage), k_phase, pred=more)
            next_scores = warpgroup_mma(
                query_tile, k_ring.index(k_stage).permute((1, 0)), none, use_acc=False, is_async=True
            )
            left = this_block - (tile - cached_tiles) * KEYS
            if gl.where(in_block, left, common - here) < KEYS:
                bound = gl.where(in_block, left, limit - here)
                scores = gl.where(keys[None, :] < bound[:, None], scores, float("-inf"))
            new_top = gl.maximum(part_top, gl.max(scores, 1) * scale)
            # A row that has seen nothing yet: any finite value will do, its weights are zero.
            base = gl.where(new_top == float("-inf"), 0.0, new_top)
            weights = gl.exp2(
                gl.fma(scores, gl.zeros_like(scores) + scale, gl.zeros_like(scores) - base[:, None])
            )
            fade = gl.exp2(part_top - base)
            part_norm = gl.fma(part_norm, fade, gl.sum(weights, 1))
            part_top = new_top
            part_acc = part_acc * gl.convert_layout(fade, gl.SliceLayout(1, acc_layout))[:, None]
            operand = gl.convert_layout(weights.to(k_pages.dtype), gl.DotOperandLayout(0, acc_layout, 2))
            mbarrier.wait(v_full.index(v_stage), v_phase)
            part_acc = warpgroup_mma(operand, v_ring.index(v_stage), part_acc, is_async=True)
            scores, part_acc = warpgroup_mma_wait(0, deps=(next_scores, part_acc))
            if v_wanted:
                _fetch(
                    v_pages, rows_desc, v_full.index(v_stage), v_ring.index(v_stage), v_cached, v_slot, v_row,
                    value_column + v_column, tile_bytes,
                )  # fmt: skip
            v_stage += 1
            if v_stage == RING:
                v_stage = 0
                v_phase ^= 1
            if more:
                v_wanted, v_cached, v_row = index < count, at < end, block_row + own
                v_slot = index % KV_HEADS * slots + page * PAGE + at % PAGE
                v_column = index % KV_HEADS * DIM
                if v_wanted:
                    _fetch(
                        k_pages, rows_desc, k_full.index(k_stage), k_ring.index(k_stage), v_cached, v_slot, v_row,
                        key_column + v_column, tile_bytes,
                    )  # fmt: skip
                index, at, end, own, block, table, fresh, block_row, page = _advance(
                    work, index, at, end, own, block, table, fresh, block_row, page, count,
                    KEYS, PAGE, PROGRAMS, BEFORE, PER, KV_HEADS,
                )  # fmt: skip
                k_stage += 1
                if k_stage == RING:
                    k_stage = 0
                    k_phase ^= 1
            here += KEYS
        last_seen = (this_block > 0) | (_segment_start(segment) < limit)
        last_record = gl.where(this_block > 0, last_segment, segment)
        top, norm, acc = _end_segment(
            divided, tops, norms, partials, record + last_record, heads, head, inside, last_seen,
            top, norm, acc, part_top, part_norm, part_acc, DIM, acc_layout,
        )  # fmt: skip
        if divided == 0:
            wide: gl.constexpr = gl.SliceLayout(1, acc_layout)
            dims = gl.arange(0, WIDTH, gl.SliceLayout(0, acc_layout))
            total = gl.convert_layout(gl.where(inside, norm, 1.0), wide)
            goal = gl.convert_layout((row * heads + head).to(gl.int64) * DIM, wide)
            wanted_out = gl.convert_layout(inside, wide)[:, None] & (dims < DIM)[None, :]
            result = (acc / total[:, None]).to(out.dtype.element_ty)
            gl.store(out + goal[:, None] + dims[None, :], result, mask=wanted_out)


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
    """The first kernel of `attention_triton.paged_attention`; scale: of scores to base 2."""
    work = plan.work
    assert work is not None
    kv_heads, pages, page_size, dim = k_cache.shape
    all_heads = qkv.shape[1]
    dtype = gl.bfloat16 if qkv.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([keys, width], dtype)
    room = _SHARED_BYTES // 2 - 1024 - queries * width * 2

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
        RING=min(8, room // (2 * keys * width * 2)),
        PROGRAMS=programs,
        BEFORE=HEADER,
        PER=ITEM,
        QUERY_TILE=gl.NVMMASharedLayout.get_default_for([queries, width], dtype),
        num_warps=4,
        **chaining(),
    )
