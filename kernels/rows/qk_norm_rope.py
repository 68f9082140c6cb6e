"""What comes between a projection and attention: queries and keys are normed and rotated, and AR keys and values are cached."""

from torch import Tensor

from orthrus.kernels.device import runs_triton
from orthrus.kernels.rows.rms_norm import rms_norm
from orthrus.kernels.rows.rope import apply_rope


def qk_norm_rope(
    qkv: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    num_ar: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> None:
    """RMS-norm and rotate the queries and keys of qkv [rows, heads + 2 * kv_heads, dim] in place; write to the cache.

    weight [views, heads + kv_heads, dim]: the norm weight of each head, for the first num_ar (int32 [1]) rows and for the
    others. None: rotate only.
    cos, sin [rows, 1, dim]: as `apply_rope` takes them.
    slots [rows]: where the keys and values of the first num_ar rows go in k_cache and v_cache [kv_heads, places, dim].

    Numbers that are not finite are replaced by zeros. Attention multiplies values that a row does not see by zero, and zero times
    infinity would carry what one sequence broke into another.
    """
    if runs_triton(qkv):
        from orthrus.kernels.rows import qk_norm_rope_triton

        qk_norm_rope_triton.qk_norm_rope(qkv, weight, cos, sin, eps, num_ar, slots, k_cache, v_cache)
        return
    kv_heads = k_cache.shape[0]
    rotated, split = qkv.shape[1] - kv_heads, int(num_ar)
    for view, rows in enumerate((slice(0, split), slice(split, qkv.shape[0]))):
        if rows.start < rows.stop:
            heads = qkv[rows, :rotated]
            twice = heads.unsqueeze(2).expand(-1, -1, 2, -1)
            if weight is None:
                twice = twice.contiguous()
            else:
                twice = rms_norm(twice, weight[view].unsqueeze(1), eps)
            apply_rope(twice, cos[rows], sin[rows], out=heads)
    qkv.nan_to_num_(0.0, 0.0, 0.0)
    if split:
        places = slots[:split].long()
        k_cache.index_copy_(1, places, qkv[:split, rotated - kv_heads : rotated].transpose(0, 1))
        v_cache.index_copy_(1, places, qkv[:split, rotated:].transpose(0, 1))
