"""Paged attention on a GPU, for rows of both views, with one reduction order per row.

Keys are cut into segments at fixed positions: short ones first, so that a short context still fills the GPU, longer ones
further on, so that a long one does not drown in partial results. Inside a segment a running softmax goes over tiles of
keys in order; segments are merged in order, then the row's own diffusion block. It is the same arithmetic whether one program
walks over all segments of its rows (prefill, large batches) or takes one segment (few rows) and a second kernel merges.
Queries always fill 64 rows of the matrix unit, those of one KV head side by side: one instruction for any number of rows.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from kernels.attention import AttentionBatch

_LOG2_E = 1.4426950408889634
_FULL_GRID = 264
"""Programs from which on walking is as fast as splitting: two for each multiprocessor."""


@triton.jit
def _segment_start(index):
    """First key of a segment: 4 of 256 keys, 14 of 512 (from 1,024), then 1,024 each (from 8,192)."""
    near = index * 256
    middle = 1024 + (index - 4) * 512
    far = 8192 + (index - 18) * 1024
    return tl.where(index < 4, near, tl.where(index < 18, middle, far))


def num_segments(keys: int) -> int:
    """How many segments hold the first `keys` keys."""
    if keys <= 1024:
        return -(-keys // 256)
    return 4 + -(-(keys - 1024) // 512) if keys <= 8192 else 18 + -(-(keys - 8192) // 1024)


@triton.jit
def _see(query, keys, values, visible, top, norm, acc, scale):
    """One step of the running softmax (Milakov and Gimelshein, 2018), base 2: weights of `visible` keys join norm and acc.

    Multiply-adds are spelt out, so that every kernel that inlines this rounds alike.
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
def _see_segment(
    query,
    k_cache,
    v_cache,
    table,
    begin,
    end,
    limit,
    scale,
    stride_page,
    stride_slot,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Running softmax over cache keys begin..end-1, of which a query sees those below its limit."""
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    norm = tl.zeros((QUERIES,), tl.float32)
    acc = tl.zeros((QUERIES, WIDTH), tl.float32)
    dims = tl.arange(0, WIDTH)
    for at in range(begin, end, KEYS):
        index = at + tl.arange(0, KEYS)
        # Keys that no row sees are read as zeros: 0 x NaN from memory never written would be NaN.
        live = index < end
        page = tl.load(table + index // PAGE, mask=live, other=0)
        place = (page * stride_page + index % PAGE * stride_slot)[:, None] + dims[None, :]
        mask = live[:, None] if DIM == WIDTH else live[:, None] & (dims < DIM)[None, :]
        keys = tl.load(k_cache + place, mask=mask, other=0.0)
        values = tl.load(v_cache + place, mask=mask, other=0.0)
        visible = index[None, :] < limit[:, None]
        top, norm, acc = _see(query, keys, values, visible, top, norm, acc, scale)
    return top, norm, acc


@triton.jit
def _see_block(
    query,
    block_k,
    block_v,
    rows,
    scale,
    stride_k,
    stride_v,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Running softmax over the fresh keys of a diffusion block of `rows` rows, which see each other."""
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    norm = tl.zeros((QUERIES,), tl.float32)
    acc = tl.zeros((QUERIES, WIDTH), tl.float32)
    dims = tl.arange(0, WIDTH)
    for at in range(0, rows, KEYS):
        index = at + tl.arange(0, KEYS)
        mask = (index < rows)[:, None] & (dims < DIM)[None, :]
        keys = tl.load(block_k + index[:, None] * stride_k + dims[None, :], mask=mask, other=0.0)
        values = tl.load(block_v + index[:, None] * stride_v + dims[None, :], mask=mask, other=0.0)
        top, norm, acc = _see(query, keys, values, (index < rows)[None, :], top, norm, acc, scale)
    return top, norm, acc


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


@triton.jit(do_not_specialize=["rows", "segments", "parts", "table_width"])
def _attention_kernel(
    q,
    k_cache,
    v_cache,
    block_k,
    block_v,
    table,
    limits,
    out,
    partials,
    tops,
    norms,
    rows,
    kv_heads,
    segments,
    parts,
    table_width,
    scale,
    stride_q_row,
    stride_q_head,
    stride_kv_head,
    stride_page,
    stride_slot,
    stride_k_row,
    stride_k_head,
    stride_v_row,
    stride_v_head,
    stride_out_row,
    PER_KV: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DIFFUSION: tl.constexpr,
    SPLIT: tl.constexpr,
):
    group = tl.program_id(1) // kv_heads
    kv_head = tl.program_id(1) % kv_heads
    # A KV head's queries: all its query heads of a row, then the next row's.
    query_index = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    row = query_index // PER_KV
    head = kv_head * PER_KV + query_index % PER_KV
    inside = row < rows
    pass_row = (group * rows + row).to(tl.int64)
    dims = tl.arange(0, WIDTH)
    mask = inside[:, None] & (dims < DIM)[None, :]
    limit = tl.load(limits + pass_row, mask=inside, other=0).to(tl.int32)
    last = tl.max(limit)
    k_cache += kv_head.to(tl.int64) * stride_kv_head
    v_cache += kv_head.to(tl.int64) * stride_kv_head
    table += group.to(tl.int64) * table_width
    if DIFFUSION:
        first_row = group.to(tl.int64) * rows
        block_k += first_row * stride_k_row + kv_head * stride_k_head
        block_v += first_row * stride_v_row + kv_head * stride_v_head
    query_place = q + (pass_row * stride_q_row + head * stride_q_head)[:, None] + dims[None, :]
    if SPLIT:
        part = tl.program_id(2)
        own = part == segments
        begin = _segment_start(part)
        if own | (begin < last):
            query = tl.load(query_place, mask=mask, other=0.0)
            if DIFFUSION:
                if own:
                    top, norm, acc = _see_block(
                        query,
                        block_k,
                        block_v,
                        rows,
                        scale,
                        stride_k_row,
                        stride_v_row,
                        DIM,
                        WIDTH,
                        QUERIES,
                        KEYS,
                    )
                else:
                    end = min(_segment_start(part + 1), last)
                    top, norm, acc = _see_segment(
                        query, k_cache, v_cache, table, begin, end, limit, scale, stride_page, stride_slot,
                        PAGE, DIM, WIDTH, QUERIES, KEYS,
                    )  # fmt: skip
            else:
                end = min(_segment_start(part + 1), last)
                top, norm, acc = _see_segment(
                    query, k_cache, v_cache, table, begin, end, limit, scale, stride_page, stride_slot,
                    PAGE, DIM, WIDTH, QUERIES, KEYS,
                )  # fmt: skip
            place = (tl.program_id(1).to(tl.int64) * parts + part) * rows * PER_KV + query_index
            tl.store(tops + place, top, mask=inside)
            tl.store(norms + place, norm, mask=inside)
            tl.store(partials + place[:, None] * DIM + dims[None, :], acc, mask=mask)
    else:
        query = tl.load(query_place, mask=mask, other=0.0)
        top = tl.full((QUERIES,), float("-inf"), tl.float32)
        norm = tl.zeros((QUERIES,), tl.float32)
        acc = tl.zeros((QUERIES, WIDTH), tl.float32)
        for part in range(segments):
            begin = _segment_start(part)
            if begin < last:
                end = min(_segment_start(part + 1), last)
                part_top, part_norm, part_acc = _see_segment(
                    query, k_cache, v_cache, table, begin, end, limit, scale, stride_page, stride_slot,
                    PAGE, DIM, WIDTH, QUERIES, KEYS,
                )  # fmt: skip
                top, norm, acc = _merge(begin < limit, top, norm, acc, part_top, part_norm, part_acc)
        if DIFFUSION:
            part_top, part_norm, part_acc = _see_block(
                query, block_k, block_v, rows, scale, stride_k_row, stride_v_row, DIM, WIDTH, QUERIES, KEYS
            )
            top, norm, acc = _merge(inside, top, norm, acc, part_top, part_norm, part_acc)
        result = (acc / tl.where(inside, norm, 1.0)[:, None]).to(out.dtype.element_ty)
        tl.store(out + (pass_row * stride_out_row + head * DIM)[:, None] + dims[None, :], result, mask=mask)


@triton.jit(do_not_specialize=["rows", "segments", "parts"])
def _merge_kernel(
    limits,
    out,
    partials,
    tops,
    norms,
    rows,
    kv_heads,
    segments,
    parts,
    stride_out_row,
    PER_KV: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    DIFFUSION: tl.constexpr,
):
    """Merge one query's segments in order; its block, if it has one, is the last part."""
    AHEAD: tl.constexpr = 4  # Reads in flight; merging stays in order.
    query = tl.program_id(0)
    group = tl.program_id(1) // kv_heads
    kv_head = tl.program_id(1) % kv_heads
    pass_row = (group * rows + query // PER_KV).to(tl.int64)
    limit = tl.load(limits + pass_row).to(tl.int32)
    first = tl.program_id(1).to(tl.int64) * parts * rows * PER_KV + query
    dims = tl.arange(0, WIDTH)
    inside = dims < DIM
    top = tl.full((WIDTH,), float("-inf"), tl.float32)
    norm = tl.zeros((WIDTH,), tl.float32)
    acc = tl.zeros((WIDTH,), tl.float32)
    for at in range(0, segments, AHEAD):
        if _segment_start(at) < limit:
            seen0 = _segment_start(at) < limit
            seen1 = (_segment_start(at + 1) < limit) & (at + 1 < segments)
            seen2 = (_segment_start(at + 2) < limit) & (at + 2 < segments)
            seen3 = (_segment_start(at + 3) < limit) & (at + 3 < segments)
            place = first + at * rows * PER_KV
            step = rows * PER_KV
            top0, norm0, acc0 = _load_part(partials, tops, norms, place, seen0, dims, DIM)
            top1, norm1, acc1 = _load_part(partials, tops, norms, place + step, seen1, dims, DIM)
            top2, norm2, acc2 = _load_part(partials, tops, norms, place + 2 * step, seen2, dims, DIM)
            top3, norm3, acc3 = _load_part(partials, tops, norms, place + 3 * step, seen3, dims, DIM)
            top, norm, acc = _merge(seen0, top, norm, acc, top0, norm0, acc0)
            top, norm, acc = _merge(seen1, top, norm, acc, top1, norm1, acc1)
            top, norm, acc = _merge(seen2, top, norm, acc, top2, norm2, acc2)
            top, norm, acc = _merge(seen3, top, norm, acc, top3, norm3, acc3)
    if DIFFUSION:
        place = first + segments * rows * PER_KV
        own_top, own_norm, own_acc = _load_part(partials, tops, norms, place, inside, dims, DIM)
        top, norm, acc = _merge(inside, top, norm, acc, own_top, own_norm, own_acc)
    head = kv_head * PER_KV + query % PER_KV
    place = out + pass_row * stride_out_row + head * DIM + dims
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
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: "AttentionBatch",
    scale: float,
    block_k: Tensor | None = None,
    block_v: Tensor | None = None,
    *,
    split: bool | None = None,
    queries: int | None = None,
) -> Tensor:
    """`kernels.paged_attention` for float16, bfloat16 and float32 (the cache in q's dtype; every last dimension contiguous).

    split, queries: for tests and measurements: whether segments get programs of their own, and queries per program.
    """
    groups, rows, heads, dim = q.shape
    kv_heads = k_cache.shape[0]
    diffusion = block_k is not None and block_v is not None
    segments = num_segments(batch.page_table.shape[1] * batch.page_size)
    parts = segments + diffusion
    full = q.dtype == torch.float32
    queries = queries or (16 if full else 64)
    tiles = triton.cdiv(rows * batch.heads_per_kv, queries)
    if split is None:
        split = parts > 1 and tiles * groups * kv_heads < _FULL_GRID
    out = torch.empty(groups, rows, heads, dim, device=q.device, dtype=q.dtype)
    partials = tops = norms = out
    if split:
        shape = (groups, kv_heads, parts, rows * batch.heads_per_kv)
        partials = torch.empty(*shape, dim, device=q.device, dtype=torch.float32)
        tops = torch.empty(shape, device=q.device, dtype=torch.float32)
        norms = torch.empty(shape, device=q.device, dtype=torch.float32)
    own_k, own_v = (q, q) if block_k is None or block_v is None else (block_k, block_v)
    width = max(16, triton.next_power_of_2(dim))
    _attention_kernel[(tiles, groups * kv_heads, parts if split else 1)](
        q,
        k_cache,
        v_cache,
        own_k,
        own_v,
        batch.page_table,
        batch.limits,
        out,
        partials,
        tops,
        norms,
        rows,
        kv_heads,
        segments,
        parts,
        batch.page_table.shape[1],
        scale * _LOG2_E,
        q.stride(1),
        q.stride(2),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        own_k.stride(1),
        own_k.stride(2),
        own_v.stride(1),
        own_v.stride(2),
        heads * dim,
        PER_KV=batch.heads_per_kv,
        PAGE=batch.page_size,
        DIM=dim,
        WIDTH=width,
        QUERIES=queries,
        KEYS=32 if full else 64,
        DIFFUSION=diffusion,
        SPLIT=split,
        num_warps=8 if queries == 128 else 4,
        num_stages=3,
    )
    if split:
        _merge_kernel[(rows * batch.heads_per_kv, groups * kv_heads)](
            batch.limits,
            out,
            partials,
            tops,
            norms,
            rows,
            kv_heads,
            segments,
            parts,
            heads * dim,
            PER_KV=batch.heads_per_kv,
            DIM=dim,
            WIDTH=width,
            DIFFUSION=diffusion,
            num_warps=1,
        )
    return out
