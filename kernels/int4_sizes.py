"""Sizes of weights in 4 bits, see `linear.int4`. Does not import torch."""

GROUP = 128
"""Inputs that share a scale."""
INT4_BYTES = 0.5 + 2 / GROUP
"""Bytes of a weight, with its share of a float16 scale."""
