"""`KVCache`: the memory of the paged KV cache, which holds the AR view's keys and values."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from orthrus.cache.kv_format import KVLayer
from orthrus.cache.kv_formats import DEFAULT_KV_FORMAT, load_kv_format
from orthrus.kernels.rows.copy_pages import addresses_of, copy_pages
from orthrus.models.config import ModelConfig


@dataclass(frozen=True)
class KVCache:
    """Keys and values of one engine, or of one rank's heads, in pages that `PagePool` hands out."""

    layers: Sequence[KVLayer]
    page_size: int
    """Positions of a page."""
    device: torch.device

    @staticmethod
    def allocate(
        config: ModelConfig,
        num_pages: int,
        page_size: int,
        device: torch.device,
        dtype: torch.dtype,
        kv_format: str = DEFAULT_KV_FORMAT,
    ) -> "KVCache":
        """Allocate `num_pages` pages. Page 0 is one of them: it is for rows that belong to no sequence.

        config: that of this rank's part of the model. dtype: the model's. kv_format: a name in `orthrus.cache.kv_formats`.
        """
        layers = load_kv_format(kv_format).allocate(config, num_pages, page_size, device, dtype)
        return KVCache(layers, page_size, device)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @cached_property
    def _tensors(self) -> tuple[list[Tensor], Tensor]:
        """The tensors of all layers, and their addresses."""
        tensors = [tensor for layer in self.layers for tensor in layer.tensors]
        return tensors, addresses_of(tensors)

    @torch.inference_mode()
    def copy_pages(self, copies: Tensor, count: int) -> None:
        """Copy the first positions of pages in all layers, on this rank: see `copy_pages` (kernels/rows).

        copies: int32 [at least 3 * count]. On a GPU this is a kernel launch: it runs after the passes launched before it, and
        before those launched after it.
        """
        copy_pages(*self._tensors, copies, count)
