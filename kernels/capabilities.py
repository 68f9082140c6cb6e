"""What the tensor cores of a GPU can do, by its compute capability. Does not import torch."""

Capability = tuple[int, int]
"""The compute capability of a GPU: (9, 0) is Hopper."""


def multiplies_fp8(capability: Capability) -> bool:
    """Whether the tensor cores multiply FP8 numbers (e4m3)."""
    return capability >= (8, 9)


def has_wgmma(capability: Capability) -> bool:
    """Whether it has Hopper's warpgroup MMA (wgmma). Later GPUs have other instructions instead."""
    return capability[0] == 9
