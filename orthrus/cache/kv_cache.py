"""`KVCache`: the memory of the paged KV cache, which holds the AR view's keys and values."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from orthrus.cache.kv_format import KVLayer
from orthrus.cache.kv_formats import DEFAULT_KV_FORMAT, load_kv_format
from orthrus.kernels.ranks import ONE_RANK, Ranks
from orthrus.models.config import ModelConfig


@dataclass(frozen=True)
class CopyPages:
    """What rank 0 tells the other ranks before it copies pages: they do the same."""

    copies: Sequence[tuple[int, int]]
    """As in `KVCache.copy_pages`."""


@dataclass(frozen=True)
class KVCache:
    """Keys and values of one engine, or of one rank's heads, in pages that `PagePool` hands out."""

    layers: Sequence[KVLayer]
    page_size: int
    """Positions of a page."""
    device: torch.device
    ranks: Ranks = ONE_RANK
    """Those that have the caches of the model's other heads."""

    @staticmethod
    def allocate(
        config: ModelConfig,
        num_pages: int,
        page_size: int,
        device: torch.device,
        dtype: torch.dtype,
        kv_format: str = DEFAULT_KV_FORMAT,
        ranks: Ranks = ONE_RANK,
    ) -> "KVCache":
        """Memory for `num_pages` pages, page 0 included, which is for rows that belong to no sequence.

        config: of the part of the model that is here. dtype: the model's. kv_format: a name in `orthrus.cache.kv_formats`.
        """
        layers = load_kv_format(kv_format).allocate(config, num_pages, page_size, device, dtype)
        return KVCache(layers, page_size, device, ranks)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @torch.inference_mode()
    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy pages in all layers: pairs of source and target, where no page is both.

        On a GPU this is ordered like a kernel launch: after the passes launched before it, before those launched after it.
        """
        if not copies:
            return
        self.ranks.tell(CopyPages(copies))
        # From pageable memory, the host would wait for the passes launched before.
        pairs = torch.tensor(copies, pin_memory=self.device.type == "cuda")
        sources, targets = pairs.to(self.device, non_blocking=True).unbind(1)
        for layer in self.layers:
            layer.copy_pages(sources, targets)
