"""Sizes of weights in 4 bits, see `linear.int4`. Free of torch."""

GROUP = 128
"""Inputs that share a scale."""
INT4_BYTES = 0.5 + 2 / GROUP
"""Of a weight and its share of a float16 scale."""
