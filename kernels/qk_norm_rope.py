"""What attention needs from a projection: normed and rotated queries and keys, and the AR view's keys and values in the cache."""

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
    slots: Tensor | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
) -> Tensor:
    """RMS-normed, rotated queries and keys [rows, heads + kv_heads, dim] from qkv [rows, heads + 2 * kv_heads, dim].

    weight [heads + kv_heads, dim]: the norm weight of each head; cos, sin as `apply_rope` takes them. With slots (int64
    [rows]), keys and values also go to these places of k_cache and v_cache [kv_heads, places, dim].
    """
    if runs_triton(qkv):
        from kernels import qk_norm_rope_triton

        return qk_norm_rope_triton.qk_norm_rope(qkv, weight, cos, sin, eps, slots, k_cache, v_cache)
    normed = weight.shape[0]
    qk = apply_rope(rms_norm(qkv[:, :normed], weight, eps), cos, sin)
    if slots is not None and k_cache is not None and v_cache is not None:
        heads = 2 * normed - qkv.shape[1]
        k_cache.index_copy_(1, slots, qk[:, heads:].transpose(0, 1))
        v_cache.index_copy_(1, slots, qkv[:, normed:].transpose(0, 1))
    return qk
