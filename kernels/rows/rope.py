"""Rotary position embedding (Su et al., 2021) in the half-split layout that Qwen3 uses."""

import torch
from torch import Tensor


def apply_rope(twice: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Rotate x by per-row angles into out, both [rows, heads, head_dim].

    twice [rows, heads, 2, head_dim], contiguous, holds x two times, so that x with its halves swapped is a view: from the middle
    of the first to the middle of the second. cos [rows, 1, head_dim] repeats its first half; sin [rows, 1, head_dim] has its
    first half negated, which turns rotate_half into that swap.
    """
    dim = twice.shape[-1]
    swapped = twice.view(*twice.shape[:2], 2 * dim).narrow(2, dim // 2, dim)
    torch.addcmul(twice[:, :, 0] * cos, swapped, sin, out=out)
