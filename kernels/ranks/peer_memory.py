"""`PeerMemory`: memory of each rank's GPU that the GPUs of all ranks read and write, over NVLink or PCIe.

PyTorch's symmetric memory allocates it. In a pass, ranks exchange data by one-shot writes of our own kernels (`peer_triton`): for
each row, a rank writes to its box on every rank, and then raises a flag there. Every row has two sets of boxes, which are used in
turn (double buffering), and a count of its exchanges. A rank begins an exchange only after it has finished the previous one. By
then all others have begun the previous one, so they have finished reading the boxes that are overwritten now.
"""

import math
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from orthrus.kernels.peer_sizes import PeerSizes
from orthrus.kernels.ranks.ranks import START_SECONDS
from orthrus.kernels.ranks.rendezvous_store import RendezvousStore

_FIRST_WAIT, _WAIT = 120_000_000_000, 3_000_000_000
"""Timeouts of a wait for another rank, in nanoseconds: until all kernels have been compiled, and after that."""


@dataclass(frozen=True)
class Mailbox:
    """Boxes for one kind of exchange, as the kernels take them."""

    boxes: Tensor
    """int64 [ranks]: the address of each rank's boxes, [2, ranks, rows, numbers] of 4 bytes."""
    flags: Tensor
    """int64 [ranks]: the address of each rank's flags, int32 [ranks, rows]: how many exchanges of a row a rank has written."""
    counts: Tensor
    """int32 [rows]: how many exchanges of each row this rank has finished."""
    rows: int
    width: int


class PeerMemory:
    """The memory of all ranks, as one rank sees it. All ranks must create theirs at the same time."""

    sums: Mailbox
    """For partial sums, float32."""
    best: Mailbox
    """For each rank's best token of a row, and its score."""
    logits: Tensor
    """float32 [logit_rows, vocabulary] on this rank. Those of rank 0 hold all ranks' logits after a pass."""
    status: Tensor
    """int64 [2] on this rank: 0, or 1 + the rank for which a wait has timed out; and the timeout in nanoseconds."""

    def __init__(self, rank: int, size: int, device: torch.device, store_file: str, sizes: PeerSizes) -> None:
        """store_file: path of a file through which the ranks find each other. It must not exist at first."""
        from torch._C import _distributed_c10d as c10d

        # Programs that use NVLink multicast can put a host's GPUs out of service.
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        self.rank, self.size, self.sizes = rank, size, sizes
        places, end = sizes.layout(size)
        torch.cuda.set_device(device)
        # PyTorch finds the group by its name, but holds no reference to it. The name is the path, which differs between engines.
        group: Any = store_file
        # Kept, because C++ calls its methods.
        self._store = RendezvousStore(store_file, size, timedelta(seconds=START_SECONDS))
        self._group = c10d.ProcessGroup(self._store, rank, size)
        c10d._register_process_group(group, self._group)
        self._memory = c10d._SymmetricMemory.empty_strided_p2p((end,), (1,), torch.uint8, device, group)
        self._memory.zero_()
        torch.cuda.synchronize(device)
        handle = c10d._SymmetricMemory.rendezvous(self._memory, group)
        self._handle = handle
        addresses = torch.tensor(list(handle.buffer_ptrs), dtype=torch.int64)

        def at(name: str) -> Tensor:
            return (addresses + places[name]).to(device)

        def own(name: str, dtype: torch.dtype, *shape: int) -> Tensor:
            begin = places[name]
            return self._memory[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

        def mailbox(name: str, flags: str, rows: int, width: int) -> Mailbox:
            counts = torch.zeros(rows, dtype=torch.int32, device=device)
            return Mailbox(at(name), at(flags), counts, rows, width)

        self.sums = mailbox("sums", "sum_flags", sizes.rows, sizes.width)
        self.best = mailbox("best", "best_flags", sizes.logit_rows, 2)
        self.logits = own("logits", torch.float32, sizes.logit_rows, sizes.vocabulary)
        self.logits_at, self.picks_box, self.picks_flag = at("logits"), at("picks_box"), at("picks_flag")
        self.picks_sent = torch.zeros(1, dtype=torch.int32, device=device)
        # The long timeout: kernels are compiled at their first launch, which may take one rank longer than another.
        self.status = torch.tensor([0, _FIRST_WAIT], device=device)
        # No rank writes to another's memory before this is zero and mapped by all ranks.
        handle.barrier(timeout_ms=1000 * START_SECONDS)
        torch.cuda.synchronize(device)

    def start(self) -> None:
        """Shorten the timeout of waits. To be called once all kernels have been compiled."""
        self.status[1] = _WAIT
