"""Memory for a layer's results. Every layer reuses that of the previous one, and the GPU keeps it in its L2 cache.

With 64 rows, a layer of Qwen3-8B makes 9 MB of results, and each is soon read once or twice. Meanwhile hundreds of megabytes of
weights, keys and values are read, which would evict the results from the L2 cache. Writing them back to memory would take
bandwidth that reading needs. So a part of the L2 cache is set aside for them (CUDA C++ Programming Guide, "L2 Set-Aside Cache for
Persisting Accesses").
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
"""Enough for 64 rows of any Qwen3."""
_KEPT_SCRATCH = 8 << 20
"""Bytes of scratch memory, behind the results, that the L2 cache keeps too. One sequence with 32 rows writes 5 MB. Together this
is half of the L2 cache of an H100."""
_ALIGNMENT = 256


@dataclass
class _Workspace:
    memory: Tensor
    used: int = 0


_active: _Workspace | None = None


@contextmanager
def results_in(memory: Tensor) -> Iterator[None]:
    """Context in which `empty` and `scratch` allocate from `memory` (uint8) while there is room.

    Scratch memory begins at `BYTES`. Only one thread may be in it at a time.
    """
    global _active
    _active = _Workspace(memory)
    try:
        yield
    finally:
        _active = None


def start_layer() -> None:
    """Begin a layer, whose results overwrite those of the previous layer.

    Every layer makes the same results in the same order. The first may have one more before them, its rounded inputs. So a result
    is valid until the next layer makes the same one.
    """
    if _active is not None:
        _active.used = 0


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty` for a kernel's result. Inside `results_in` its memory is used, if the result fits."""
    if _active is not None:
        end = _active.used + math.prod(shape) * dtype.itemsize
        if end <= min(BYTES, _active.memory.numel()):
            result = _active.memory[_active.used : end].view(dtype).view(shape)
            _active.used = -(-end // _ALIGNMENT) * _ALIGNMENT
            return result
    return torch.empty(shape, dtype=dtype, device=device)


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty` for partial results. Inside `results_in` memory behind the results is used, if it fits.

    Every call gets the same memory. Only its beginning is kept in the L2 cache, so what the next kernel reads must come first.
    """
    if _active is not None:
        end = BYTES + math.prod(shape) * dtype.itemsize
        if end <= _active.memory.numel():
            return _active.memory[BYTES:end].view(dtype).view(shape)
    return torch.empty(shape, dtype=dtype, device=device)


@contextmanager
def kept_in_l2(memory: Tensor, stream: torch.cuda.Stream) -> Iterator[None]:
    """Context in which the L2 cache keeps what kernels of `stream` write to `memory`: results, and the first scratch memory.

    Graphs that are captured in it do the same when they run later. On a GPU that can't do this, it has no effect.
    """
    from cuda.bindings import driver  # Comes with torch for CUDA.

    limit = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_PERSISTING_L2_CACHE_SIZE
    _, most = driver.cuDeviceGetAttribute(limit, memory.device.index)
    size = min(memory.nbytes, BYTES + _KEPT_SCRATCH, most or 0)

    def window(size: int, kept: driver.CUaccessProperty) -> driver.CUresult:
        value = driver.CUstreamAttrValue()
        policy = driver.CUaccessPolicyWindow()
        policy.base_ptr, policy.num_bytes, policy.hitRatio = memory.data_ptr(), size, 1.0
        policy.hitProp, policy.missProp = kept, driver.CUaccessProperty.CU_ACCESS_PROPERTY_NORMAL
        value.accessPolicyWindow = policy
        attribute = driver.CUstreamAttrID.CU_LAUNCH_ATTRIBUTE_ACCESS_POLICY_WINDOW
        (result,) = driver.cuStreamSetAttribute(stream.cuda_stream, attribute, value)
        return result

    # The limit is not reset, because graphs need it when they run.
    (limited,) = driver.cuCtxSetLimit(driver.CUlimit.CU_LIMIT_PERSISTING_L2_CACHE_SIZE, size)
    set_up = window(size, driver.CUaccessProperty.CU_ACCESS_PROPERTY_PERSISTING)
    if (limited, set_up) != 2 * (driver.CUresult.CUDA_SUCCESS,):
        logger.info("a layer's results are not kept in the L2 cache: %s, %s", limited.name, set_up.name)
    try:
        yield
    finally:
        window(0, driver.CUaccessProperty.CU_ACCESS_PROPERTY_NORMAL)
