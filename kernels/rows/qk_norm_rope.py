"""QK norm, rotary embedding and KV cache write: what comes between the qkv projection and attention."""

import torch
from torch import Tensor

from orthrus.kernels.device import runs_triton
from orthrus.kernels.rows.rms_norm import rms_norm
from orthrus.kernels.rows.rope import apply_rope
from orthrus.kernels.rows.types import KVWrites


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
    """RMS-norm and rotate the queries and keys of qkv [rows, heads + 2 * kv_heads, dim] in place; write AR rows to the cache.

    weight [views, heads + kv_heads, dim]: the norm weights of each head. With two views, the first num_ar (int32 [1]) rows use
    the first, and the others the second. With one view all rows use it: rows behind the AR rows are padding then. None: no norm.
    cos, sin [rows, 1, dim]: as `apply_rope` takes them.
    writes: the slots of k_cache and v_cache [kv_heads, slots, dim] to which the keys and values of the first num_ar rows are
    written. No slot is written twice.

    Numbers in qkv that are not finite are replaced by zeros. Attention multiplies masked values by zero, and zero times infinity
    is NaN: infinities of one sequence would spoil the results of others.
    """
    if runs_triton(qkv):
        from orthrus.kernels.rows import qk_norm_rope_triton

        qk_norm_rope_triton.qk_norm_rope(qkv, weight, cos, sin, eps, num_ar, writes, k_cache, v_cache)
        return
    kv_heads = k_cache.shape[0]
    rotated, split = qkv.shape[1] - kv_heads, int(num_ar)
    for view, span in enumerate((slice(0, split), slice(split, qkv.shape[0]))):
        if span.start < span.stop:
            heads = qkv[span, :rotated]
            twice = heads.unsqueeze(2).expand(-1, -1, 2, -1)
            if weight is None:
                twice = twice.contiguous()
            else:
                twice = rms_norm(twice, weight[min(view, len(weight) - 1)].unsqueeze(1), eps)
            apply_rope(twice, cos[span], sin[span], out=heads)
    qkv.nan_to_num_(0.0, 0.0, 0.0)
    if split:
        slots, rows = _written_rows(writes, split)
        written = qkv[rows, rotated - kv_heads :]
        k_cache.index_copy_(1, slots, written[:, :kv_heads].transpose(0, 1))
        v_cache.index_copy_(1, slots, written[:, kv_heads:].transpose(0, 1))


def _written_rows(writes: KVWrites, num_ar: int) -> tuple[Tensor, Tensor]:
    """All slots that the first `num_ar` rows write to, and the row of each: int64 [writes]."""
    ends = writes.more_ends[:num_ar].long()
    rows = torch.arange(num_ar, device=ends.device)
    more = int(ends[-1])
    if not more:
        return writes.slots[:num_ar].long(), rows
    again = rows.repeat_interleave(ends.diff(prepend=ends.new_zeros(1)))
    return torch.cat([writes.slots[:num_ar].long(), writes.more_slots[:more].long()]), torch.cat(
        [rows, again]
    )
