"""The tiles of the linear layers on a GPU. Only `leaf_unit`, with the leaves of a layer, decides bits, and in FP8 `split` too."""

from functools import cache

import torch

from orthrus.kernels.linear.types import LinearTiles

MOST_PARTS = 4
"""The most split-K parts of a layer. `add_rms_norm`, which adds the parts, takes no more."""
SHORTEST_PART = 1024
"""The fewest inputs of a part."""
SMS = 132
"""SMs of an H100 or H200."""
_FULL_GRID = 128
"""Programs that keep the memory of a GPU with 132 SMs busy."""


@cache
def num_parts(out_features: int, in_features: int, unit: int = 1) -> int:
    """Split-K parts of a layer whose result goes into the residual stream: enough to fill a GPU when there is one row.

    unit: each of several parts has a multiple of this number of inputs.
    """
    parts = 1
    while (
        parts < MOST_PARTS
        and parts * -(-out_features // 64) < _FULL_GRID
        and in_features // (2 * parts) >= SHORTEST_PART
        and in_features % (2 * parts * unit) == 0
    ):
        parts *= 2
    return parts


def rows_of_tile(rows: int, *sizes: int) -> int:
    """The first of these ascending sizes that is at least `rows`; the last if none is."""
    return next((size for size in sizes if rows <= size), sizes[-1])


def choose_tiles(rows: int, out_features: int, leaves: int, dtype: torch.dtype) -> LinearTiles:
    """The usual tiles of a launch. out_features: outputs of one view; in a gated layer those of gate and up together.

    leaves: number of leaves of the inputs.
    """
    if dtype == torch.float32:
        # float32 is for checks only, and does not use the tensor cores. The tile is small enough for registers.
        return LinearTiles(64, 16, 32, leaves > 1, 4, 2)
    few = leaves > 1
    if dtype == torch.float8_e4m3fn:
        return _fp8_tiles(rows, few)
    if rows <= 64:
        return LinearTiles(64, rows_of_tile(rows, 16, 32, 64), 128, few, 4, 4)
    if rows <= 128:
        if out_features <= 8192:
            return (
                LinearTiles(64, 128, 64, True, 4, 6) if few else LinearTiles(64, 128, 128, warps=4, stages=4)
            )
        # So many programs fit on an SM that all tiles of a gated layer run in one wave. The LM head has enough tiles anyway.
        return LinearTiles(64 if out_features <= 65536 else 128, 128, 64, few, 4, 3)
    if rows <= 256:
        if few:
            return LinearTiles(64, 128, 128, warps=4, stages=4)
        return LinearTiles(128, 128, 64, warps=4, stages=5 if out_features <= 65536 else 3)
    if few:
        return LinearTiles(128, 128, 64, warps=8, stages=4)
    if out_features > 65536:
        return LinearTiles(256, 128, 64, warps=8, stages=4)
    # A tile of 256 rows takes about as long as two of 128. But all SMs may be done sooner with small ones.
    if _rounds(rows, out_features, 128) < 2 * _rounds(rows, out_features, 256):
        return LinearTiles(128, 128, 64, warps=8, stages=4)
    return LinearTiles(128, 256, 64, warps=8, stages=3)


def _rounds(rows: int, out_features: int, tile_rows: int) -> int:
    """The most tiles of 128 outputs and `tile_rows` rows that an SM computes, one after the other."""
    return -(-(-(-out_features // 128) * -(-rows // tile_rows)) // SMS)


def _fp8_tiles(rows: int, few: bool) -> LinearTiles:
    """Tiles for FP8. All have a part for each leaf, because each part is multiplied by the scales before the parts are added."""
    if rows <= 128:
        return LinearTiles(64, rows_of_tile(rows, 16, 32, 64, 128), 256, few, 4, 4)
    if rows <= 256:
        return LinearTiles(64, 256, 128, few, 4, 5)
    return LinearTiles(128, 256, 128, few, 8, 4)


def leaf_unit(dtype: torch.dtype) -> int:
    """Leaves begin at multiples of this number of inputs: the depth of `hopper`'s steps. The depth of every tile divides it."""
    return 256 if dtype == torch.float8_e4m3fn else 128
