"""Sizes of weights in 12 bits, see `linear.lossless`. Does not import torch."""

TILE_OUTS, TILE_INS = 64, 128
"""Outputs and inputs of a tile. Each tile has a list of exceptions."""
ENTRIES = 32
"""int32 entries of a tile's list: the number of exceptions, and then the exceptions."""
LOSSLESS_BYTES = 1.5 + 4 * ENTRIES / (TILE_OUTS * TILE_INS)
"""Bytes of a weight, with its share of the lists of exceptions. In addition, each output has a float32 scale."""


def can_pack(outs: int, ins: int) -> bool:
    """Whether a weight [outs, ins] can be cut into whole tiles."""
    return outs % TILE_OUTS == 0 and ins % TILE_INS == 0
