"""QK norm, rotary embedding and cache write on a GPU in one kernel: one program per row and head."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.device import chaining


@triton.jit
def _qk_norm_rope_kernel(
    qkv,
    weight,
    cos,
    sin,
    num_ar,
    slots,
    k_cache,
    v_cache,
    heads,
    kv_heads,
    places,
    eps,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    CHAINED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    normed = heads + kv_heads
    writes = row < tl.load(num_ar)
    slot = tl.load(slots + row).to(tl.int64)
    dims = tl.arange(0, WIDTH)
    inside = dims < DIM
    # The other half of the head, for the rotation: read again rather than moved between threads.
    other = tl.where(dims < DIM // 2, dims + DIM // 2, dims - DIM // 2)
    weight += (head + tl.where(writes, 0, normed)) * DIM
    scaled = dims < tl.where(head < normed, DIM, 0)
    dim_weight = tl.load(weight + dims, mask=scaled, other=0.0)
    other_weight = tl.load(weight + other, mask=scaled, other=0.0)
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    source = qkv + (row * (normed + kv_heads) + head) * DIM
    if head < normed:
        value = tl.load(source + dims, mask=inside, other=0.0).to(tl.float32)
        swapped = tl.load(source + other, mask=inside, other=0.0).to(tl.float32)
        cosine = tl.load(cos + row * DIM + dims, mask=inside, other=0.0).to(tl.float32)
        sine = tl.load(sin + row * DIM + dims, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value) / DIM + eps)
        dtype = qkv.dtype.element_ty
        value = (value * scale).to(dtype) * dim_weight
        swapped = (swapped * scale).to(dtype) * other_weight
        result = (value.to(tl.float32) * cosine + swapped.to(tl.float32) * sine).to(dtype)
        result = tl.where(tl.abs(result.to(tl.float32)) < float("inf"), result, 0.0).to(dtype)
        tl.store(source + dims, result, mask=inside)
        if writes and head >= heads:
            place = k_cache + ((head - heads).to(tl.int64) * places + slot) * DIM
            tl.store(place + dims, result, mask=inside)
    else:
        value = tl.load(source + dims, mask=inside, other=0.0)
        value = tl.where(tl.abs(value.to(tl.float32)) < float("inf"), value, 0.0)
        tl.store(source + dims, value, mask=inside)
        if writes:
            place = v_cache + ((head - normed).to(tl.int64) * places + slot) * DIM
            tl.store(place + dims, value, mask=inside)


def qk_norm_rope(
    qkv: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    num_ar: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> None:
    """`kernels.qk_norm_rope` of contiguous tensors, up to float32."""
    rows, all_heads, dim = qkv.shape
    normed = weight.shape[1]
    kv_heads = all_heads - normed
    _qk_norm_rope_kernel[(rows, all_heads)](
        qkv,
        weight,
        cos,
        sin,
        num_ar,
        slots,
        k_cache,
        v_cache,
        normed - kv_heads,
        kv_heads,
        k_cache.shape[1],
        eps,
        DIM=dim,
        WIDTH=triton.next_power_of_2(dim),
        num_warps=1,
        **chaining(),
    )
