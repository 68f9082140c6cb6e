"""Names of Gluon that differ between versions of Triton, and views of shared memory. The kernels for Hopper are in Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
"""async_load(descriptor, coordinates, barrier, tile, pred=True): issue the TMA load of a tile into shared memory. Triton 3.8 has
renamed it."""

_HAS_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
"""Whether shared memory has a method `reinterpret`, as from Triton 3.9 on. Before, its name was `_reinterpret`."""


@gluon.jit
def reinterpret(tiles, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """A view of the same shared memory in another shape and layout."""
    if _HAS_REINTERPRET:
        result = tiles.reinterpret(tiles.dtype, SHAPE, LAYOUT)
    else:
        result = tiles._reinterpret(tiles.dtype, SHAPE, LAYOUT)
    return result


@gluon.jit
def in_rows(tiles, COUNT: gl.constexpr, LENGTH: gl.constexpr):
    """A view of shared memory in the order of its addresses, without swizzling: [COUNT, LENGTH]."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return reinterpret(tiles, [COUNT, LENGTH], FLAT)
