"""Attention of one pass over the paged KV cache, for rows of both views."""

from torch import Tensor

from orthrus.kernels.attention import reference
from orthrus.kernels.attention.types import AttentionGroup, AttentionPlan, AttentionWork
from orthrus.kernels.device import runs_triton
from orthrus.kernels.rounding import Rounding, rounded

__all__ = ["AttentionGroup", "AttentionPlan", "AttentionWork", "paged_attention"]


def paged_attention(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: AttentionPlan,
    scale: float,
    rounding: Rounding | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v for every row of the pass: [rows, heads * dim] in q's dtype or as `rounding` says.

    Sums are float32 or wider.

    qkv [rows, heads + 2 * kv_heads, dim] from `qk_norm_rope`: queries, keys, values. A diffusion row reads the keys and values of
    its own block from it. All other keys and values are read from the cache.
    k_cache, v_cache [kv_heads, pages, page_size, dim]. They must be finite: values of masked keys may be multiplied by a weight
    of 0, and 0 times infinity is NaN.
    rounding: that of the layer that takes the result. A kernel may leave the result as it is.
    The results of rows that belong to no group are undefined.
    Raises ValueError on a GPU if page_size is not a multiple of the kernels' key tile: 64, or 32 in float32.
    """
    if runs_triton(qkv):
        from orthrus.kernels.attention import gpu

        return gpu.paged_attention(qkv, k_cache, v_cache, plan, scale, rounding)
    return rounded(reference.paged_attention(qkv, k_cache, v_cache, plan, scale), rounding)
