"""Copying pages of the KV cache, in all layers at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from orthrus.kernels.device import runs_triton


def copy_pages(caches: Sequence[Tensor], addresses: Tensor, copies: Tensor, count: int) -> None:
    """Copy the first positions of pages, in each of `caches`: [kv_heads, pages, page_size, head_dim], contiguous, of one shape.

    addresses: int64 [caches], from `addresses_of`. copies: int32 [at least 3 * count]: source page, target page and number of
    positions of each copy. No page is both source and target. On a GPU, head_dim numbers must be a multiple of 16 bytes.
    """
    if runs_triton(caches[0]):
        from orthrus.kernels.rows import copy_pages_triton

        copy_pages_triton.copy_pages(caches[0], addresses, copies, count)
        return
    for source, target, positions in copies[: 3 * count].view(-1, 3).tolist():
        for cache in caches:
            cache[:, target, :positions] = cache[:, source, :positions]


def addresses_of(caches: Sequence[Tensor]) -> Tensor:
    """The memory address of each cache: int64 [caches], on their device."""
    return torch.tensor([cache.data_ptr() for cache in caches], device=caches[0].device)
