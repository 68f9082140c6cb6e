"""Attention of one pass over the paged KV cache, for rows of both views."""

from torch import Tensor

from orthrus.kernels.attention import reference
from orthrus.kernels.attention.types import AttentionGroup, AttentionPlan, AttentionWork
from orthrus.kernels.device import runs_triton

__all__ = ["AttentionGroup", "AttentionPlan", "AttentionWork", "paged_attention"]


def paged_attention(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, scale: float
) -> Tensor:
    """softmax(q k^T * scale) v for every row of the pass: [rows, heads * dim] in q's dtype; sums are float32 or wider.

    qkv [rows, heads + 2 * kv_heads, dim] from `qk_norm_rope`: queries, keys, values. A diffusion row sees the keys and values of
    its own block here. Every other key that a row sees is in the cache.
    k_cache, v_cache [kv_heads, pages, page_size, dim]. They must be finite: a key that a row does not see may still take part,
    and its value is then multiplied by 0.
    The results of rows of no group are undefined.
    """
    if runs_triton(qkv):
        from orthrus.kernels.attention import gpu

        return gpu.paged_attention(qkv, k_cache, v_cache, plan, scale)
    return reference.paged_attention(qkv, k_cache, v_cache, plan, scale)
