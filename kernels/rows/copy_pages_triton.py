"""Copying pages of the KV cache on a GPU: a program for each page, cache and KV head."""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


@triton.jit(do_not_specialize=["pages"])
def _copy_kernel(addresses, copies, heads, pages, page_size, POSITION: tl.constexpr, BLOCK: tl.constexpr):
    """Sizes are in units of 4 bytes. POSITION: size of one position of one head."""
    copy, part = copies + tl.program_id(0) * 3, tl.program_id(1)
    source, target, positions = tl.load(copy), tl.load(copy + 1), tl.load(copy + 2)
    cache = tl.load(addresses + part // heads).to(tl.pointer_type(tl.int32))
    first = (part % heads).to(tl.int64) * pages
    origin = tl.multiple_of(cache + (first + source) * page_size * POSITION, 16)
    goal = tl.multiple_of(cache + (first + target) * page_size * POSITION, 16)
    size = positions * POSITION
    for at in range(0, size, BLOCK):
        place = at + tl.arange(0, BLOCK)
        # Whole positions are copied: each is a multiple of 16 bytes.
        inside = tl.max_constancy(place < size, 4)
        tl.store(goal + place, tl.load(origin + place, mask=inside), mask=inside)


def copy_pages(cache: Tensor, addresses: Tensor, copies: Tensor, count: int) -> None:
    """See `copy_pages` (kernels/rows/copy_pages). cache: any of the caches."""
    heads, pages, page_size, dim = cache.shape
    grid = (count, addresses.numel() * heads)
    position = dim * cache.itemsize // 4
    _copy_kernel[grid](
        addresses, copies, heads, pages, page_size, POSITION=position, BLOCK=_BLOCK, num_warps=8
    )
