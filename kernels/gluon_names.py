"""What Gluon, in which the kernels for Hopper are written, calls differently from one version of Triton to the next."""

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
"""async_load(descriptor, coordinates, barrier, tile, pred=True): let the copy engine fetch a tile to shared memory. Triton 3.8
has renamed it."""

HAS_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
"""Whether `reinterpret` of shared memory has no underscore before its name, as from Triton 3.9 on."""
