"""Where kernels put a layer's results: over those of the layer before, in memory that a GPU keeps in its L2 cache.

With 64 rows, a layer of Qwen3-8B makes 9 MB of results, each of which is soon read, once or twice. The hundreds of megabytes of
weights, keys and values that are read meanwhile push them out of the L2 cache, and writing them to memory costs time for
reading. So a part of the cache is set aside for them (CUDA C++ Programming Guide, "L2 Set-Aside Cache for Persisting
Accesses").
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

BYTES = 16 << 20
"""Enough for 64 rows of any Qwen3, a third of the L2 cache of an H100."""
_ALIGNMENT = 256


@dataclass
class _Workspace:
    memory: Tensor
    used: int = 0


_active: _Workspace | None = None


@contextmanager
def results_in(memory: Tensor) -> Iterator[None]:
    """Inside it, kernels take room for their results from `memory` (uint8), as far as that goes. For one thread at a time."""
    global _active
    _active = _Workspace(memory)
    try:
        yield
    finally:
        _active = None


def start_layer() -> None:
    """The results that follow go where those of the layer before are, which makes the same ones.

    Each of these may be read until the same result is made anew.
    """
    if _active is not None:
        _active.used = 0


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty` for a kernel's result."""
    if _active is not None:
        end = _active.used + math.prod(shape) * dtype.itemsize
        if end <= _active.memory.numel():
            result = _active.memory[_active.used : end].view(dtype).view(shape)
            _active.used = -(-end // _ALIGNMENT) * _ALIGNMENT
            return result
    return torch.empty(shape, dtype=dtype, device=device)


@contextmanager
def kept_in_l2(memory: Tensor, stream: torch.cuda.Stream) -> Iterator[None]:
    """Inside it, what kernels of `stream` keep in `memory` stays in the L2 cache; so it does whenever a graph captured here runs.

    Where a GPU can't do that, nothing changes.
    """
    from cuda.bindings import driver  # Comes with torch for CUDA.

    def window(size: int, kept: driver.CUaccessProperty) -> driver.CUresult:
        value = driver.CUstreamAttrValue()
        policy = driver.CUaccessPolicyWindow()
        policy.base_ptr, policy.num_bytes, policy.hitRatio = memory.data_ptr(), size, 1.0
        policy.hitProp, policy.missProp = kept, driver.CUaccessProperty.CU_ACCESS_PROPERTY_NORMAL
        value.accessPolicyWindow = policy
        attribute = driver.CUstreamAttrID.CU_LAUNCH_ATTRIBUTE_ACCESS_POLICY_WINDOW
        (result,) = driver.cuStreamSetAttribute(stream.cuda_stream, attribute, value)
        return result

    # Stays set: graphs need it when they run.
    (limited,) = driver.cuCtxSetLimit(driver.CUlimit.CU_LIMIT_PERSISTING_L2_CACHE_SIZE, memory.nbytes)
    set_up = window(memory.nbytes, driver.CUaccessProperty.CU_ACCESS_PROPERTY_PERSISTING)
    if (limited, set_up) != 2 * (driver.CUresult.CUDA_SUCCESS,):
        logger.info("a layer's results are not kept in the L2 cache: %s, %s", limited.name, set_up.name)
    try:
        yield
    finally:
        window(0, driver.CUaccessProperty.CU_ACCESS_PROPERTY_NORMAL)
