"""Rotary position embedding (Su et al., 2021) in the half-split layout that Qwen3 uses."""

import torch
from torch import Tensor


def apply_rope(twice: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Rotate x by each row's angles into out; both are [rows, heads, head_dim].

    twice [rows, heads, 2, head_dim], contiguous, holds x two times. So x with its halves swapped is a view of it, from the middle
    of the first copy to the middle of the second.
    cos [rows, 1, head_dim]: the second half repeats the first.
    sin [rows, 1, head_dim]: the second half repeats the first with the other sign, since `rotate_half` negates one half of x.
    """
    dim = twice.shape[-1]
    swapped = twice.view(*twice.shape[:2], 2 * dim).narrow(2, dim // 2, dim)
    torch.addcmul(twice[:, :, 0] * cos, swapped, sin, out=out)
