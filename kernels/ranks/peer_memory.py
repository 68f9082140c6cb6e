"""`PeerMemory`: memory of each rank's GPU that the GPUs of all ranks read and write, over NVLink or PCIe.

PyTorch's symmetric memory allocates it. What ranks exchange in a pass are one-shot writes by our own kernels
(`peer_triton`): each rank writes to the boxes of all ranks and raises a flag there, for each row. Every row has two sets of
boxes, used in turn, and counts its exchanges. A rank begins one only after it has finished the one before it, for which all
others have begun that one. So nobody still reads what it overwrites.
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

_FIRST_WAIT, _WAIT = 120_000_000_000, 3_000_000_000
"""For how many nanoseconds a rank is waited for, until all kernels have been compiled and after that."""


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
    """What one rank knows of the ranks' memory. To make one, all ranks have to do so at the same time."""

    sums: Mailbox
    """For partial sums, float32."""
    best: Mailbox
    """For each rank's best token of a row, and its score."""
    logits: Tensor
    """float32 [logit_rows, vocabulary] on this rank. Those of rank 0 hold all ranks' logits after a pass."""
    status: Tensor
    """int64 [2] on this rank: 0, or 1 + a rank that has been waited for in vain; and for how many nanoseconds ranks are waited
    for."""

    def __init__(self, rank: int, size: int, device: torch.device, store_file: str, sizes: PeerSizes) -> None:
        """store_file: through it the ranks find each other; no file may be there at first."""
        from torch._C import _distributed_c10d as c10d

        # Programs that use NVLink multicast can put a host's GPUs out of service.
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        self.rank, self.size, self.sizes = rank, size, sizes
        places, end = sizes.layout(size)
        torch.cuda.set_device(device)
        # PyTorch holds no reference to a group that it finds by its name. Each engine has a file, and so a name, of its own.
        group: Any = store_file
        store = c10d.FileStore(store_file, size)
        store.set_timeout(timedelta(seconds=START_SECONDS))
        self._group = c10d.ProcessGroup(store, rank, size)
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
        # Kernels are compiled when they are first launched, which may take one rank longer than another.
        self.status = torch.tensor([0, _FIRST_WAIT], device=device)
        # Nobody writes to a rank's memory before it is zero and all ranks have it.
        handle.barrier(timeout_ms=1000 * START_SECONDS)
        torch.cuda.synchronize(device)

    def start(self) -> None:
        """All kernels have run once: from now on a rank is not waited for any longer than it takes to tell that it has failed."""
        self.status[1] = _WAIT
