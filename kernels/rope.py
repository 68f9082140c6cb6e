"""Rotary position embedding (Su et al., 2021) in the half-split layout that Qwen3 uses."""

from torch import Tensor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [rows, heads, head_dim] by per-row angles.

    cos [rows, 1, head_dim] repeats its first half; sin [rows, 1, head_dim] has its first half negated, which turns
    rotate_half into a swap of halves. Returns x's shape and dtype.
    """
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)
