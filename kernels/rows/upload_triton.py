"""Copying the plan of a pass by a kernel that reads the host's memory."""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit(do_not_specialize=["count"])
def _upload_kernel(source, target, count, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + place, tl.load(source + place, mask=place < count), mask=place < count)


def upload(source: Tensor, target: Tensor) -> None:
    """See `upload` (kernels/rows/upload). A GPU can read page-locked memory of the host by its address."""
    count = source.numel()
    _upload_kernel[(triton.cdiv(count, _BLOCK),)](source, target, count, BLOCK=_BLOCK)
