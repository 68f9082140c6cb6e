"""Paged attention on a GPU, for rows of both views, with one reduction order per row.

A launch has a fixed number of programs, which go through the pass's work list (`attention_work.py`): its shape depends on nothing
but the number of rows, so that a CUDA graph can hold it. Inside a segment a running softmax goes over tiles of keys in
order; segments are merged in order, then the row's own diffusion block. It is the same arithmetic whether one program
walks over all segments of its rows or several take some each and a second kernel merges. Queries fill 64 rows of the
matrix unit, those of one KV head side by side: one instruction for any number of rows.

The first kernel here runs on any GPU; on Hopper, `attention_stream` takes its place.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels import attention_stream
from kernels.attention_work import HEADER, ITEM
from kernels.device import chaining, has_warpgroup_mma, multiprocessors

if TYPE_CHECKING:
    from kernels.attention import AttentionPlan

_LOG2_E = 1.4426950408889634


@triton.jit
def _segment_start(index):
    """`attention_work.segment_start`."""
    near, middle = index * 128, 1024 + (index - 8) * 512
    far, farther = 8192 + (index - 22) * 1024, 32768 + (index - 46) * 2048
    return tl.where(index < 22, tl.where(index < 8, near, middle), tl.where(index < 46, far, farther))


@triton.jit
def _num_segments(keys):
    """`attention_work.num_segments`."""
    near, middle = tl.cdiv(keys, 128), 8 + tl.cdiv(keys - 1024, 512)
    far, farther = 22 + tl.cdiv(keys - 8192, 1024), 46 + tl.cdiv(keys - 32768, 2048)
    return tl.where(keys <= 8192, tl.where(keys <= 1024, near, middle), tl.where(keys <= 32768, far, farther))


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
def _merge(seen, top, norm, acc, part_top, part_norm, part_acc):
    """Put a segment's running softmax behind what came before it, for the rows that have `seen` it."""
    new_top = tl.maximum(top, part_top)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    old, new = tl.exp2(top - base), tl.exp2(part_top - base)
    norm = tl.where(seen, tl.fma(norm, old, part_norm * new), norm)
    if len(acc.shape) == 2:  # A tile of queries; in the second kernel, one query.
        old, new, seen_acc = tl.broadcast_to(old[:, None], acc.shape), new[:, None], seen[:, None]
    else:
        seen_acc = seen
    acc = tl.where(seen_acc, tl.fma(acc, old, part_acc * new), acc)
    return tl.where(seen, new_top, top), norm, acc


@triton.jit
def _end_segment(
    divided,
    tops,
    norms,
    partials,
    record,
    heads,
    head,
    inside,
    seen,
    top,
    norm,
    acc,
    part_top,
    part_norm,
    part_acc,
    DIM: tl.constexpr,
):
    """Leave a segment's running softmax in each query's `record` where the tile is divided, else merge it."""
    if divided:
        at = record.to(tl.int64) * heads + head
        dims = tl.arange(0, acc.shape[1])
        tl.store(tops + at, part_top, mask=inside)
        tl.store(norms + at, part_norm, mask=inside)
        place = partials + at[:, None] * DIM + dims[None, :]
        tl.store(place, part_acc, mask=inside[:, None] & (dims < DIM)[None, :])
    else:
        top, norm, acc = _merge(seen, top, norm, acc, part_top, part_norm, part_acc)
    return top, norm, acc


@triton.jit
def _attention_kernel(
    qkv,
    k_cache,
    v_cache,
    work,
    limits,
    records,
    out,
    partials,
    tops,
    norms,
    heads,
    kv_heads,
    slots,
    scale,
    PER_KV: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BEFORE_ITEMS: tl.constexpr,
    PER_ITEM: tl.constexpr,
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
        first_row, rows = tl.load(item), tl.load(item + 1)
        table = work + tl.load(item + 2)
        segment, last_segment = tl.load(item + 3), tl.load(item + 4)
        seen, block_row, block = tl.load(item + 5), tl.load(item + 7), tl.load(item + 8)
        # A KV head's queries: all its query heads of a row, then the next row's.
        row = first_row + query_index // PER_KV
        head = kv_head * PER_KV + query_index % PER_KV
        inside = query_index // PER_KV < rows
        mask = inside[:, None] & (dims < DIM)[None, :]
        limit = tl.load(limits + row, mask=inside, other=0)
        record = tl.load(records + row, mask=inside, other=-1)
        divided = tl.load(records + first_row) >= 0
        begin, end = _segment_start(segment), min(_segment_start(last_segment), seen)
        if CHAINED:
            gdc_wait()
        place = (row * (heads + 2 * kv_heads) + head).to(tl.int64) * DIM
        query = tl.load(qkv + place[:, None] + dims[None, :], mask=mask, other=0.0)
        top = tl.full((QUERIES,), float("-inf"), tl.float32)
        norm = tl.zeros((QUERIES,), tl.float32)
        acc = tl.zeros((QUERIES, WIDTH), tl.float32)
        part_top, part_norm, part_acc = top, norm, acc
        # Cached keys, then the block's own: a segment of its own, behind the others.
        cached = tl.cdiv(max(end - begin, 0), KEYS)
        for tile in range(cached + tl.cdiv(block, KEYS)):
            at = begin + tile * KEYS
            own = (tile - cached) * KEYS
            ends = at == _segment_start(segment + 1) if tile < cached else tile == cached
            if ends & (tile > 0):
                top, norm, acc = _end_segment(
                    divided, tops, norms, partials, record + segment, heads, head, inside,
                    _segment_start(segment) < limit, top, norm, acc, part_top, part_norm, part_acc, DIM,
                )  # fmt: skip
                segment += 1
                part_top = tl.full((QUERIES,), float("-inf"), tl.float32)
                part_norm = tl.zeros((QUERIES,), tl.float32)
                part_acc = tl.zeros((QUERIES, WIDTH), tl.float32)
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
        seen_last = (_segment_start(segment) < limit) | (block > 0)
        top, norm, acc = _end_segment(
            divided, tops, norms, partials, record + (last_segment if block > 0 else segment), heads, head, inside,
            seen_last, top, norm, acc, part_top, part_norm, part_acc, DIM,
        )  # fmt: skip
        if not divided:
            result = (acc / tl.where(inside, norm, 1.0)[:, None]).to(out.dtype.element_ty)
            goal = (row * heads + head).to(tl.int64) * DIM
            tl.store(out + goal[:, None] + dims[None, :], result, mask=mask)
    if CHAINED:
        gdc_wait()  # Programs without an item wait too: this launch must not be over before the one ahead of it.


@triton.jit
def _merge_kernel(
    limits,
    records,
    num_ar,
    out,
    partials,
    tops,
    norms,
    heads,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Merge one row's segments in order, for one head; its block, if it has one, is the last record."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    record = tl.load(records + row)
    limit = tl.load(limits + row)
    diffusion = row >= tl.load(num_ar)
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    if record < 0:
        return
    first = record.to(tl.int64) * heads + head
    dims = tl.arange(0, WIDTH)
    inside = dims < DIM
    top = tl.full((WIDTH,), float("-inf"), tl.float32)
    norm = tl.zeros((WIDTH,), tl.float32)
    acc = tl.zeros((WIDTH,), tl.float32)
    segments = _num_segments(limit)
    for segment in range(0, segments, 8):  # Eight reads in flight; merging stays in order.
        place = first + segment * heads
        top0, norm0, acc0 = _load_part(
            partials, tops, norms, place + 0 * heads, segment + 0 < segments, dims, DIM
        )
        top1, norm1, acc1 = _load_part(
            partials, tops, norms, place + 1 * heads, segment + 1 < segments, dims, DIM
        )
        top2, norm2, acc2 = _load_part(
            partials, tops, norms, place + 2 * heads, segment + 2 < segments, dims, DIM
        )
        top3, norm3, acc3 = _load_part(
            partials, tops, norms, place + 3 * heads, segment + 3 < segments, dims, DIM
        )
        top4, norm4, acc4 = _load_part(
            partials, tops, norms, place + 4 * heads, segment + 4 < segments, dims, DIM
        )
        top5, norm5, acc5 = _load_part(
            partials, tops, norms, place + 5 * heads, segment + 5 < segments, dims, DIM
        )
        top6, norm6, acc6 = _load_part(
            partials, tops, norms, place + 6 * heads, segment + 6 < segments, dims, DIM
        )
        top7, norm7, acc7 = _load_part(
            partials, tops, norms, place + 7 * heads, segment + 7 < segments, dims, DIM
        )
        top, norm, acc = _merge(inside & (segment + 0 < segments), top, norm, acc, top0, norm0, acc0)
        top, norm, acc = _merge(inside & (segment + 1 < segments), top, norm, acc, top1, norm1, acc1)
        top, norm, acc = _merge(inside & (segment + 2 < segments), top, norm, acc, top2, norm2, acc2)
        top, norm, acc = _merge(inside & (segment + 3 < segments), top, norm, acc, top3, norm3, acc3)
        top, norm, acc = _merge(inside & (segment + 4 < segments), top, norm, acc, top4, norm4, acc4)
        top, norm, acc = _merge(inside & (segment + 5 < segments), top, norm, acc, top5, norm5, acc5)
        top, norm, acc = _merge(inside & (segment + 6 < segments), top, norm, acc, top6, norm6, acc6)
        top, norm, acc = _merge(inside & (segment + 7 < segments), top, norm, acc, top7, norm7, acc7)
    if diffusion:
        place = first + segments * heads
        own_top, own_norm, own_acc = _load_part(partials, tops, norms, place, True, dims, DIM)
        top, norm, acc = _merge(inside, top, norm, acc, own_top, own_norm, own_acc)
    place = out + (row * heads + head).to(tl.int64) * DIM + dims
    tl.store(place, (acc / tl.where(inside, norm, 1.0)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _load_part(partials, tops, norms, place, seen, dims, DIM: tl.constexpr):
    """A query's running softmax over one segment, the scalars spread over its dims."""
    mask = tl.where(seen, dims, DIM) < DIM
    spread = dims * 0
    top = tl.load(tops + place + spread, mask=mask, other=float("-inf"))
    norm = tl.load(norms + place + spread, mask=mask, other=0.0)
    return top, norm, tl.load(partials + place * DIM + dims, mask=mask, other=0.0)


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
    out = torch.empty(rows, heads * dim, device=qkv.device, dtype=qkv.dtype)
    partials = torch.empty(max(1, work.capacity), heads, dim, device=qkv.device, dtype=torch.float32)
    tops, norms = torch.empty(2, max(1, work.capacity), heads, device=qkv.device, dtype=torch.float32)
    queries = _queries(qkv.dtype)
    width = max(16, triton.next_power_of_2(dim))
    programs = attention_programs(qkv.device)
    if has_warpgroup_mma() and qkv.itemsize == 2:
        attention_stream.launch(
            qkv, k_cache, v_cache, plan, scale * _LOG2_E, out, partials, tops, norms,
            queries=queries, keys=keys, width=width, programs=programs,
        )  # fmt: skip
    else:
        _attention_kernel[(programs,)](
            qkv,
            k_cache,
            v_cache,
            work.items,
            work.limits,
            work.records,
            out,
            partials,
            tops,
            norms,
            heads,
            kv_heads,
            pages * page_size,
            scale * _LOG2_E,
            PER_KV=plan.heads_per_kv,
            PAGE=page_size,
            DIM=dim,
            WIDTH=width,
            QUERIES=queries,
            KEYS=keys,
            PROGRAMS=programs,
            BEFORE_ITEMS=HEADER,
            PER_ITEM=ITEM,
            num_warps=4,
            num_stages=2,
            **chaining(),
        )
    if work.capacity:
        _merge_kernel[(rows, heads)](
            work.limits,
            work.records,
            work.num_ar,
            out,
            partials,
            tops,
            norms,
            heads,
            DIM=dim,
            WIDTH=width,
            num_warps=1,
            **chaining(),
        )
    return out


def _queries(dtype: torch.dtype) -> int:
    return 16 if dtype == torch.float32 else 64


def attention_programs(device: torch.device) -> int:
    """Programs of a launch: as many as run at a time, two on a multiprocessor."""
    return 2 * multiprocessors(device)


def tile_rows(heads_per_kv: int, dtype: torch.dtype) -> int:
    """Rows of a tile of the work list: as many as their queries have room for."""
    return max(1, _queries(dtype) // heads_per_kv)
