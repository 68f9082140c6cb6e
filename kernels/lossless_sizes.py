"""Sizes of weights in 12 bits, see `linear.lossless`. Free of torch."""

TILE_OUTS, TILE_INS = 64, 128
"""Of a tile that has a list of exceptions."""
ENTRIES = 32
"""Entries of a tile's list: the number of exceptions, and then these."""
LOSSLESS_BYTES = 1.5 + 4 * ENTRIES / (TILE_OUTS * TILE_INS)
"""Of a weight and its share of the lists of exceptions; each output has a float32 scale besides."""


def can_pack(outs: int, ins: int) -> bool:
    """Whether a weight [outs, ins] can be cut into whole tiles."""
    return outs % TILE_OUTS == 0 and ins % TILE_INS == 0
