"""Paged attention on Hopper (compute capability 9.0), whose copy engine fills shared memory by itself.

The arithmetic of `attention_triton`, in the order that its work list gives, in steps of 128 keys. A multiprocessor's program has
two consumers of 64 queries each, and two producers, warps that only ask for keys and values ahead of the consumers. A
consumer, a producer and every other place of a ring in shared memory make a lane; a place holds the keys or the values of a
step. The rows of a shared item go to both consumers, which read the same places, so that keys and values cross the L2 cache
once for 128 queries: one producer brings the keys, the other the values. Afterwards a lane goes through items of one
consumer's rows by itself. What a row goes through, and in which order, is the same either way.

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

from kernels.attention.work import HEADER, ITEM, SPAN
from kernels.attention.work_triton import load_item, segment_start
from kernels.device import chaining

if TYPE_CHECKING:
    from kernels.attention.reference import AttentionPlan

_SHARED_BYTES = 227 * 1024
"""Of a multiprocessor."""
_OTHER_BYTES = 2048
"""Of it for mbarriers and what the warps hand each other."""
_PIECE = 16
"""Keys that are fetched at once where cached keys end."""


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
def _keys(segment, last_segment, seen, block, STEP: gl.constexpr):
    """An item's first cached key and the one behind its last, and its steps over cached keys and over its block's."""
    begin, end = segment_start(segment), gl.minimum(segment_start(last_segment), seen)
    return begin, end, gl.cdiv(gl.maximum(end - begin, 0), STEP), gl.cdiv(block, STEP)


@gluon.jit
def _advance(place, phase, step, PLACES: gl.constexpr):
    """The place in the ring `step` places on, and its phase."""
    place += step
    wraps = place >= PLACES
    return gl.where(wraps, place - PLACES, place), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def _fetch(source, row, row2, column, ring, full, place):
    """Ask for a step's two tiles, from `row` and from `row2` of the source on."""
    tma.async_copy_global_to_shared(source, [row, column], full.index(place), ring.index(2 * place))
    tma.async_copy_global_to_shared(source, [row2, column], full.index(place), ring.index(2 * place + 1))


@gluon.jit
def _fetch_end(source, slot, slot2, count, pieces, full, place, KEYS: gl.constexpr):
    """Ask for a step's two tiles of which `count` keys are there, piece by piece; pieces past the end repeat the last one.

    pieces: the ring as pieces of some keys and up to 64 dimensions, as the tiles lie in memory.
    """
    PIECE: gl.constexpr = source.block_shape[0]
    PARTS: gl.constexpr = pieces.shape[0] * PIECE // (2 * full.shape[0] * KEYS)
    last = (count - 1) // PIECE
    for number in range(2 * KEYS // PIECE):
        wanted = gl.minimum(number, last) * PIECE
        row = gl.where(wanted < KEYS, slot, slot2 - KEYS) + wanted
        piece = (2 * place + number * PIECE // KEYS) * (PARTS * KEYS // PIECE) + number % (KEYS // PIECE)
        for part in gl.static_range(PARTS):
            tma.async_copy_global_to_shared(
                source,
                [row, part * source.block_shape[1]],
                full.index(place),
                pieces.index(piece + part * (KEYS // PIECE)),
            )


@gluon.jit
def _produce(
    k_pages, v_pages, k_pieces, v_pieces, rows_desc, work, slots, ring, full, empty,
    LANE: gl.constexpr, KV_HEADS: gl.constexpr, PER_KV: gl.constexpr, PAGE: gl.constexpr, DIM: gl.constexpr,
    PROGRAMS: gl.constexpr, BEFORE: gl.constexpr, PER: gl.constexpr, TRIMS_END: gl.constexpr, CHAINED: gl.constexpr,
):  # fmt: skip
    """Fill the lane's places: with keys or with values of shared items, with both in turn of the lane's own items."""
    PLACES: gl.constexpr = full.shape[0]
    KEYS: gl.constexpr = ring.shape[1]
    PIECE: gl.constexpr = k_pieces.block_shape[0]
    PART: gl.constexpr = k_pieces.block_shape[1]
    PIECES: gl.constexpr = 2 * PLACES * KEYS * ring.shape[2] // (PIECE * PART)
    pieces = ring._reinterpret(ring.dtype, [PIECES, PIECE, PART], k_pieces.layout)
    step_bytes: gl.constexpr = 2 * KEYS * ring.shape[2] * ring.dtype.primitive_bitwidth // 8
    together, alone, first = _share(work, LANE, KV_HEADS, PROGRAMS)
    place, phase, ahead = LANE, 0, CHAINED
    for turn in range(together + alone):
        index = _index(turn, together, first, PROGRAMS)
        item, kv_head = work + BEFORE + index // KV_HEADS * PER, index % KV_HEADS
        _, _, table_at, segment, last_segment, seen, fresh, block_row, block, _, _, _ = load_item(item)
        begin, end, cached_steps, block_steps = _keys(segment, last_segment, seen, block, 2 * KEYS)
        table = work + table_at
        kinds = gl.where(turn < together, 1, 2)
        # Pages are looked up a step ahead, while the one before it waits for room. Past the end, page 0, which is nobody's.
        page = gl.load(table + begin // PAGE, mask=begin < end, other=0)
        page2 = gl.load(table + (begin + KEYS) // PAGE, mask=begin + KEYS < end, other=0)
        for step in range(cached_steps + block_steps):
            at = begin + step * 2 * KEYS
            next_at = at + 2 * KEYS
            next_page = gl.load(table + next_at // PAGE, mask=next_at < end, other=0)
            next_page2 = gl.load(table + (next_at + KEYS) // PAGE, mask=next_at + KEYS < end, other=0)
            if ahead & ((step >= cached_steps) | (gl.minimum(next_at, end) > fresh)):
                gdc_wait()
                ahead = False
            head_slot = kv_head * slots
            slot, slot2 = head_slot + page * PAGE + at % PAGE, head_slot + page2 * PAGE + (at + KEYS) % PAGE
            row = block_row + (step - cached_steps) * 2 * KEYS
            for own_kind in range(kinds):
                values = gl.where(kinds == 1, LANE, own_kind)
                mbarrier.wait(empty.index(place), phase ^ 1)
                mbarrier.expect(full.index(place), step_bytes)
                if step >= cached_steps:
                    column = (KV_HEADS * (PER_KV + values) + kv_head) * DIM
                    _fetch(rows_desc, row, row + KEYS, column, ring, full, place)
                elif TRIMS_END & (end - at < 2 * KEYS):
                    if values == 0:
                        _fetch_end(k_pieces, slot, slot2, end - at, pieces, full, place, KEYS)
                    else:
                        _fetch_end(v_pieces, slot, slot2, end - at, pieces, full, place, KEYS)
                elif values == 0:
                    _fetch(k_pages, slot, slot2, 0, ring, full, place)
                else:
                    _fetch(v_pages, slot, slot2, 0, ring, full, place)
                place, phase = _advance(place, phase, 2, PLACES)
            page, page2 = next_page, next_page2


@gluon.jit
def _leave(empty, place, shared):
    """Give a place back: it is free when both consumers have said so, or the one that has it for itself has said it twice."""
    if shared:
        mbarrier.arrive(empty.index(place), count=1)
    else:
        mbarrier.arrive(empty.index(place), count=2)


@gluon.jit
def _exp2(x):
    """2 to the power of x, zero where that would be subnormal: one instruction."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _places(base, first, inside, DIM: gl.constexpr, WIDTH: gl.constexpr, layout: gl.constexpr):
    """Pointers to base[first], base[first + 1], ... [queries, WIDTH / 8, 8] in `layout`, and which of these are a query's.

    In eights, so that a thread's places differ by constants, which are part of its instructions.
    """
    of_query: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, layout))
    eights = 8 * gl.arange(0, WIDTH // 8, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    ones = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    place = (base + gl.convert_layout(first, of_query))[:, None, None] + ones[None, None, :]
    mask = gl.convert_layout(inside, of_query)[:, None, None] & (eights < DIM)[None, :, None]
    return place + eights[None, :, None], mask


@gluon.jit
def _merge(top, norm, acc, part_top, part_norm, part_acc, layout: gl.constexpr):
    """Put a running softmax behind another one. One that has seen nothing changes no bit."""
    new_top = gl.maximum(top, part_top)
    base = gl.where(new_top == float("-inf"), 0.0, new_top)
    old, new = gl.exp2(top - base), gl.exp2(part_top - base)
    norm = gl.fma(norm, old, part_norm * new)
    wide: gl.constexpr = gl.SliceLayout(1, layout)
    old, new = gl.convert_layout(old, wide)[:, None], gl.convert_layout(new, wide)[:, None]
    acc = gl.fma(acc, gl.zeros_like(acc) + old, part_acc * new)
    return new_top, norm, acc


@gluon.jit
def _consume(
    qkv, work, out, partials, tops, norms, scale, spare, query_tile, ring, full, empty,
    LANE: gl.constexpr, PER_KV: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr, PROGRAMS: gl.constexpr,
    BEFORE: gl.constexpr, PER: gl.constexpr, SPAN: gl.constexpr, CHAINED: gl.constexpr,
):  # fmt: skip
    """Attend with a lane's queries: its half of the rows of shared items, then all rows of its own items."""
    QUERIES: gl.constexpr = query_tile.shape[0]
    PLACES: gl.constexpr = full.shape[0]
    KEYS: gl.constexpr = ring.shape[1]
    WIDTH: gl.constexpr = ring.shape[2]
    ROWS: gl.constexpr = QUERIES // PER_KV
    num_warps: gl.constexpr = gl.num_warps()
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, KEYS, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, WIDTH, 16])
    by_query: gl.constexpr = gl.SliceLayout(1, scores_layout)
    by_key: gl.constexpr = gl.SliceLayout(0, scores_layout)
    wide: gl.constexpr = gl.SliceLayout(1, acc_layout)
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    load_lanes: gl.constexpr = min(32, WIDTH // 8)
    load_layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [32 // load_lanes, load_lanes], [num_warps, 1], [1, 0]
    )
    heads: gl.constexpr = KV_HEADS * PER_KV

    query = gl.arange(0, QUERIES, by_query)
    keys = gl.arange(0, KEYS, by_key)
    load_query = gl.arange(0, QUERIES, gl.SliceLayout(1, load_layout))
    load_dims = gl.arange(0, WIDTH, gl.SliceLayout(0, load_layout))
    none = gl.zeros((QUERIES, KEYS), gl.float32, scores_layout)
    no_norm = gl.zeros((QUERIES,), gl.float32, by_query)
    no_acc = gl.zeros((QUERIES, WIDTH), gl.float32, acc_layout)
    eights_layout: gl.constexpr = no_acc.reshape((QUERIES, WIDTH // 8, 8)).type.layout
    # With this as its highest score a running softmax begins anew: whatever it has summed counts nothing.
    unseen = gl.full((QUERIES,), float("-inf"), gl.float32, by_query)
    together, alone, first = _share(work, LANE, KV_HEADS, PROGRAMS)
    place, phase = 0, 0
    for turn in range(together + alone):
        shared = turn < together
        stride = gl.where(shared, 1, 2)
        if (turn == together) & (LANE == 1):
            place, phase = _advance(place, phase, 1, PLACES)
        index = _index(turn, together, first, PROGRAMS)
        item, kv_head = work + BEFORE + index // KV_HEADS * PER, index % KV_HEADS
        first_row, rows, _, segment, last_segment, seen, _, _, block, causal, record, records = load_item(item)  # fmt: skip
        begin, _, cached_steps, block_steps = _keys(segment, last_segment, seen, block, 2 * KEYS)
        divided = record >= 0
        spans_from = gl.cdiv(begin, SPAN) * SPAN  # Before it, a record for each segment.
        # This lane's rows of the tile. A KV head's queries: all its query heads of a row, then the next row's.
        skipped = gl.where(shared, LANE * ROWS, 0)
        row = skipped + query // PER_KV
        head = kv_head * PER_KV + query % PER_KV
        inside = (row < rows) & (query // PER_KV < ROWS)
        limit = seen - (rows - 1 - row) * causal
        common = seen - (rows - 1 - skipped) * causal  # Keys that all rows see.
        # Where partial results go: records, or the lane's own place.
        left_at = gl.where(
            divided,
            (record + row * records) * heads + head,
            spare + (2 * gl.program_id(0) + LANE) * QUERIES + query,
        )

        if CHAINED:
            gdc_wait()
        load_row = first_row + skipped + load_query // PER_KV
        load_head = kv_head * PER_KV + load_query % PER_KV
        source = (load_row * (heads + 2 * KV_HEADS) + load_head).to(gl.int64) * DIM
        load_mask = (skipped + load_query // PER_KV < rows)[:, None] & (load_dims < DIM)[None, :]
        query_tile.store(gl.load(qkv + source[:, None] + load_dims[None, :], mask=load_mask, other=0.0))
        fence_async_shared()

        top, norm, acc = unseen, no_norm, no_acc
        part_top, part_norm, part_acc = unseen, no_norm, no_acc
        here, steps, left = begin, cached_steps + block_steps, False
        next_start = gl.where(cached_steps > 0, segment_start(segment + 1), 0)  # A block is one segment.
        for step in range(steps):
            # Keys, then values.
            mbarrier.wait(full.index(place), phase)
            scores = warpgroup_mma(
                query_tile, ring.index(2 * place).permute((1, 0)), none, use_acc=False, is_async=True
            )
            scores2 = warpgroup_mma(
                query_tile, ring.index(2 * place + 1).permute((1, 0)), none, use_acc=False, is_async=True
            )
            scores, scores2 = warpgroup_mma_wait(0, deps=(scores, scores2))
            _leave(empty, place, shared)
            place, phase = _advance(place, phase, stride, PLACES)
            in_block = step >= cached_steps
            own = block - (step - cached_steps) * 2 * KEYS
            seen_by_all = gl.where(in_block, own, common - here)
            if seen_by_all < 2 * KEYS:
                # Run once or twice in an item, and its instructions come from afar: as few as will do.
                bound = gl.where(in_block, own, limit - here)
                if gl.where(in_block, own, seen - here) > KEYS:
                    scores2 = gl.where(keys[None, :] + KEYS < bound[:, None], scores2, float("-inf"))
                else:
                    scores2 = gl.full_like(scores2, float("-inf"))
                if seen_by_all < KEYS:
                    scores = gl.where(keys[None, :] < bound[:, None], scores, float("-inf"))
            new_top = gl.maximum(part_top, gl.max(gl.maximum(scores, scores2), 1) * scale)
            # A row that has seen nothing yet: any finite value will do, its weights are zero.
            base = gl.where(new_top == float("-inf"), 0.0, new_top)
            shift = gl.zeros_like(scores) - base[:, None]
            weights = _exp2(gl.fma(scores, gl.zeros_like(scores) + scale, shift))
            weights2 = _exp2(gl.fma(scores2, gl.zeros_like(scores) + scale, shift))
            fade = _exp2(part_top - base)
            part_norm = gl.fma(part_norm, fade, gl.sum(weights + weights2, 1))
            part_top = new_top
            part_acc = part_acc * gl.convert_layout(fade, wide)[:, None]
            operand = gl.convert_layout(weights.to(ring.dtype), operand_layout)
            operand2 = gl.convert_layout(weights2.to(ring.dtype), operand_layout)
            mbarrier.wait(full.index(place), phase)
            part_acc = warpgroup_mma(operand, ring.index(2 * place), part_acc, is_async=True)
            part_acc = warpgroup_mma(operand2, ring.index(2 * place + 1), part_acc, is_async=True)
            part_acc = warpgroup_mma_wait(0, deps=(part_acc,))
            _leave(empty, place, shared)
            place, phase = _advance(place, phase, stride, PLACES)
            here += 2 * KEYS
            last, cached_end = step + 1 == steps, step + 1 == cached_steps
            if last | cached_end | (here == next_start):
                top, norm, acc = _merge(top, norm, acc, part_top, part_norm, part_acc, acc_layout)
                part_top = unseen
                segment += 1
                next_start = gl.where(step + 1 < cached_steps, segment_start(segment + 1), 0)
                if last | (here <= spans_from) | ((here % SPAN == 0) & (cached_end == 0)):
                    acc_at, mask = _places(partials, left_at * DIM, inside, DIM, WIDTH, eights_layout)
                    if left & (divided == 0):
                        top, norm, acc = _merge(
                            gl.load(tops + left_at, mask=inside, other=0.0),
                            gl.load(norms + left_at, mask=inside, other=0.0),
                            gl.convert_layout(
                                gl.load(acc_at, mask=mask, other=0.0).reshape((QUERIES, WIDTH)), acc_layout
                            ),
                            top, norm, acc, acc_layout,
                        )  # fmt: skip
                    if divided | (last == 0):
                        gl.store(tops + left_at, top, mask=inside)
                        gl.store(norms + left_at, norm, mask=inside)
                        gl.store(acc_at, acc.reshape((QUERIES, WIDTH // 8, 8)), mask=mask)
                        top = unseen
                        left_at += gl.where(divided, heads, 0)
                        left = True
        if divided == 0:
            result = acc * gl.convert_layout(1.0 / gl.where(inside, norm, 1.0), wide)[:, None]
            goal = ((first_row + row) * heads + head).to(gl.int64) * DIM
            out_at, mask = _places(out, goal, inside, DIM, WIDTH, eights_layout)
            gl.store(out_at, result.to(out.dtype.element_ty).reshape((QUERIES, WIDTH // 8, 8)), mask=mask)
    if CHAINED:
        gdc_wait()  # Programs without an item wait too: this launch must not be over before the one ahead of it.


@gluon.jit
def _attention_kernel(
    qkv,
    k_pages,
    v_pages,
    k_pieces,
    v_pieces,
    rows_desc,
    work,
    out,
    partials,
    tops,
    norms,
    slots,
    scale,
    spare,
    PER_KV: gl.constexpr,
    KV_HEADS: gl.constexpr,
    PAGE: gl.constexpr,
    DIM: gl.constexpr,
    WIDTH: gl.constexpr,
    QUERIES: gl.constexpr,
    KEYS: gl.constexpr,
    PLACES: gl.constexpr,
    PROGRAMS: gl.constexpr,
    BEFORE: gl.constexpr,
    PER: gl.constexpr,
    SPAN: gl.constexpr,
    QUERY_TILE: gl.constexpr,
    TRIMS_END: gl.constexpr,
    CHAINED: gl.constexpr,
):
    query_tiles = gl.allocate_shared_memory(k_pages.dtype, [2, QUERIES, WIDTH], QUERY_TILE)
    ring = gl.allocate_shared_memory(k_pages.dtype, [2 * PLACES, KEYS, WIDTH], k_pages.layout)
    full = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(PLACES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    if CHAINED:
        gdc_launch_dependents()
    # The work list is uploaded before the pass: no kernel writes it.
    gl.warp_specialize(
        [
            (_consume, (
                qkv, work, out, partials, tops, norms, scale, spare, query_tiles.index(0), ring, full, empty,
                0, PER_KV, KV_HEADS, DIM, PROGRAMS, BEFORE, PER, SPAN, CHAINED,
            )),
            (_consume, (
                qkv, work, out, partials, tops, norms, scale, spare, query_tiles.index(1), ring, full, empty,
                1, PER_KV, KV_HEADS, DIM, PROGRAMS, BEFORE, PER, SPAN, CHAINED,
            )),
            (_produce, (
                k_pages, v_pages, k_pieces, v_pieces, rows_desc, work, slots, ring, full, empty,
                0, KV_HEADS, PER_KV, PAGE, DIM, PROGRAMS, BEFORE, PER, TRIMS_END, CHAINED,
            )),
            (_produce, (
                k_pages, v_pages, k_pieces, v_pieces, rows_desc, work, slots, ring, full, empty,
                1, KV_HEADS, PER_KV, PAGE, DIM, PROGRAMS, BEFORE, PER, TRIMS_END, CHAINED,
            )),
        ],
        [4, 1, 1],
        [240, 24, 24],
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
    spare: int,
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
    room = _SHARED_BYTES - _OTHER_BYTES - 2 * queries * width * 2

    def tiles(tensor: Tensor, columns: int, block: list[int]) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
        return TensorDescriptor(tensor, [tensor.numel() // columns, columns], [columns, 1], block, layout)

    tile, piece = [keys, width], [_PIECE, min(width, 64)]

    _attention_kernel[(programs,)](
        qkv,
        tiles(k_cache, dim, tile),
        tiles(v_cache, dim, tile),
        tiles(k_cache, dim, piece),
        tiles(v_cache, dim, piece),
        tiles(qkv, all_heads * dim, tile),
        work.numbers,
        out,
        partials,
        tops,
        norms,
        pages * page_size,
        scale,
        spare,
        PER_KV=plan.heads_per_kv,
        KV_HEADS=kv_heads,
        PAGE=page_size,
        DIM=dim,
        WIDTH=width,
        QUERIES=queries,
        KEYS=keys,
        # The same number for each lane, two tiles each.
        PLACES=2 * min(8, room // (2 * 2 * keys * width * 2)),
        PROGRAMS=programs,
        BEFORE=HEADER,
        PER=ITEM,
        SPAN=SPAN,
        QUERY_TILE=gl.NVMMASharedLayout.get_default_for([queries, width], dtype),
        # Where sequences are many and no row is divided, what is not there costs bandwidth. A divided row is read by many
        # programs at once, whose time is that of its last step: more instructions there take longer than the bytes.
        TRIMS_END=work.capacity == 0,
        num_warps=4,
        **chaining(),
    )
