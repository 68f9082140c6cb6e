"""QK norm, rotary embedding and cache write on a GPU in one kernel: one program per row and head."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _qk_norm_rope_kernel(
    qkv,
    weight,
    cos,
    sin,
    slots,
    k_cache,
    v_cache,
    out,
    heads,
    kv_heads,
    stride_kv_head,
    eps,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    WRITE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, WIDTH)
    inside = dims < DIM
    source = qkv + (row * (heads + 2 * kv_heads) + head) * DIM
    if head < heads + kv_heads:
        # The other half of the head, for the rotation: read again rather than moved between threads.
        other = tl.where(dims < DIM // 2, dims + DIM // 2, dims - DIM // 2)
        value = tl.load(source + dims, mask=inside, other=0.0).to(tl.float32)
        swapped = tl.load(source + other, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value) / DIM + eps)
        dtype = out.dtype.element_ty
        value = (value * scale).to(dtype) * tl.load(weight + head * DIM + dims, mask=inside, other=0.0)
        swapped = (swapped * scale).to(dtype) * tl.load(weight + head * DIM + other, mask=inside, other=0.0)
        cosine = tl.load(cos + row * DIM + dims, mask=inside, other=0.0).to(tl.float32)
        sine = tl.load(sin + row * DIM + dims, mask=inside, other=0.0).to(tl.float32)
        result = (value.to(tl.float32) * cosine + swapped.to(tl.float32) * sine).to(dtype)
        tl.store(out + (row * (heads + kv_heads) + head) * DIM + dims, result, mask=inside)
        if WRITE and head >= heads:
            slot = tl.load(slots + row)
            place = k_cache + (head - heads).to(tl.int64) * stride_kv_head + slot * DIM
            tl.store(place + dims, result, mask=inside)
    elif WRITE:
        slot = tl.load(slots + row)
        place = v_cache + (head - heads - kv_heads).to(tl.int64) * stride_kv_head + slot * DIM
        tl.store(place + dims, tl.load(source + dims, mask=inside, other=0.0), mask=inside)


def qk_norm_rope(
    qkv: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    slots: Tensor | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
) -> Tensor:
    """`kernels.qk_norm_rope` of contiguous tensors (of the caches, all but the first dimension), up to float32."""
    rows, all_heads, dim = qkv.shape
    normed = weight.shape[0]
    kv_heads = all_heads - normed
    out = torch.empty(rows, normed, dim, device=qkv.device, dtype=qkv.dtype)
    write = slots is not None and k_cache is not None and v_cache is not None
    _qk_norm_rope_kernel[(rows, all_heads if write else normed)](
        qkv,
        weight,
        cos,
        sin,
        slots if write else out,
        k_cache if write else out,
        v_cache if write else out,
        out,
        normed - kv_heads,
        kv_heads,
        k_cache.stride(0) if k_cache is not None else 0,
        eps,
        DIM=dim,
        WIDTH=triton.next_power_of_2(dim),
        WRITE=write,
        num_warps=1,
    )
    return out
