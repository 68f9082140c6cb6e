"""`Ranks`: how the ranks of a model communicate. Each rank is a process, on a GPU of its own or on a share of the CPU.

All ranks run the same passes, and call the same operations in the same order. An operation waits for the other ranks. If one of
them has ended or hangs, the wait ends with a `RankError`.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from orthrus.kernels.peer_sizes import PeerSizes

if TYPE_CHECKING:
    from orthrus.kernels.ranks.peer_memory import PeerMemory

Result = TypeVar("Result")
CHECK_SECONDS = 0.2
"""Interval at which a waiting rank checks whether the others are still there."""
START_SECONDS = 60
"""Timeout for connecting the ranks, which begins once all have come that far."""


class RankError(RuntimeError):
    """A rank has failed, so the model can't go on. The message names the rank."""


class Ranks(ABC):
    """The ranks of a model, as one of them sees them."""

    rank: int
    """Which rank this process is, from 0. Rank 0 belongs to the engine: it decides what runs, and picks the tokens."""
    size: int
    """Number of ranks."""
    peers: "PeerMemory | None" = None
    """The memory that their GPUs share. None on CPUs, and where GPUs can't reach each other's memory."""

    @abstractmethod
    def exchange(self, own: Tensor) -> list[Tensor]:
        """Gather every rank's `own`, in the order of the ranks. All are contiguous and have one shape and dtype.

        The results are valid until the next exchange.
        """

    @abstractmethod
    def tell(self, message: object) -> None:
        """On rank 0: send the others a message, what to do next, without waiting for them. On other ranks: do nothing."""

    @abstractmethod
    def check(self) -> None:
        """Raise `RankError` if a rank has ended or hangs, or ConfigError if one could not be made with its settings."""

    @abstractmethod
    def watch(self, on_failure: Callable[[RankError], None]) -> None:
        """Call `on_failure` from another thread once a rank has failed. For rank 0, which may be waiting for requests."""

    def watched(self, work: Callable[[], Result]) -> Result:
        """Run `work` in a thread, and return or raise what it does. If a rank fails before that, raise what `check` raises.

        For work that may wait for other ranks without calling `check`, as a library or a GPU does. If a rank fails, the thread is
        left behind.
        """
        return run_watched(work, self.check)

    def share_memory(self, device: torch.device, sizes: PeerSizes) -> None:
        """Connect the GPUs: create `peers`, or what replaces it. All ranks must call this at the same time.

        device: this rank's GPU. sizes: how much is exchanged at most. Raises RankError if a rank fails meanwhile.
        """
        raise NotImplementedError

    @property
    def collective(self) -> bool:
        """Whether sums are made by `exchange`: there are several ranks without `peers`."""
        return self.size > 1 and self.peers is None

    def add(self, partial: Tensor) -> Tensor:
        """The sum of all ranks' `partial`, added as `add_pairwise` does."""
        return add_pairwise(self.exchange(partial))

    def gather(self, part: Tensor, widths: Sequence[int]) -> Tensor:
        """All ranks' parts [rows, width of the rank], side by side: [rows, sum of the widths]."""
        most = max(widths)
        padded = part.new_zeros(part.shape[0], most)
        padded[:, : part.shape[1]] = part
        parts = self.exchange(padded)
        return torch.cat([found[:, :width] for found, width in zip(parts, widths, strict=True)], 1)

    def least(self, own: int) -> int:
        """The smallest of all ranks' `own`."""
        return int(min(found.item() for found in self.exchange(torch.tensor([own]))))

    def all_agree(self, own: bool) -> bool:
        """Whether `own` is true on every rank."""
        return bool(self.least(int(own)))


class _OneRank(Ranks):
    """A model that is not shared."""

    rank, size = 0, 1

    def exchange(self, own: Tensor) -> list[Tensor]:
        return [own]

    def tell(self, message: object) -> None:
        pass

    def check(self) -> None:
        pass

    def watch(self, on_failure: Callable[[RankError], None]) -> None:
        pass

    def watched(self, work: Callable[[], Result]) -> Result:
        return work()

    def gather(self, part: Tensor, widths: Sequence[int]) -> Tensor:
        return part

    def least(self, own: int) -> int:
        return own


ONE_RANK: Ranks = _OneRank()
"""The `Ranks` of a model that is not shared."""


def run_watched(work: Callable[[], Result], check: Callable[[], None]) -> Result:
    """Run `work` in a thread, and return or raise what it does. If `check` raises before that, the thread is left behind."""
    done: Future[Result] = Future()
    threading.Thread(target=_settle, args=(work, done), name="orthrus-watched", daemon=True).start()
    try:
        while not wait([done], CHECK_SECONDS).done:
            check()
        return done.result()
    finally:
        del done  # As in `_settle`.


def _settle(work: Callable[[], Result], done: "Future[Result]") -> None:
    try:
        done.set_result(work())
    except BaseException as error:
        done.set_exception(error)
    finally:
        # The error's traceback refers to this frame. If the frame referred to the error through `done`, this cycle would keep all
        # that `work` has made until a garbage collection, such as a model and the processes of its ranks.
        del done


def add_pairwise(parts: Sequence[Tensor]) -> Tensor:
    """The sum of tensors in a binary tree: neighbours are added, then neighbouring sums, and so on.

    The number of tensors is a power of two. The sum of an aligned run of parts, such as those of one rank, is a node of the tree.
    """
    while len(parts) > 1:
        parts = [first + second for first, second in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]
