"""How the linear layers are cut up on a GPU: segments of the inputs, which decide the bits, and tiles, which do not."""

from functools import cache

import torch

from orthrus.kernels.linear.types import LinearTiles

SEGMENT_UNIT = 256
"""Segment lengths are multiples of this, and the depth of every tile divides it."""
_SHORTEST_SEGMENT = 1024
_MOST_SEGMENTS = 4
_FULL_GRID = 128
"""Programs that keep the memory of a GPU with 132 multiprocessors busy."""


@cache
def num_segments(out_features: int, in_features: int) -> int:
    """Segments of a layer whose result goes into the residual stream: enough to fill a GPU when there is one row."""
    segments = 1
    while (
        segments < _MOST_SEGMENTS
        and segments * -(-out_features // 64) < _FULL_GRID
        and in_features // (2 * segments) >= _SHORTEST_SEGMENT
    ):
        segments *= 2
    return segments


def choose_tiles(rows: int, out_features: int, segments: int, dtype: torch.dtype) -> LinearTiles:
    """The usual tiles of a launch. out_features: outputs of one view; in a gated layer those of gate and up together."""
    if dtype == torch.float32:
        # float32 is for checks only and does not use the matrix unit: the tile is small enough for registers.
        return LinearTiles(64, 16, 32, segments > 1, 4, 2)
    few = segments > 1
    if dtype == torch.float8_e4m3fn:
        return _fp8_tiles(rows, few)
    if rows <= 64:
        return LinearTiles(64, 16 if rows <= 16 else 32 if rows <= 32 else 64, 128, few, 4, 4)
    if rows <= 128:
        if out_features <= 8192:
            return (
                LinearTiles(64, 128, 64, True, 4, 6) if few else LinearTiles(64, 128, 128, warps=4, stages=4)
            )
        # So many programs fit a multiprocessor that all tiles of a gated layer run at once. The LM head has enough tiles anyway.
        return LinearTiles(64 if out_features <= 65536 else 128, 128, 64, few, 4, 3)
    if rows <= 256:
        if few:
            return LinearTiles(64, 128, 128, warps=4, stages=4)
        return LinearTiles(128, 128, 64, warps=4, stages=5 if out_features <= 65536 else 3)
    if few:
        return LinearTiles(128, 128, 64, warps=8, stages=4)
    if out_features > 65536:
        return LinearTiles(256, 128, 64, warps=8, stages=4)
    return LinearTiles(128, 256, 64, warps=8, stages=3)


def _fp8_tiles(rows: int, few: bool) -> LinearTiles:
    """Tiles for FP8. All steps are as deep as those of `hopper`, and each segment has programs of its own: both decide bits."""
    if rows <= 64:
        return LinearTiles(64, 16 if rows <= 16 else 32 if rows <= 32 else 64, 256, few, 4, 4)
    if rows <= 128:
        return LinearTiles(64, 128, 256, few, 4, 4)
    return LinearTiles(128, 128, 256, few, 8, 3)


def segment_length(in_features: int, segments: int) -> int:
    """Inputs of each segment but the last, which may have fewer."""
    return -(-in_features // (segments * SEGMENT_UNIT)) * SEGMENT_UNIT
