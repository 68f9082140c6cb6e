"""Attention in plain PyTorch.

A row sees the keys in the cache below its limit: p + 1 for an AR row at position p, and n for the rows of a diffusion block
anchored at n. A row of a block also sees every row of its own block. Keys are summed in segments of fixed length, aligned to
position 0. The sums of the segments are added in order. So a row's result does not depend on the longest context of the batch.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from orthrus.kernels.attention.types import AttentionGroup, AttentionPlan

SEGMENT = 128
"""Keys of a segment: the unit of the reduction over keys."""

_QUERY_TILE = 8
"""Queries are padded to a multiple of this. For fewer rows, a library may use other code, which rounds differently."""


@dataclass(frozen=True)
class _Batch:
    """Groups of one view and one number of rows. They run as a batched product, with one product for each group and KV head."""

    # Number of products. They are ordered by group, and within a group by KV head.
    products: int
    # int64 [products * queries]: indices of the queries in qkv.flatten(0, 1). The last is repeated to fill a query tile.
    queries: Tensor
    # int64 [products * rows]: such indices of a diffusion block's own keys and values; None for AR rows.
    own_keys: Tensor | None
    own_values: Tensor | None
    # int64 [products * pages]: the groups' pages in cache.flatten(0, 1), padded to whole segments.
    pages: Tensor
    # The same pages as a slice of the cache, if there is one group and its pages are consecutive.
    in_place: slice | None
    # [products, queries, own keys + cached keys]: -inf where a query does not see a key, else 0.
    mask: Tensor

    def cached(self, cache: Tensor) -> Tensor:
        """The groups' keys or values [products, keys, dim] in a cache [kv_heads, pages, page_size, dim]."""
        if self.in_place is not None:
            return cache[:, self.in_place].flatten(1, 2)
        # Along the first axis index_select copies whole pages. Along the second it would copy them in parts.
        return cache.flatten(0, 1).index_select(0, self.pages).view(self.products, -1, cache.shape[-1])


@dataclass(frozen=True)
class _Layout:
    """A pass as batches."""

    batches: list[_Batch]
    # int64 [rows * heads]: index of each row's heads in the concatenated results of the batches.
    results: Tensor


def _layout_of(plan: AttentionPlan, num_rows: int, cache: Tensor) -> _Layout:
    """The layout of a pass of `num_rows` rows with a cache [kv_heads, pages, ...]. All layers have the same: it is made once."""
    key = num_rows, cache.shape[0], cache.shape[1], torch.promote_types(cache.dtype, torch.float32)
    if key not in plan.layouts:
        plan.layouts[key] = _layout(plan, *key)
    layout: _Layout = plan.layouts[key]
    return layout


def _layout(plan: AttentionPlan, num_rows: int, kv_heads: int, num_pages: int, dtype: torch.dtype) -> _Layout:
    alike: dict[tuple[bool, int], list[AttentionGroup]] = defaultdict(list)
    for group in plan.groups:
        alike[group.diffusion, group.num_rows].append(group)
    heads = np.arange(kv_heads * plan.heads_per_kv).reshape(kv_heads, 1, plan.heads_per_kv)
    results = np.zeros((num_rows, heads.size), np.int64)
    batches, first_result = [], 0
    for members in alike.values():
        batch = _batch(members, plan, kv_heads, num_pages, dtype)
        batches.append(batch)
        each = batch.queries.shape[0] // batch.products
        count = members[0].num_rows
        places = (
            first_result + each * np.arange(batch.products)[:, None] + np.arange(count * plan.heads_per_kv)
        )
        results[_rows(members)[:, None, :, None], heads] = places.reshape(len(members), kv_heads, count, -1)
        first_result += batch.queries.shape[0]
    return _Layout(batches, torch.from_numpy(results.ravel()).to(plan.device))


def _rows(groups: Sequence[AttentionGroup]) -> np.ndarray:
    """The rows of groups that have the same number of rows: int64 [groups, rows]."""
    return np.array([group.first_row for group in groups])[:, None] + np.arange(groups[0].num_rows)


def _batch(
    groups: Sequence[AttentionGroup], plan: AttentionPlan, kv_heads: int, num_pages: int, dtype: torch.dtype
) -> _Batch:
    device, per_kv, page_size = plan.device, plan.heads_per_kv, plan.page_size
    count, diffusion = groups[0].num_rows, groups[0].diffusion
    heads = kv_heads * (per_kv + 2)
    firsts = _rows(groups)[:, None] * heads  # [groups, 1, rows]: a row's first head
    kv = np.arange(kv_heads)[:, None]
    queries = (firsts[..., None] + (kv * per_kv + np.arange(per_kv))[:, None]).reshape(
        len(groups), kv_heads, -1
    )
    tiled = np.minimum(np.arange(-(-queries.shape[2] // _QUERY_TILE) * _QUERY_TILE), queries.shape[2] - 1)

    def places(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.ravel()).to(device)

    pages_per_segment = max(1, SEGMENT // page_size)
    used = max(-(-group.limits[-1] // page_size) for group in groups)
    width = max(1, -(-used // pages_per_segment)) * pages_per_segment
    tables = np.array([[*g.pages[:used], *([0] * (width - min(used, len(g.pages))))] for g in groups])
    own = count if diffusion else 0
    return _Batch(
        products=len(groups) * kv_heads,
        queries=places(queries[:, :, tiled]),
        own_keys=places(firsts + kv_heads * per_kv + kv) if diffusion else None,
        own_values=places(firsts + kv_heads * (per_kv + 1) + kv) if diffusion else None,
        pages=places(tables[:, None] + kv * num_pages),
        in_place=_run(groups[0].pages[:used], width, num_pages) if len(groups) == 1 else None,
        mask=_mask(groups, kv_heads, tiled // per_kv, own, width * page_size, dtype, device),
    )


def _run(pages: Sequence[int], width: int, num_pages: int) -> slice | None:
    """A slice of `width` pages of the cache that begins with `pages`; None if these are not consecutive or it would not fit.

    The slice may end with pages of other sequences. Their keys are masked, as all keys past a row's limit are.
    """
    if (
        not pages
        or pages[0] + width > num_pages
        or list(pages) != list(range(pages[0], pages[0] + len(pages)))
    ):
        return None
    return slice(pages[0], pages[0] + width)


def _mask(
    groups: Sequence[AttentionGroup],
    kv_heads: int,
    query_rows: np.ndarray,
    own: int,
    keys: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """`_Batch.mask` for `own` keys that every query sees, and `keys` cached ones. query_rows: each query's row in its group."""
    limits = torch.tensor([group.limits for group in groups], device=device)[:, None, query_rows, None]
    hidden = torch.arange(-own, keys, device=device) >= limits
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
    return mask.expand(-1, kv_heads, -1, -1).flatten(0, 1)


def paged_attention(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, scale: float
) -> Tensor:
    """See `paged_attention` (kernels/attention/__init__.py)."""
    layout = _layout_of(plan, qkv.shape[0], k_cache)
    results = [_attend(qkv.flatten(0, 1), k_cache, v_cache, batch, scale) for batch in layout.batches]
    attended = torch.cat(results) if len(results) > 1 else results[0]
    return attended.index_select(0, layout.results).view(qkv.shape[0], -1).to(qkv.dtype)


def _attend(heads: Tensor, k_cache: Tensor, v_cache: Tensor, batch: _Batch, scale: float) -> Tensor:
    """The attention of a batch's queries, in their order: [products * queries, dim], float32 or wider.

    heads [rows * (heads + 2 * kv_heads), dim].
    """
    products, dim, wide = batch.products, heads.shape[1], batch.mask.dtype

    def take(places: Tensor) -> Tensor:
        return heads.index_select(0, places).view(products, -1, dim).to(wide)

    queries = take(batch.queries).mul_(scale)
    keys, values = (batch.cached(cache).to(wide).split(SEGMENT, 1) for cache in (k_cache, v_cache))
    if batch.own_keys is not None and batch.own_values is not None:
        keys, values = (take(batch.own_keys), *keys), (take(batch.own_values), *values)
    # One product for each segment. All cached segments have one size: a library may sum another number of keys in another order.
    scores = [torch.bmm(queries, segment.transpose(1, 2)) for segment in keys]
    weights = (torch.cat(scores, 2) if len(scores) > 1 else scores[0]).add_(batch.mask).softmax(-1)
    shares = weights.split([segment.shape[1] for segment in keys], 2)
    out, *more = (torch.bmm(share, segment) for share, segment in zip(shares, values, strict=True))
    for part in more:
        out.add_(part)
    return out.flatten(0, 1)
