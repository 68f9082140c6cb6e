"""What Gluon, in which the kernels for Hopper are written, calls differently from one version of Triton to the next."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
"""async_load(descriptor, coordinates, barrier, tile, pred=True): let the copy engine fetch a tile to shared memory. Triton 3.8
has renamed it."""

_HAS_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
"""Whether `reinterpret` of shared memory has no underscore before its name, as from Triton 3.9 on."""


@gluon.jit
def reinterpret(tiles, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """Shared memory, with the numbers that lie there in another shape and layout."""
    if _HAS_REINTERPRET:
        result = tiles.reinterpret(tiles.dtype, SHAPE, LAYOUT)
    else:
        result = tiles._reinterpret(tiles.dtype, SHAPE, LAYOUT)
    return result


@gluon.jit
def in_rows(tiles, COUNT: gl.constexpr, LENGTH: gl.constexpr):
    """Numbers in shared memory, in the order in which they lie there: [COUNT, LENGTH]."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return reinterpret(tiles, [COUNT, LENGTH], FLAT)
