"""How kernels read `attention_work`'s list: the same for those in Triton and those in Gluon."""

import triton
import triton.language as tl


@triton.jit
def segment_start(index):
    """`attention_work.segment_start`."""
    near, middle = index * 128, 1024 + (index - 8) * 512
    far, farther = 8192 + (index - 22) * 1024, 32768 + (index - 46) * 2048
    return tl.where(index < 22, tl.where(index < 8, near, middle), tl.where(index < 46, far, farther))


@triton.jit
def load_item(item):
    """An item's numbers as a tuple, in the order of `attention_work.ITEM`, without the unused ones."""
    return (
        tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3), tl.load(item + 4), tl.load(item + 5),
        tl.load(item + 6), tl.load(item + 7), tl.load(item + 8), tl.load(item + 9), tl.load(item + 10), tl.load(item + 11),
    )  # fmt: skip
