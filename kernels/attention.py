"""Attention of one pass over the paged KV cache, for rows of both views.

A row sees the cache keys below its limit (an AR row at position p: p + 1; a row of a diffusion block anchored at n: n) and,
in a diffusion block, every row of its own block. Keys are summed in splits of fixed length aligned to position 0,
and the splits in order, so that a row's result does not depend on how long the batch's longest context is.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.device import runs_triton

KV_SPLIT = 128
"""Keys per split: the unit of the reduction over keys."""

_QUERY_TILE = 8


@dataclass(frozen=True)
class AttentionBatch:
    """Groups of equally many rows, each group with its own page table.

    first_row: where in the pass the groups' rows begin; they follow one another. page_table [groups, pages] int64, padded
    with page 0 to a whole number of splits. limits [groups, rows per group] int64: cache keys that a row sees.
    diffusion: whether a group's rows also see each other's fresh keys, which are not in the cache. first_page: the page
    from which a single group's pages follow one another, so that they can be read where they lie; else None.
    """

    first_row: int
    page_table: Tensor
    limits: Tensor
    page_size: int
    heads_per_kv: int
    diffusion: bool
    first_page: int | None = None

    @property
    def rows(self) -> slice:
        """The groups' rows in the pass."""
        return slice(self.first_row, self.first_row + self.limits.numel())

    @property
    def splits(self) -> int:
        return self.page_table.shape[1] * self.page_size // KV_SPLIT

    @cached_property
    def hidden(self) -> Tensor:
        """Keys that a query must not see, made once for all layers: bool [1, groups, splits, queries (tiled), KV_SPLIT]."""
        limits = _tile(self.limits.repeat_interleave(self.heads_per_kv, 1).unsqueeze(-1))
        keys = torch.arange(self.splits * KV_SPLIT, device=limits.device).view(self.splits, 1, KV_SPLIT)
        return (keys >= limits.unsqueeze(1)).unsqueeze(0)


def _tile(x: Tensor) -> Tensor:
    """Pad the queries of x [..., queries, width] to `_QUERY_TILE`: a product with few rows would take other code."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % _QUERY_TILE))


def _in_splits(cache: Tensor, batch: AttentionBatch) -> Tensor:
    """The groups' cached keys or values [kv_heads, groups, splits, KV_SPLIT, dim]."""
    count, first = batch.page_table.shape[1], batch.first_page
    if first is not None and first + count <= cache.shape[1]:
        # The table's padding is then whatever pages come next: hidden keys like any other.
        pages = cache.narrow(1, first, count)
    else:
        pages = cache.index_select(1, batch.page_table.reshape(-1))
    return pages.view(cache.shape[0], -1, batch.splits, KV_SPLIT, cache.shape[-1])


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    block_k: Tensor | None = None,
    block_v: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v for every row of `batch`.

    q [groups, rows, heads, dim]; k_cache and v_cache [kv_heads, pages, page_size, dim], zero where never written (a hidden
    key still takes part as 0 x its value); block_k and block_v [groups, rows, kv_heads, dim] for a diffusion batch.
    Returns [groups, rows, heads, dim] in q's dtype; sums are float32 or wider.
    """
    if runs_triton(q):
        from kernels import attention_triton

        return attention_triton.paged_attention(q, k_cache, v_cache, batch, scale, block_k, block_v)
    groups, rows, heads, dim = q.shape
    kv_heads = k_cache.shape[0]
    per_kv = batch.heads_per_kv
    queries = rows * per_kv
    wide = torch.promote_types(q.dtype, torch.float32)
    x = (
        q.view(groups, rows, kv_heads, per_kv, dim)
        .permute(2, 0, 1, 3, 4)
        .reshape(kv_heads, groups, 1, queries, dim)
    )
    x = _tile(x) * scale
    keys, values = _in_splits(k_cache, batch), _in_splits(v_cache, batch)
    scores = torch.matmul(x, keys.transpose(-1, -2)).to(wide)
    scores.masked_fill_(batch.hidden, float("-inf"))
    top = scores.amax((2, 4), keepdim=True)
    if block_k is not None and block_v is not None:
        own_k = block_k.permute(2, 0, 1, 3).unsqueeze(2)
        own_v = block_v.permute(2, 0, 1, 3).unsqueeze(2)
        own = torch.matmul(x, own_k.transpose(-1, -2)).to(wide)
        top = torch.maximum(top, own.amax(-1, keepdim=True))
    weights = (scores - top).exp_()
    total = weights.sum(-1, keepdim=True)
    partial = torch.matmul(weights.to(q.dtype), values).to(wide)
    out, norm = partial[:, :, 0], total[:, :, 0]
    for split in range(1, batch.splits):
        out, norm = out + partial[:, :, split], norm + total[:, :, split]
    if block_k is not None and block_v is not None:
        weights = (own - top).exp_()[:, :, 0]
        out = out + torch.matmul(weights.to(q.dtype), own_v[:, :, 0]).to(wide)
        norm = norm + weights.sum(-1, keepdim=True)
    out = (out / norm)[:, :, :queries].to(q.dtype)
    return (
        out.view(kv_heads, groups, rows, per_kv, dim).permute(1, 2, 0, 3, 4).reshape(groups, rows, heads, dim)
    )
