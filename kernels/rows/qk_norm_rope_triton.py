"""QK norm, rotary embedding and cache write on a GPU in one kernel: a warp per row and head."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from orthrus.kernels.device import chaining
from orthrus.kernels.rows.types import KVWrites

_HEADS = 32
"""Heads of a program. Each has a warp. Few large programs leave most SMs free for the next kernel."""


@triton.jit
def _qk_norm_rope_kernel(
    qkv,
    weight,
    cos,
    sin,
    num_ar,
    slots,
    more_ends,
    more_slots,
    k_cache,
    v_cache,
    count,
    heads,
    kv_heads,
    num_slots,
    eps,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    TWO_VIEWS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    unit = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    normed = heads + kv_heads
    row, head = unit // (normed + kv_heads), unit % (normed + kv_heads)
    writes = (unit < count) & (row < tl.load(num_ar))
    slot = tl.load(slots + row, mask=writes, other=0)
    # Each unit's part of `more_slots`, and that of all rows of this program.
    more_begin = tl.load(more_ends + row - 1, mask=writes & (row > 0), other=0)
    more_end = tl.load(more_ends + row, mask=writes, other=0)
    first_row = tl.program_id(0) * HEADS // (normed + kv_heads)
    last_row = tl.minimum((tl.program_id(0) * HEADS + HEADS - 1) // (normed + kv_heads), tl.load(num_ar) - 1)
    first_more = tl.load(more_ends + first_row - 1, mask=first_row > 0, other=0)
    end_more = tl.load(more_ends + last_row, mask=last_row >= first_row, other=0)
    dims = tl.arange(0, WIDTH)[None, :]
    inside = (unit < count)[:, None] & (dims < DIM)
    # The other half of the head, for the rotation. It is loaded again rather than exchanged between threads.
    other = tl.where(dims < DIM // 2, dims + DIM // 2, dims - DIM // 2)
    turned = inside & (head < normed)[:, None]
    if weight is not None:
        norm = head
        if TWO_VIEWS:
            norm += tl.where(row < tl.load(num_ar), 0, normed)
        weight += (norm * DIM)[:, None]
        own_weight = tl.load(weight + dims, mask=turned, other=0.0)
        other_weight = tl.load(weight + other, mask=turned, other=0.0)
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    angle = (row * DIM)[:, None] + dims
    cosine = tl.load(cos + angle, mask=turned, other=0.0).to(tl.float32)
    sine = tl.load(sin + angle, mask=turned, other=0.0).to(tl.float32)
    source = qkv + (unit.to(tl.int64) * DIM)[:, None]
    raw = tl.load(source + dims, mask=inside, other=0.0)
    value = tl.where(turned, raw.to(tl.float32), 0.0)
    swapped = tl.load(source + other, mask=turned, other=0.0).to(tl.float32)
    dtype = qkv.dtype.element_ty
    if weight is not None:
        scale = tl.rsqrt(tl.sum(value * value, 1) / DIM + eps)[:, None]
        value = (value * scale).to(dtype) * own_weight
        swapped = (swapped * scale).to(dtype) * other_weight
    result = (value.to(tl.float32) * cosine + swapped.to(tl.float32) * sine).to(dtype)
    result = tl.where((head < normed)[:, None], result, raw)
    result = tl.where(tl.abs(result.to(tl.float32)) < float("inf"), result, 0.0).to(dtype)
    tl.store(source + dims, result, mask=inside)
    is_key, is_value = writes & (head >= heads) & (head < normed), writes & (head >= normed)
    first_key, first_value = (head - heads).to(tl.int64) * num_slots, (head - normed).to(tl.int64) * num_slots
    tl.store(k_cache + ((first_key + slot) * DIM)[:, None] + dims, result, mask=is_key[:, None] & inside)
    tl.store(v_cache + ((first_value + slot) * DIM)[:, None] + dims, result, mask=is_value[:, None] & inside)
    for index in range(first_more, end_more):
        more_slot = tl.load(more_slots + index)
        again = (more_begin <= index) & (index < more_end)
        own_key = (is_key & again)[:, None] & inside
        tl.store(k_cache + ((first_key + more_slot) * DIM)[:, None] + dims, result, mask=own_key)
        own_value = (is_value & again)[:, None] & inside
        tl.store(v_cache + ((first_value + more_slot) * DIM)[:, None] + dims, result, mask=own_value)


def qk_norm_rope(
    qkv: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    num_ar: Tensor,
    writes: KVWrites,
    k_cache: Tensor,
    v_cache: Tensor,
) -> None:
    """`qk_norm_rope` (kernels/rows/qk_norm_rope) of contiguous tensors, up to float32."""
    rows, all_heads, dim = qkv.shape
    kv_heads = k_cache.shape[0]
    _qk_norm_rope_kernel[(triton.cdiv(rows * all_heads, _HEADS),)](
        qkv,
        weight,
        cos,
        sin,
        num_ar,
        writes.slots,
        writes.more_ends,
        writes.more_slots,
        k_cache,
        v_cache,
        rows * all_heads,
        all_heads - 2 * kv_heads,
        kv_heads,
        k_cache.shape[1],
        eps,
        DIM=dim,
        WIDTH=triton.next_power_of_2(dim),
        HEADS=_HEADS,
        TWO_VIEWS=weight is not None and weight.shape[0] > 1,
        num_warps=_HEADS,
        **chaining(),
    )
