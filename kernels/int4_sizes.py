"""Sizes of weights in 4 bits, see `linear.int4`. Does not import torch."""

GROUP = 128
"""Inputs that share a table."""
INT4_BYTES = 0.5 + 8 / GROUP
"""Bytes of a weight, with its share of a table of eight bytes."""
TILE_OUTS, TILE_INS = 64, 256
"""The outputs and the inputs of a tile, in which `codes.pack_codes` packs weights."""
