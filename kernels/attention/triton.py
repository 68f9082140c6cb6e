"""Paged attention on a GPU, for rows of both views, with one reduction order per row.

A launch has a fixed number of programs, which go through the pass's work list (`attention_work.py`): its shape depends on nothing
but the number of rows, so that a CUDA graph can hold it. Inside a segment a running softmax goes over tiles of keys in
order; the segments of a span are merged in order, then the spans; the row's own diffusion block is merged with its last
span. It is the same arithmetic whether one program walks over all segments of its rows or several take some each and a
second kernel merges. Queries fill 64 rows of the matrix unit, those of one KV head side by side: one instruction for any
number of rows.

The first kernel here runs on any GPU; on Hopper, in 16-bit types, `attention_stream` takes its place.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.attention import hopper as attention_stream
from kernels.attention.work import DIVIDED_ROW, HEADER, ITEM, SPAN
from kernels.attention.work_triton import load_item, segment_start
from kernels.device import chaining, has_warpgroup_mma, multiprocessors
from kernels.workspace import empty

if TYPE_CHECKING:
    from kernels.attention.reference import AttentionPlan

_MERGED_HEADS = 4
"""Heads of a program that merges records, a warp for each."""
_LOG2_E = 1.4426950408889634


@triton.jit
def _see(query, keys, values, top, norm, acc, scale, visible):
    """One step of the running softmax (Milakov and Gimelshein, 2018), base 2: weights of `visible` keys join norm and acc.

    Multiply-adds are spelt out: both places that inline this round alike.
    """
    scores = tl.dot(query, keys.T, input_precision="ieee")
    scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    # A row that has seen nothing yet: any finite value will do, its weights are zero.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(tl.fma(scores, tl.zeros_like(scores) + scale, tl.zeros_like(scores) - base[:, None]))
    fade = tl.exp2(top - base)
    norm = tl.fma(norm, fade, tl.sum(weights, 1))
    acc = tl.dot(weights.to(values.dtype), values, acc * fade[:, None], input_precision="ieee")
    return new_top, norm, acc


@triton.jit
def _nothing(QUERIES: tl.constexpr, WIDTH: tl.constexpr):
    """The running softmax of queries that have seen no key: highest score, norm, weighted sum of values."""
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    return top, tl.zeros((QUERIES,), tl.float32), tl.zeros((QUERIES, WIDTH), tl.float32)


@triton.jit
def _merge(top, norm, acc, part_top, part_norm, part_acc):
    """Put a running softmax behind another one. One that has seen nothing changes no bit."""
    new_top = tl.maximum(top, part_top)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    old, new = tl.exp2(top - base), tl.exp2(part_top - base)
    norm = tl.fma(norm, old, part_norm * new)
    acc = tl.fma(acc, tl.broadcast_to(old[:, None], acc.shape), part_acc * new[:, None])
    return new_top, norm, acc


@triton.jit
def _load(partials, tops, norms, at, inside, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """The partial results `at` these places; where not `inside`, nothing."""
    dims = tl.arange(0, WIDTH)
    mask = inside[:, None] & (dims < DIM)[None, :]
    top = tl.load(tops + at, mask=inside, other=float("-inf"))
    norm = tl.load(norms + at, mask=inside, other=0.0)
    return top, norm, tl.load((partials + at * DIM)[:, None] + dims[None, :], mask=mask, other=0.0)


@triton.jit
def _attention_kernel(
    qkv,
    k_cache,
    v_cache,
    work,
    out,
    partials,
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
    BEFORE_ITEMS: tl.constexpr,
    PER_ITEM: tl.constexpr,
    SPAN: tl.constexpr,
    CHAINED: tl.constexpr,
):
    if CHAINED:
        gdc_launch_dependents()
    # The work list is uploaded before the pass: no kernel writes it.
    count = tl.load(work) * kv_heads
    query_index = tl.arange(0, QUERIES)
    dims = tl.arange(0, WIDTH)
    for index in range(tl.program_id(0), count, PROGRAMS):
        item = work + BEFORE_ITEMS + index // kv_heads * PER_ITEM
        kv_head = index % kv_heads
        numbers = load_item(item)
        first_row, rows, table_at, segment, last_segment, seen, _ = numbers[:7]
        block_row, block, causal, record, records = numbers[7:]
        table = work + table_at
        divided = record >= 0
        # A KV head's queries: all its query heads of a row, then the next row's.
        row = query_index // PER_KV
        head = kv_head * PER_KV + query_index % PER_KV
        inside = row < rows
        mask = inside[:, None] & (dims < DIM)[None, :]
        limit = seen - (rows - 1 - row) * causal
        # Where partial results go: records, or the program's own place.
        left_at = tl.where(
            divided,
            (record + row * records) * heads + head,
            spare + tl.program_id(0) * QUERIES + query_index,
        )
        begin, end = segment_start(segment), min(segment_start(last_segment), seen)
        spans_from = tl.cdiv(begin, SPAN) * SPAN  # Before it, a record for each segment.
        if CHAINED:
            gdc_wait()
        place = ((first_row + row) * (heads + 2 * kv_heads) + head).to(tl.int64) * DIM
        query = tl.load(qkv + place[:, None] + dims[None, :], mask=mask, other=0.0)
        top, norm, acc = _nothing(QUERIES, WIDTH)
        part_top, part_norm, part_acc = _nothing(QUERIES, WIDTH)
        # Cached keys, then the block's own.
        cached = tl.cdiv(max(end - begin, 0), KEYS)
        tiles = cached + tl.cdiv(block, KEYS)
        next_start = tl.where(cached > 0, segment_start(segment + 1), 0)  # A block is one segment.
        left = False
        for tile in range(tiles):
            at = begin + tile * KEYS
            own = (tile - cached) * KEYS
            key = tl.arange(0, KEYS)
            if tile < cached:
                page = tl.load(table + at // PAGE)
                spot = (kv_head * slots + page * PAGE + at % PAGE + key).to(tl.int64)[:, None] * DIM + dims[
                    None, :
                ]
                keys = tl.load(k_cache + spot, mask=(dims < DIM)[None, :], other=0.0)
                values = tl.load(v_cache + spot, mask=(dims < DIM)[None, :], other=0.0)
                bound = limit - at
            else:
                there = (own + key < block)[:, None] & (dims < DIM)[None, :]
                block_head = (block_row + own + key) * (heads + 2 * kv_heads) + heads + kv_head
                spot = block_head.to(tl.int64)[:, None] * DIM + dims[None, :]
                keys = tl.load(qkv + spot, mask=there, other=0.0)
                values = tl.load(qkv + spot + kv_heads * DIM, mask=there, other=0.0)
                bound = tl.zeros_like(limit) + (block - own)
            visible = key[None, :] < bound[:, None]
            part_top, part_norm, part_acc = _see(
                query, keys, values, part_top, part_norm, part_acc, scale, visible
            )
            at += KEYS
            last, cached_end = tile + 1 == tiles, tile + 1 == cached
            if last | cached_end | (at == next_start):
                top, norm, acc = _merge(top, norm, acc, part_top, part_norm, part_acc)
                part_top, part_norm, part_acc = _nothing(QUERIES, WIDTH)
                segment += 1
                next_start = tl.where(tile + 1 < cached, segment_start(segment + 1), 0)
                if last | (at <= spans_from) | ((at % SPAN == 0) & (cached_end == 0)):
                    if left & (divided == 0):
                        tl.debug_barrier()  # Other threads may have stored it.
                        spans = _load(partials, tops, norms, left_at, inside, WIDTH, DIM)
                        top, norm, acc = _merge(spans[0], spans[1], spans[2], top, norm, acc)
                    if divided | (last == 0):
                        tl.store(tops + left_at, top, mask=inside)
                        tl.store(norms + left_at, norm, mask=inside)
                        tl.store((partials + left_at * DIM)[:, None] + dims[None, :], acc, mask=mask)
                        top, norm, acc = _nothing(QUERIES, WIDTH)
                        left_at += tl.where(divided, heads, 0)
                        left = True
        if divided == 0:
            result = (acc * (1.0 / tl.where(inside, norm, 1.0))[:, None]).to(out.dtype.element_ty)
            goal = ((first_row + row) * heads + head).to(tl.int64) * DIM
            tl.store(out + goal[:, None] + dims[None, :], result, mask=mask)
    if CHAINED:
        gdc_wait()  # Programs without an item wait too: this launch must not be over before the one ahead of it.


@triton.jit
def _load_record(place, i, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """A row's i-th record for some of its heads, as a tuple of one; nothing past the last record.

    place: where records lie; the row's first record and how many it has; how many heads the pass has, and which are wanted.
    """
    partials, tops, norms, record, records, heads, head = place
    inside = head < tl.where(i < records, heads, 0)
    return (_load(partials, tops, norms, (record + i) * heads + head, inside, WIDTH, DIM),)


@triton.jit
def _merge_kernel(
    work,
    out,
    partials,
    tops,
    norms,
    heads,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    BATCH: tl.constexpr,
    PER_ROW: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Merge the records of divided rows, HEADS heads of a row at a time: those of each span in order, then the spans."""
    if CHAINED:
        gdc_launch_dependents()
    row_count, rows = tl.load(work + 2), work + tl.load(work + 3)
    groups = tl.cdiv(heads, HEADS)
    dims = tl.arange(0, WIDTH)
    for unit in range(tl.program_id(0), row_count * groups, tl.num_programs(0)):
        entry = rows + unit // groups * PER_ROW
        row, record, records = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        span_ends = work + tl.load(entry + 3)
        head = unit % groups * HEADS + tl.arange(0, HEADS)
        span_top, span_norm, span_acc = _nothing(HEADS, WIDTH)
        top, norm, acc = _nothing(HEADS, WIDTH)
        if CHAINED:
            gdc_wait()
        place = partials, tops, norms, record, records, heads, head
        for start in range(0, records, BATCH):
            ends = tl.load(span_ends + start // 32) >> start % 32
            # Many reads in flight; merging stays in order.
            parts = _load_record(place, start, WIDTH, DIM)
            for i in tl.static_range(1, BATCH):
                parts = parts + _load_record(place, start + i, WIDTH, DIM)
            for i in tl.static_range(BATCH):
                part = parts[i]
                span_top, span_norm, span_acc = _merge(
                    span_top, span_norm, span_acc, part[0], part[1], part[2]
                )
                if (ends >> i) & 1:
                    top, norm, acc = _merge(top, norm, acc, span_top, span_norm, span_acc)
                    span_top, span_norm, span_acc = _nothing(HEADS, WIDTH)
        goal = (out + (row * heads + head).to(tl.int64) * DIM)[:, None] + dims[None, :]
        inside = head < heads
        result = (acc * (1.0 / tl.where(inside, norm, 1.0))[:, None]).to(out.dtype.element_ty)
        tl.store(goal, result, mask=inside[:, None] & (dims < DIM)[None, :])
    if CHAINED:
        gdc_wait()  # Programs without a row wait too.


def paged_attention(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, plan: "AttentionPlan", scale: float
) -> Tensor:
    """`kernels.paged_attention` for float16, bfloat16 and float32 of contiguous tensors. Rows of no group get anything."""
    work = plan.work
    assert work is not None, "a plan for a GPU has a work list"
    kv_heads, pages, page_size, dim = k_cache.shape
    rows, heads = qkv.shape[0], qkv.shape[1] - 2 * kv_heads
    keys = 32 if qkv.dtype == torch.float32 else 64
    if page_size % keys:
        raise ValueError(
            f"pages of {page_size} tokens can't be read on a GPU: page_size must be a multiple of {keys}"
        )
    queries = _queries(qkv.dtype)
    width = max(16, triton.next_power_of_2(dim))
    programs = attention_programs(qkv.device)
    out = empty((rows, heads * dim), qkv.dtype, qkv.device)
    # Records, then a place for each program.
    spare = work.capacity * heads
    places = spare + programs * queries
    partials = torch.empty(places, dim, device=qkv.device, dtype=torch.float32)
    tops, norms = torch.empty(2, places, device=qkv.device, dtype=torch.float32)
    if shares_tiles(qkv.dtype, dim):
        attention_stream.launch(
            qkv, k_cache, v_cache, plan, scale * _LOG2_E, out, partials, tops, norms,
            spare=spare, queries=queries, keys=keys, width=width, programs=programs // 2,
        )  # fmt: skip
    else:
        _attention_kernel[(programs,)](
            qkv,
            k_cache,
            v_cache,
            work.numbers,
            out,
            partials,
            tops,
            norms,
            heads,
            kv_heads,
            pages * page_size,
            scale * _LOG2_E,
            spare,
            PER_KV=plan.heads_per_kv,
            PAGE=page_size,
            DIM=dim,
            WIDTH=width,
            QUERIES=queries,
            KEYS=keys,
            PROGRAMS=programs,
            BEFORE_ITEMS=HEADER,
            PER_ITEM=ITEM,
            SPAN=SPAN,
            num_warps=4,
            num_stages=2,
            **chaining(),
        )
    if work.capacity:
        _merge_kernel[(min(4 * programs, rows * triton.cdiv(heads, _MERGED_HEADS)),)](
            work.numbers,
            out,
            partials,
            tops,
            norms,
            heads,
            DIM=dim,
            WIDTH=width,
            HEADS=_MERGED_HEADS,
            # A warp for a head goes through its records alone: with few rows their reads, not the registers, are the limit.
            BATCH=16 if rows <= 16 else 8,
            PER_ROW=DIVIDED_ROW,
            num_warps=_MERGED_HEADS,
            **chaining(),
        )
    return out


def _queries(dtype: torch.dtype) -> int:
    return 16 if dtype == torch.float32 else 64


def attention_programs(device: torch.device) -> int:
    """Among how many the work list is divided: two on a multiprocessor, programs or lanes of one program."""
    return 2 * multiprocessors(device)


def tile_rows(heads_per_kv: int, dtype: torch.dtype) -> int:
    """Rows of a tile of the work list: as many as their queries have room for."""
    return max(1, _queries(dtype) // heads_per_kv)


def shares_tiles(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the work list is for `attention_stream`, which takes shared tiles; its rings have no room for wider heads."""
    return has_warpgroup_mma() and dtype.itemsize == 2 and head_dim <= 128
