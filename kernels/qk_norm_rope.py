"""What attention needs from a projection: normed and rotated queries and keys, and the AR view's keys and values in the cache."""

import torch
from torch import Tensor

from kernels.device import runs_triton
from kernels.rms_norm import rms_norm
from kernels.rope import apply_rope


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
) -> Tensor:
    """RMS-normed, rotated queries and keys [rows, heads + kv_heads, dim] from qkv [rows, heads + 2 * kv_heads, dim].

    weight [views, heads + kv_heads, dim]: the norm weight of each head, for the first num_ar (int32 [1]) rows and for the
    others; cos, sin [rows, 1, dim] as `apply_rope` takes them. Keys and values of the first num_ar rows also go to their slots
    [rows] of k_cache and v_cache [kv_heads, places, dim].
    """
    if runs_triton(qkv):
        from kernels import qk_norm_rope_triton

        return qk_norm_rope_triton.qk_norm_rope(qkv, weight, cos, sin, eps, num_ar, slots, k_cache, v_cache)
    normed, split = weight.shape[1], int(num_ar)
    parts = []
    for view, rows in enumerate((slice(0, split), slice(split, qkv.shape[0]))):
        if rows.start < rows.stop:
            heads = rms_norm(qkv[rows, :normed], weight[view], eps)
            parts.append(apply_rope(heads, cos[rows], sin[rows]))
    qk = torch.cat(parts) if len(parts) > 1 else parts[0]
    if split:
        first_key = 2 * normed - qkv.shape[1]
        places = slots[:split].long()
        k_cache.index_copy_(1, places, qk[:split, first_key:].transpose(0, 1))
        v_cache.index_copy_(1, places, qkv[:split, normed:].transpose(0, 1))
    return qk
