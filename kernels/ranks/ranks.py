"""`Ranks`: what one rank of a model asks of the others. Each rank is a process, on a GPU of its own or on a share of the CPU.

All ranks run the same passes, and call the same operations in the same order. Every operation waits for the others, and every
wait has an end: if a rank has ended or hangs, the others get a `RankError`.
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
"""How often a rank that waits for another asks whether it is still there."""
START_SECONDS = 60
"""How long the ranks, which all have come so far, take at most to find each other."""


class RankError(RuntimeError):
    """A rank has failed, so the model can't go on. The message names the rank."""


class Ranks(ABC):
    """The ranks of a model, as one of them sees them."""

    rank: int
    """Which rank this process is, from 0. Rank 0 belongs to the engine: it decides what runs, and picks the tokens."""
    size: int
    """Number of ranks."""
    peers: "PeerMemory | None" = None
    """What their GPUs share; None on CPUs, and where GPUs can't reach each other's memory."""

    @abstractmethod
    def exchange(self, own: Tensor) -> list[Tensor]:
        """Every rank's tensor, in the order of the ranks. All have the shape and dtype of `own`, which is contiguous.

        The results may be read until the next exchange.
        """

    @abstractmethod
    def tell(self, message: object) -> None:
        """Rank 0 tells the others what to do next. It does not wait for them. On other ranks it does nothing."""

    @abstractmethod
    def check(self) -> None:
        """Raise `RankError` if a rank has ended or hangs, or ConfigError if one could not be made as the settings say."""

    @abstractmethod
    def watch(self, on_failure: Callable[[RankError], None]) -> None:
        """Call `on_failure`, from a thread of its own, once a rank has failed. For rank 0, which may be waiting for requests."""

    def watched(self, work: Callable[[], Result]) -> Result:
        """What `work` returns or raises. Raises what `check` does as soon as a rank has failed, wherever `work` stands then.

        For work that may wait for other ranks without asking whether they are there, as a library or a GPU does. It runs in a
        thread of its own, which is left behind if a rank fails.
        """
        return run_watched(work, self.check)

    def share_memory(self, device: torch.device, sizes: PeerSizes) -> None:
        """Make `peers`, or what takes its place, on all ranks at the same time. device: this rank's GPU."""
        raise NotImplementedError

    @property
    def collective(self) -> bool:
        """Whether GPUs exchange by `exchange`, since they have no `peers`. On CPUs, whether there are several ranks."""
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
        """The smallest of the numbers that the ranks give."""
        return int(min(found.item() for found in self.exchange(torch.tensor([own]))))

    def all_agree(self, own: bool) -> bool:
        """Whether every rank says yes."""
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
"""Of every model that one process runs alone."""


def run_watched(work: Callable[[], Result], check: Callable[[], None]) -> Result:
    """What `work` returns or raises. It runs in a thread, which is left behind if `check` raises meanwhile."""
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
        # An error holds this frame by its traceback. If the frame held the error too, all that `work` has made, such as a model
        # and the processes of its ranks, would stay until a garbage collection.
        del done


def add_pairwise(parts: Sequence[Tensor]) -> Tensor:
    """The sum of a power of two of tensors: neighbours are added, then the sums of neighbours, and so on.

    So the sum of an aligned run of parts, such as those of one rank, is a part of the whole sum.
    """
    while len(parts) > 1:
        parts = [first + second for first, second in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]
