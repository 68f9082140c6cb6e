"""QK norm, rotary embedding and cache write on a GPU in one kernel: half a warp per row and head."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from orthrus.kernels.device import chaining
from orthrus.kernels.rows.types import KVWrites

_HEADS = 32
"""Heads of a program. Few large programs leave most SMs free for the next kernel."""


@triton.jit
def _finite(value, dtype: tl.constexpr):
    value = value.to(dtype)
    return tl.where(tl.abs(value.to(tl.float32)) < float("inf"), value, 0.0).to(dtype)


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
    """WIDTH: half of a head's dimensions, padded to a power of two. A thread has the same places in both halves."""
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
    HALF: tl.constexpr = DIM // 2
    dims = tl.arange(0, WIDTH)[None, :]
    inside = (unit < count)[:, None] & (dims < HALF)
    turned = inside & (head < normed)[:, None]
    if weight is not None:
        norm = head
        if TWO_VIEWS:
            norm += tl.where(row < tl.load(num_ar), 0, normed)
        weight += (norm * DIM)[:, None] + dims
        low_weight = tl.load(weight, mask=turned, other=0.0)
        high_weight = tl.load(weight + HALF, mask=turned, other=0.0)
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    # The other halves of both repeat these, except for a sign: see `apply_rope`.
    angle = (row * DIM + HALF)[:, None] + dims
    cosine = tl.load(cos + angle, mask=turned, other=0.0).to(tl.float32)
    sine = tl.load(sin + angle, mask=turned, other=0.0).to(tl.float32)
    source = qkv + (unit.to(tl.int64) * DIM)[:, None] + dims
    raw_low = tl.load(source, mask=inside, other=0.0)
    raw_high = tl.load(source + HALF, mask=inside, other=0.0)
    dtype: tl.constexpr = qkv.dtype.element_ty
    low, high = raw_low, raw_high
    if weight is not None:
        low, high = low.to(tl.float32), high.to(tl.float32)
        scale = tl.rsqrt(tl.sum(low * low + high * high, 1) / DIM + eps)[:, None]
        low, high = (low * scale).to(dtype) * low_weight, (high * scale).to(dtype) * high_weight
    low, high = low.to(tl.float32), high.to(tl.float32)
    rotates = (head < normed)[:, None]
    new_low = _finite(tl.where(rotates, low * cosine - high * sine, raw_low.to(tl.float32)), dtype)
    new_high = _finite(tl.where(rotates, high * cosine + low * sine, raw_high.to(tl.float32)), dtype)
    tl.store(source, new_low, mask=inside)
    tl.store(source + HALF, new_high, mask=inside)
    is_key = (writes & (head >= heads) & (head < normed))[:, None] & inside
    is_value = (writes & (head >= normed))[:, None] & inside
    keys = k_cache + ((head - heads).to(tl.int64) * num_slots * DIM)[:, None] + dims
    values = v_cache + ((head - normed).to(tl.int64) * num_slots * DIM)[:, None] + dims
    place = (slot.to(tl.int64) * DIM)[:, None]
    tl.store(keys + place, new_low, mask=is_key)
    tl.store(keys + place + HALF, new_high, mask=is_key)
    tl.store(values + place, new_low, mask=is_value)
    tl.store(values + place + HALF, new_high, mask=is_value)
    for index in range(first_more, end_more):
        more_place = tl.load(more_slots + index).to(tl.int64) * DIM
        again = ((more_begin <= index) & (index < more_end))[:, None]
        tl.store(keys + more_place, new_low, mask=is_key & again)
        tl.store(keys + more_place + HALF, new_high, mask=is_key & again)
        tl.store(values + more_place, new_low, mask=is_value & again)
        tl.store(values + more_place + HALF, new_high, mask=is_value & again)


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
        WIDTH=triton.next_power_of_2(dim // 2),
        HEADS=_HEADS,
        TWO_VIEWS=weight is not None and weight.shape[0] > 1,
        num_warps=_HEADS // 2,
        **chaining(),
    )
