"""Attention of one pass over the paged KV cache, for rows of both views.

A row sees the cache keys below its limit (an AR row at position p: p + 1; a row of a diffusion block anchored at n: n) and,
in a diffusion block, every row of its own block. Keys are summed in splits of fixed length aligned to position 0,
and the splits in order, so that a row's result does not depend on how long the batch's longest context is.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention_work import AttentionGroup, AttentionWork
from kernels.device import runs_triton

KV_SPLIT = 128
"""Keys per split: the unit of the reduction over keys."""

_QUERY_TILE = 8


@dataclass(frozen=True)
class AttentionPlan:
    """What the rows of a pass see: `groups` of rows that lie in different places of the pass.

    work: the same for the Triton kernels, on their device.
    """

    groups: tuple[AttentionGroup, ...]
    page_size: int
    heads_per_kv: int
    device: torch.device
    work: AttentionWork | None = None

    @cached_property
    def batches(self) -> "list[_Batch]":
        """The groups in batches of one view and row count."""
        alike: dict[tuple[bool, int], list[AttentionGroup]] = defaultdict(list)
        for group in self.groups:
            alike[group.diffusion, group.num_rows].append(group)
        return [_batch(members, self) for members in alike.values()]


@dataclass(frozen=True)
class _Batch:
    """Groups of one view and row count.

    rows: int64 [groups * rows each], their rows in the pass. page_table int64 [groups, pages], padded with page 0 to a whole
    number of splits. hidden: keys that a query must not see, bool [1, groups, splits, queries (tiled), KV_SPLIT]. first_page:
    the page from which a single group's pages follow one another, so that they can be read where they lie; else None.
    """

    groups: int
    rows: Tensor | slice
    page_table: Tensor
    splits: int
    hidden: Tensor
    diffusion: bool
    first_page: int | None


def _batch(groups: Sequence[AttentionGroup], plan: AttentionPlan) -> _Batch:
    count, page_size, device = groups[0].num_rows, plan.page_size, plan.device
    limits = torch.tensor([group.limits for group in groups], device=device)
    pages_per_split = max(1, KV_SPLIT // page_size)
    used = max(-(-group.limits[-1] // page_size) for group in groups)
    width = max(1, -(-used // pages_per_split)) * pages_per_split
    tables = [[*g.pages[:used], *([0] * (width - min(used, len(g.pages))))] for g in groups]
    run = groups[0].pages[:used]
    in_place = len(groups) == 1 and bool(run) and list(run) == list(range(run[0], run[0] + used))
    first = groups[0].first_row
    rows: Tensor | slice = slice(first, first + len(groups) * count)
    if any(group.first_row != first + i * count for i, group in enumerate(groups)):
        firsts = torch.tensor([group.first_row for group in groups], device=device)
        rows = (firsts[:, None] + torch.arange(count, device=device)).flatten()
    splits = width * page_size // KV_SPLIT
    keys = torch.arange(splits * KV_SPLIT, device=device).view(splits, 1, KV_SPLIT)
    queries = _tile(limits.repeat_interleave(plan.heads_per_kv, 1).unsqueeze(-1))
    return _Batch(
        groups=len(groups),
        rows=rows,
        page_table=torch.tensor(tables, device=device),
        splits=splits,
        hidden=(keys >= queries.unsqueeze(1)).unsqueeze(0),
        diffusion=groups[0].diffusion,
        first_page=run[0] if in_place else None,
    )


def _tile(x: Tensor) -> Tensor:
    """Pad the queries of x [..., queries, width] to `_QUERY_TILE`: a product with few rows would take other code."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % _QUERY_TILE))


def _places(cache: Tensor, batch: _Batch) -> Tensor | None:
    """Where the groups' pages lie in the cache as a list of all KV heads' pages; None where they can be read in place."""
    kv_heads, pages = cache.shape[:2]
    first = batch.first_page
    if first is not None and first + batch.page_table.shape[1] <= pages:
        return None
    heads = torch.arange(0, kv_heads * pages, pages, device=cache.device)
    return (heads[:, None] + batch.page_table.view(1, -1)).flatten()


def _in_splits(cache: Tensor, batch: _Batch, places: Tensor | None) -> Tensor:
    """The groups' cached keys or values [kv_heads, groups, splits, KV_SPLIT, dim]."""
    if places is None:
        assert batch.first_page is not None
        # The table's padding is then whatever pages come next: hidden keys like any other.
        pages = cache.narrow(1, batch.first_page, batch.page_table.shape[1])
    else:
        # Whole pages along the first axis: along the second, index_select takes them apart.
        pages = cache.flatten(0, 1).index_select(0, places)
    return pages.view(cache.shape[0], -1, batch.splits, KV_SPLIT, cache.shape[-1])


def paged_attention(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, scale: float
) -> Tensor:
    """softmax(q k^T * scale) v for every row of the pass: [rows, heads * dim] in q's dtype; sums are float32 or wider.

    qkv [rows, heads + 2 * kv_heads, dim] from `qk_norm_rope`: queries, and keys and values, which of a diffusion row the rest
    of its block sees. k_cache and v_cache [kv_heads, pages, page_size, dim], finite (a hidden key may still take part as 0 x
    its value). Rows of no group get zeros, or anything on a GPU.
    """
    if runs_triton(qkv):
        from kernels import attention_triton

        return attention_triton.paged_attention(qkv, k_cache, v_cache, plan, scale)
    kv_heads, dim = k_cache.shape[0], qkv.shape[2]
    heads = qkv.shape[1] - 2 * kv_heads
    out = torch.zeros(qkv.shape[0], heads * dim, device=qkv.device, dtype=qkv.dtype)
    for batch in plan.batches:
        rows = qkv[batch.rows].unflatten(0, (batch.groups, -1))
        block = None
        if batch.diffusion:
            block = rows[:, :, heads : heads + kv_heads], rows[:, :, heads + kv_heads :]
        attended = _attend(rows[:, :, :heads], k_cache, v_cache, batch, scale, block)
        out[batch.rows] = attended.reshape(-1, heads * dim)
    return out


def _attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: _Batch,
    scale: float,
    block: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """q [groups, rows, heads, dim]; block: fresh keys and values [groups, rows, kv_heads, dim]. Returns q's shape."""
    groups, rows, heads, dim = q.shape
    kv_heads = k_cache.shape[0]
    per_kv = heads // kv_heads
    queries = rows * per_kv
    wide = torch.promote_types(q.dtype, torch.float32)
    x = (
        q.view(groups, rows, kv_heads, per_kv, dim)
        .permute(2, 0, 1, 3, 4)
        .reshape(kv_heads, groups, 1, queries, dim)
    )
    x = _tile(x) * scale
    places = _places(k_cache, batch)
    keys, values = _in_splits(k_cache, batch, places), _in_splits(v_cache, batch, places)
    scores = torch.matmul(x, keys.transpose(-1, -2)).to(wide)
    scores.masked_fill_(batch.hidden, float("-inf"))
    top = scores.amax((2, 4), keepdim=True)
    if block is not None:
        own_k, own_v = (part.permute(2, 0, 1, 3).unsqueeze(2) for part in block)
        own = torch.matmul(x, own_k.transpose(-1, -2)).to(wide)
        top = torch.maximum(top, own.amax(-1, keepdim=True))
    weights = (scores - top).exp_()
    total = weights.sum(-1, keepdim=True)
    partial = torch.matmul(weights.to(q.dtype), values).to(wide)
    out, norm = partial[:, :, 0], total[:, :, 0]
    for split in range(1, batch.splits):
        out, norm = out + partial[:, :, split], norm + total[:, :, split]
    if block is not None:
        weights = (own - top).exp_()[:, :, 0]
        out = out + torch.matmul(weights.to(q.dtype), own_v[:, :, 0]).to(wide)
        norm = norm + weights.sum(-1, keepdim=True)
    out = (out / norm)[:, :, :queries].to(q.dtype)
    return (
        out.view(kv_heads, groups, rows, per_kv, dim).permute(1, 2, 0, 3, 4).reshape(groups, rows, heads, dim)
    )
