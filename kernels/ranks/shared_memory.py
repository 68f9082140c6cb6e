"""Ranks on one host that exchange tensors of the host through shared memory.

Each rank has a box for its tensor, and a semaphore from each rank to each other one. To exchange, a rank fills its box, releases
its semaphores to the others, and waits for theirs. There are two sets of boxes, used in turn (double buffering). A rank begins
an exchange only after it has finished the previous one. By then all others have begun the previous one, so they have finished
reading the boxes that are overwritten now.
"""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from multiprocessing.synchronize import Semaphore
from typing import Protocol

import torch
from torch import Tensor

from orthrus.kernels.peer_sizes import PeerSizes
from orthrus.kernels.ranks.ranks import CHECK_SECONDS, RankError, Ranks

_BOX_BYTES = 8 << 20
"""Bytes of a box. A larger tensor is exchanged in several parts."""
_END_SECONDS = 1.0
"""Time within which a process that ends is gone."""


@dataclass(frozen=True)
class SharedBoxes:
    """What the ranks of a model share on the host. It can be an argument of a process that is started."""

    boxes: Tensor
    """uint8 [2, ranks, bytes]."""
    filled: Sequence[Sequence[Semaphore]]
    """filled[a][b]: rank a has filled its box, and rank b may read it."""
    store_file: str
    """Path of a file through which the GPUs find each other's memory. It does not exist at first."""

    @staticmethod
    def make(context: BaseContext, size: int) -> "SharedBoxes":
        """The boxes of `size` ranks."""
        boxes = torch.zeros(2, size, _BOX_BYTES, dtype=torch.uint8).share_memory_()
        filled = [[context.Semaphore(0) for _ in range(size)] for _ in range(size)]
        return SharedBoxes(boxes, filled, os.path.join(tempfile.mkdtemp(prefix="orthrus-"), "ranks"))


class Processes(Protocol):
    """The other processes, as a rank sees them."""

    def check(self) -> None:
        """Raise RankError or ConfigError if one has failed: see `Ranks.check`."""
        ...

    def tell(self, message: object) -> None:
        """See `Ranks.tell`."""
        ...

    def watch(self, on_failure: Callable[[RankError], None]) -> None:
        """See `Ranks.watch`."""
        ...


class SharedMemoryRanks(Ranks):
    """See `Ranks`."""

    def __init__(self, rank: int, shared: SharedBoxes, processes: Processes) -> None:
        self.rank, self.size = rank, len(shared.filled)
        self._shared, self._processes = shared, processes
        self._turn = 0

    def tell(self, message: object) -> None:
        self._processes.tell(message)

    def check(self) -> None:
        self._processes.check()

    def watch(self, on_failure: Callable[[RankError], None]) -> None:
        self._processes.watch(on_failure)

    def share_memory(self, device: torch.device, sizes: PeerSizes) -> None:
        from orthrus.kernels.ranks.peer_memory import PeerMemory

        self.least(0)  # Wait until all ranks have loaded, so that connecting takes none of them long.
        try:
            self.peers = self.watched(
                lambda: PeerMemory(self.rank, self.size, device, self._shared.store_file, sizes)
            )
        except RuntimeError as error:
            self._name_failed_rank()
            raise RankError(f"the GPUs of the model can't share memory: {error}") from error

    def _name_failed_rank(self) -> None:
        """Call `check` until it raises, for `_END_SECONDS` at most: libraries may notice a failure before the process ends."""
        end = time.monotonic() + _END_SECONDS
        while time.monotonic() < end:
            self.check()
            time.sleep(_END_SECONDS / 50)

    def exchange(self, own: Tensor) -> list[Tensor]:
        parts = own.view(-1).split(_BOX_BYTES // own.itemsize)
        if len(parts) == 1:
            return [found.view(own.shape) for found in self._exchange(parts[0]).unbind()]
        # Copied out of the boxes, because later parts use them again.
        found = torch.cat([self._exchange(part).clone() for part in parts], 1)
        return [every.view(own.shape) for every in found.unbind()]

    def _exchange(self, own: Tensor) -> Tensor:
        """`exchange` of a one-dimensional tensor that fits a box: [ranks, numbers], a view of the boxes."""
        self._turn ^= 1
        boxes = self._shared.boxes[self._turn, :, : own.nbytes].view(own.dtype)
        boxes[self.rank].copy_(own)
        others = [rank for rank in range(self.size) if rank != self.rank]
        for other in others:
            self._shared.filled[self.rank][other].release()
        for other in others:
            while not self._shared.filled[other][self.rank].acquire(timeout=CHECK_SECONDS):
                self._processes.check()
        return boxes
