"""The attention kernel for any GPU. On Hopper, `hopper` replaces it for 16-bit types and heads of up to 128 dimensions.

The kernel is persistent: a fixed number of programs goes through the work list of the pass. So its launch depends only on the
number of rows, and a CUDA graph can hold it. Inside a segment, an online softmax goes over tiles of keys in order. The segments
of a span are merged in order, and then the spans. A row's own diffusion block is merged with its last span. The arithmetic is the
same if one program walks over all segments of its rows, and if several programs take some each (split-KV) and `merge_records`
merges them.

All query heads of a KV head, and several rows, are packed into the M dimension of one query tile: 64 queries, or 16 in float32.
So any number of rows uses the same instruction.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from orthrus.kernels.attention.items import (
    NUM_ITEMS,
    ends_record,
    item_keys,
    load_item,
    next_segment,
    start_walk,
    take_step,
)
from orthrus.kernels.attention.softmax import Records, initial, load, merge, result, store, update
from orthrus.kernels.attention.types import AttentionPlan
from orthrus.kernels.device import chaining
from orthrus.kernels.rounding import Rounding, stored_as
from orthrus.kernels.rounding_triton import stored_place


@triton.jit
def _load_cached(
    k_cache,
    v_cache,
    kv_head,
    num_slots,
    page,
    at,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Keys and values of positions at .. at + KEYS - 1, which lie in one page: both [keys, width]."""
    key, dims = tl.arange(0, KEYS), tl.arange(0, WIDTH)
    spot = (kv_head * num_slots + page * PAGE + at % PAGE + key).to(tl.int64)[:, None] * DIM + dims[None, :]
    mask = (dims < DIM)[None, :]
    return tl.load(k_cache + spot, mask=mask, other=0.0), tl.load(v_cache + spot, mask=mask, other=0.0)


@triton.jit
def _load_block(
    qkv, item, kv_head, own, heads, kv_heads, KEYS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr
):
    """Keys and values [keys, width] of the item's diffusion block from its row `own` on. Past its last row they are zeros."""
    key, dims = tl.arange(0, KEYS), tl.arange(0, WIDTH)
    there = (own + key < item.block_rows)[:, None] & (dims < DIM)[None, :]
    head = (item.block_row + own + key) * (heads + 2 * kv_heads) + heads + kv_head
    spot = head.to(tl.int64)[:, None] * DIM + dims[None, :]
    k = tl.load(qkv + spot, mask=there, other=0.0)
    return k, tl.load(qkv + spot + kv_heads * DIM, mask=there, other=0.0)


@triton.jit
def _attention_kernel(
    qkv,
    k_cache,
    v_cache,
    work,
    out,
    accs,
    tops,
    norms,
    heads,
    kv_heads,
    num_slots,
    scale,
    spare,
    factor,
    PER_KV: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    IN_WORDS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """num_slots: cache slots of a KV head (see `KVWrites`), pages * page_size.

    spare: index of the first scratch record of the programs. factor, IN_WORDS: how `out` stores results if it is e4m3.
    """
    if CHAINED:
        gdc_launch_dependents()
    # The work list is uploaded before the pass, so it may be read before `gdc_wait`.
    count = tl.load(work + NUM_ITEMS) * kv_heads
    records = Records(accs, tops, norms)
    query_index = tl.arange(0, QUERIES)
    dims = tl.arange(0, WIDTH)
    for index in range(tl.program_id(0), count, PROGRAMS):
        item, kv_head = load_item(work, index // kv_heads), index % kv_heads
        divided = item.record >= 0
        # Queries are ordered by row, and within a row by query head.
        row = query_index // PER_KV
        head = kv_head * PER_KV + query_index % PER_KV
        inside = row < item.num_rows
        mask = inside[:, None] & (dims < DIM)[None, :]
        limit = item.num_keys - item.unseen - (item.num_rows - 1 - row) * item.causal
        # Where partial results are stored: in records, or in the program's scratch records.
        partial_at = tl.where(
            divided,
            (item.record + row * item.num_records) * heads + head,
            spare + tl.program_id(0) * QUERIES + query_index,
        )
        keys = item_keys(item, KEYS)
        if CHAINED:
            gdc_wait()
        source = ((item.first_row + row) * (heads + 2 * kv_heads) + head).to(tl.int64) * DIM
        query = tl.load(qkv + source[:, None] + dims[None, :], mask=mask, other=0.0)
        span, segment = initial(QUERIES, WIDTH), initial(QUERIES, WIDTH)
        walk = start_walk(item, keys)
        stored = False  # Whether the scratch records hold the merged spans so far.
        for step in range(keys.steps):
            at = walk.here
            key = tl.arange(0, KEYS)
            if step < keys.cached_steps:
                page = tl.load(work + item.table_at + at // PAGE)
                k, v = _load_cached(k_cache, v_cache, kv_head, num_slots, page, at, PAGE, KEYS, DIM, WIDTH)
                bound = limit - at
            else:
                own = (step - keys.cached_steps) * KEYS
                k, v = _load_block(qkv, item, kv_head, own, heads, kv_heads, KEYS, DIM, WIDTH)
                bound = tl.zeros_like(limit) + (item.block_rows - own)
            segment = update(segment, query, k, v, scale, key[None, :] < bound[:, None])
            walk, ends_segment = take_step(walk, keys, step, KEYS)
            if ends_segment:
                span = merge(span, segment)
                segment = initial(QUERIES, WIDTH)
                if ends_record(walk, keys, step):
                    last = step + 1 == keys.steps
                    if stored & (divided == 0):
                        tl.debug_barrier()  # Other threads may have stored it.
                        span = merge(load(records, partial_at, inside, WIDTH, DIM), span)
                    if divided | (last == 0):
                        store(records, partial_at, inside, span, WIDTH, DIM)
                        span = initial(QUERIES, WIDTH)
                        partial_at += tl.where(divided, heads, 0)
                        stored = True
                walk = next_segment(walk, keys, step)
        if divided == 0:
            goal = ((item.first_row + row) * heads + head).to(tl.int64) * DIM
            value = result(span, inside, factor, out.dtype.element_ty)
            tl.store(out + goal[:, None] + stored_place(dims, IN_WORDS)[None, :], value, mask=mask)
    if CHAINED:
        gdc_wait()  # Programs without an item wait too: this launch must not finish before the previous one.


def launch(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: AttentionPlan,
    scale: float,
    out: Tensor,
    records: tuple[Tensor, Tensor, Tensor],
    rounding: Rounding | None,
    *,
    spare: int,
    queries: int,
    keys: int,
    width: int,
    programs: int,
) -> None:
    """Write the results of whole tiles to out [rows, heads * dim], and the partial results of divided tiles to `records`.

    scale: of the scores to base 2. records, rounding: as `merge_records` takes them. spare: see the kernel. queries, keys: of a
    tile. width: head dimensions, padded to a power of two.
    """
    work = plan.work
    assert work is not None
    kv_heads, pages, page_size, dim = k_cache.shape
    factor, in_words = stored_as(rounding)
    _attention_kernel[(programs,)](
        qkv,
        k_cache,
        v_cache,
        work.numbers,
        out,
        *records,
        qkv.shape[1] - 2 * kv_heads,
        kv_heads,
        pages * page_size,
        scale,
        spare,
        factor,
        PER_KV=plan.heads_per_kv,
        PAGE=page_size,
        DIM=dim,
        WIDTH=width,
        QUERIES=queries,
        KEYS=keys,
        PROGRAMS=programs,
        IN_WORDS=in_words,
        num_warps=4,
        num_stages=2,
        **chaining(),
    )
