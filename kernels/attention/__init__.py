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

    qkv [rows, heads + 2 * kv_heads, dim] from `qk_norm_rope`: queries, keys, values. Only a diffusion block's rows see these keys
    and values, each of them those of its whole block; all other keys are in the cache.
    k_cache, v_cache [kv_heads, pages, page_size, dim]. They are finite, since a key that a row does not see may still take part,
    as 0 x its value.
    Rows of no group get anything.
    """
    if runs_triton(qkv):
        from orthrus.kernels.attention import gpu

        return gpu.paged_attention(qkv, k_cache, v_cache, plan, scale)
    return reference.paged_attention(qkv, k_cache, v_cache, plan, scale)
