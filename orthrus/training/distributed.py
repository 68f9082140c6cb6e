"""The processes of a data-parallel run that `torchrun` started. Without torchrun there is one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from orthrus.errors import ConfigError


@dataclass(frozen=True)
class Processes:
    """This process (`rank`) among `world` processes, and what they do together. All make the same calls in the same order."""

    rank: int = 0
    world: int = 1

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def share(self, rows: int, micro_batch: int | None) -> list[range]:
        """This process's rows of a step, a range for each backward pass. Raises ConfigError if they can't be shared evenly.

        Which rows share a pass depends on `micro_batch` only. So any number of processes runs the same passes in all.
        """
        size = micro_batch or rows // self.world
        if size == 0 or rows % (size * self.world):
            raise ConfigError(
                f"rows {rows} can't be shared evenly by {self.world} processes in passes of {size}: make it a "
                "multiple of processes x micro_batch"
            )
        mine = rows // self.world
        return [range(start, start + size) for start in range(self.rank * mine, (self.rank + 1) * mine, size)]

    def add(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""
        if self.world > 1:
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    def first(self, value: float, device: torch.device) -> float:
        """The `value` of the first process, in all processes."""
        if self.world == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=device)
        dist.broadcast(shared, 0)
        return shared.item()

    @contextmanager
    def one_by_one(self) -> Iterator[None]:
        """Run the block in the first process before the others. So the first can make a file that the others then find."""
        if self.world > 1 and not self.writes:
            dist.barrier()
        yield
        if self.world > 1 and self.writes:
            dist.barrier()


def rank_and_world() -> tuple[int, int]:
    """Rank and number of processes from torchrun's environment. 0 and 1 without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def local_device() -> torch.device:
    """This process's own accelerator if there are any, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


@contextmanager
def connected(device: torch.device) -> Iterator[Processes]:
    """Connect the processes of this run while the context lasts, by NCCL on accelerators and by gloo on CPUs."""
    rank, world = rank_and_world()
    if world == 1:
        yield Processes()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world)
    try:
        yield Processes(rank, world)
    finally:
        dist.destroy_process_group()
