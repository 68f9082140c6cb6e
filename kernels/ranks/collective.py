"""Ranks that exchange tensors through a library: NCCL, between GPUs that can't reach each other's memory.

Sums have the same bits as over peer memory: every rank gathers all partial sums, and adds them in the order of the tree. With
gloo, the same code runs on CPUs, for tests.
"""

import os
import time
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor

from orthrus.kernels.peer_sizes import PeerSizes
from orthrus.kernels.ranks.ranks import START_SECONDS, RankError, Ranks
from orthrus.kernels.ranks.shared_memory import (
    Processes,
    SharedBoxes,
    SharedMemoryRanks,
)
from orthrus.kernels.rows.types import NO_TOKEN

Backend = Literal["nccl", "gloo"]
_POLL_SECONDS = 50e-6
_LARGEST = torch.iinfo(torch.int32).max


class CollectiveRanks(SharedMemoryRanks):
    """See `Ranks`. With NCCL, tensors on the host are still exchanged through shared memory."""

    def __init__(self, rank: int, shared: SharedBoxes, processes: Processes, backend: Backend) -> None:
        super().__init__(rank, shared, processes)
        self._backend = backend
        self._group: Any = None

    def share_memory(self, device: torch.device, sizes: PeerSizes) -> None:
        """Connect the GPUs. They share no memory, so `peers` stays None."""

        def connect() -> None:
            torch.cuda.set_device(device)
            self.exchange(torch.zeros(1, device=device))
            torch.cuda.synchronize(device)

        self.least(0)
        self.watched(connect)

    def exchange(self, own: Tensor) -> list[Tensor]:
        if self._backend == "nccl" and not own.is_cuda:
            return super().exchange(own)
        if self._group is None:
            super().exchange(
                torch.zeros(1)
            )  # Wait for all ranks first, so that connecting takes none of them long.
            self._group = self.watched(self._connect)
        found = own.new_empty(self.size * own.numel())
        try:
            work = self._group._allgather_base(found, own.view(-1))
            if self._backend == "gloo":
                while not work.is_completed():
                    self.check()
                    time.sleep(_POLL_SECONDS)
            work.wait()  # With NCCL the GPU's stream waits, and not the host.
        except RuntimeError as error:
            self._name_failed_rank()
            raise RankError(f"a rank of the model did not take part in an exchange: {error}") from error
        return list(found.view(self.size, *own.shape).unbind())

    def _connect(self) -> Any:
        from torch._C import _distributed_c10d as c10d

        store = c10d.FileStore(self._shared.store_file, self.size)
        limit = timedelta(seconds=START_SECONDS)
        store.set_timeout(limit)
        if self._backend == "gloo":
            return c10d.ProcessGroupGloo(store, self.rank, self.size, limit)
        # Programs that use NVLink multicast can put a host's GPUs out of service.
        os.environ["NCCL_NVLS_ENABLE"] = "0"
        return c10d.ProcessGroupNCCL(store, self.rank, self.size, c10d.ProcessGroupNCCL.Options())


def pick_best_of_ranks(
    ranks: Ranks, values: Tensor, indices: Tensor, picks: Tensor, first_pick: Tensor
) -> None:
    """`pick_best` (kernels/rows/sampling_triton) over the tokens of all ranks. Every rank gets the picks.

    values, indices: the best score, float32, and its token, int32, of each block of this rank's tokens: both [rows, blocks].
    picks: int32. The rows' picks are written to it, from index `first_pick` (int32 [1]) on.
    """
    best, token = _first_best(values, indices, 1)
    found = ranks.exchange(torch.stack([best.view(torch.int32), token], 1))
    scores = torch.stack([part[:, 0].contiguous().view(torch.float32) for part in found])
    best, token = _first_best(scores, torch.stack([part[:, 1] for part in found]), 0)
    # Infinity stands for a score of NaN or infinity.
    token = torch.where(best < float("inf"), token, NO_TOKEN)
    places = first_pick.long() + torch.arange(token.shape[0], device=picks.device)
    picks.index_copy_(0, places, token)


def _first_best(scores: Tensor, tokens: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The largest score along a dimension, and its token. Of equal scores the lowest token wins."""
    best = scores.amax(dim, keepdim=True)
    return best.squeeze(dim), torch.where(scores == best, tokens, _LARGEST).amin(dim).to(torch.int32)
