"""The attention kernel for any GPU; on Hopper, in 16-bit types, `hopper` takes its place.

A launch has a fixed number of programs, which go through the work list of the pass: its shape depends on nothing but the number
of rows, so a CUDA graph can hold it. Inside a segment a running softmax goes over tiles of keys in order. The segments of a
span are merged in order, and then the spans. A row's own diffusion block is merged with its last span. It is the same
arithmetic whether one program walks over all segments of its rows, or several take some each and `merge_records` merges them.

The queries of one KV head fill 64 rows of the matrix unit, side by side: one instruction for any number of rows.
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
from orthrus.kernels.attention.softmax import Records, load, merge, nothing, result, see, store
from orthrus.kernels.attention.types import AttentionPlan
from orthrus.kernels.device import chaining


@triton.jit
def _load_cached(
    k_cache,
    v_cache,
    kv_head,
    slots,
    page,
    at,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Keys and values of positions at .. at + KEYS - 1 [keys, width], which lie in one page."""
    key, dims = tl.arange(0, KEYS), tl.arange(0, WIDTH)
    spot = (kv_head * slots + page * PAGE + at % PAGE + key).to(tl.int64)[:, None] * DIM + dims[None, :]
    mask = (dims < DIM)[None, :]
    return tl.load(k_cache + spot, mask=mask, other=0.0), tl.load(v_cache + spot, mask=mask, other=0.0)


@triton.jit
def _load_block(
    qkv, item, kv_head, own, heads, kv_heads, KEYS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr
):
    """Keys and values [keys, width] of the item's diffusion block from its row `own` on; zeros behind its last row."""
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
    slots,
    scale,
    spare,
    PER_KV: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """slots: places of a KV head in the cache. spare: first of the programs' own places among the records."""
    if CHAINED:
        gdc_launch_dependents()
    # The work list is uploaded before the pass: no kernel writes it.
    count = tl.load(work + NUM_ITEMS) * kv_heads
    records = Records(accs, tops, norms)
    query_index = tl.arange(0, QUERIES)
    dims = tl.arange(0, WIDTH)
    for index in range(tl.program_id(0), count, PROGRAMS):
        item, kv_head = load_item(work, index // kv_heads), index % kv_heads
        divided = item.record >= 0
        # A KV head's queries: all its query heads of a row, then the next row's.
        row = query_index // PER_KV
        head = kv_head * PER_KV + query_index % PER_KV
        inside = row < item.num_rows
        mask = inside[:, None] & (dims < DIM)[None, :]
        limit = item.num_keys - item.unseen - (item.num_rows - 1 - row) * item.causal
        # Where partial results go: records, or the program's own place.
        left_at = tl.where(
            divided,
            (item.record + row * item.num_records) * heads + head,
            spare + tl.program_id(0) * QUERIES + query_index,
        )
        keys = item_keys(item, KEYS)
        if CHAINED:
            gdc_wait()
        place = ((item.first_row + row) * (heads + 2 * kv_heads) + head).to(tl.int64) * DIM
        query = tl.load(qkv + place[:, None] + dims[None, :], mask=mask, other=0.0)
        span, segment = nothing(QUERIES, WIDTH), nothing(QUERIES, WIDTH)
        walk = start_walk(item, keys)
        left = False  # Whether a span has been left in the program's own place.
        for step in range(keys.steps):
            at = walk.here
            key = tl.arange(0, KEYS)
            if step < keys.cached_steps:
                page = tl.load(work + item.table_at + at // PAGE)
                k, v = _load_cached(k_cache, v_cache, kv_head, slots, page, at, PAGE, KEYS, DIM, WIDTH)
                bound = limit - at
            else:
                own = (step - keys.cached_steps) * KEYS
                k, v = _load_block(qkv, item, kv_head, own, heads, kv_heads, KEYS, DIM, WIDTH)
                bound = tl.zeros_like(limit) + (item.block_rows - own)
            segment = see(segment, query, k, v, scale, key[None, :] < bound[:, None])
            walk, ends_segment = take_step(walk, keys, step, KEYS)
            if ends_segment:
                span = merge(span, segment)
                segment = nothing(QUERIES, WIDTH)
                if ends_record(walk, keys, step):
                    last = step + 1 == keys.steps
                    if left & (divided == 0):
                        tl.debug_barrier()  # Other threads may have stored it.
                        span = merge(load(records, left_at, inside, WIDTH, DIM), span)
                    if divided | (last == 0):
                        store(records, left_at, inside, span, WIDTH, DIM)
                        span = nothing(QUERIES, WIDTH)
                        left_at += tl.where(divided, heads, 0)
                        left = True
                walk = next_segment(walk, keys, step)
        if divided == 0:
            goal = ((item.first_row + row) * heads + head).to(tl.int64) * DIM
            value = result(span, inside, out.dtype.element_ty)
            tl.store(out + goal[:, None] + dims[None, :], value, mask=mask)
    if CHAINED:
        gdc_wait()  # Programs without an item wait too: this launch must not be over before the one ahead of it.


def launch(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: AttentionPlan,
    scale: float,
    out: Tensor,
    records: tuple[Tensor, Tensor, Tensor],
    *,
    spare: int,
    queries: int,
    keys: int,
    width: int,
    programs: int,
) -> None:
    """Attend, and leave the records of divided tiles; for the arguments see `gpu.paged_attention`, which prepares them."""
    work = plan.work
    assert work is not None
    kv_heads, pages, page_size, dim = k_cache.shape
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
        PER_KV=plan.heads_per_kv,
        PAGE=page_size,
        DIM=dim,
        WIDTH=width,
        QUERIES=queries,
        KEYS=keys,
        PROGRAMS=programs,
        num_warps=4,
        num_stages=2,
        **chaining(),
    )
