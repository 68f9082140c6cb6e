"""Weights as 4-bit codes. A code stands for one of 16 e4m3 numbers. Each output has a scale for each group of 128 inputs.

The values of 4-bit integers are evenly spaced. Weights are close to normally distributed, so values that are denser near zero
lose less: the sum of squared errors is 0.0084 of the sum of squared weights, and 0.0138 with integers. All values are e4m3
numbers. So a GPU widens codes by a table lookup, eight codes in seven instructions, and multiplies them by FP8 inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from orthrus.kernels.int4_sizes import GROUP
from orthrus.kernels.linear.integers import as_words

LEVELS = (0.6875, 2.0, 3.5, 5.0, 6.5, 8.0, 10.0, 13.0)
"""The magnitudes that codes stand for. Of all sets of e4m3 numbers they have the least squared error for normally distributed
weights, found by changing one at a time."""
_SHARES = (1.0, 0.9, 0.8)
"""The largest level stands for one of these shares of a group's largest weight. The share with the least error is taken."""
_CHUNK = 1024
"""Outputs of a weight that are rounded at once: float32 copies of more would need much memory."""


@dataclass(frozen=True)
class Codes:
    """A weight [outs, ins]. The weight of output o and input i is value(codes[o, i]) * scales[i // 128, o]."""

    codes: Tensor
    """uint8 [outs, ins]: the index in `LEVELS` in bits 0 to 2, the sign in bit 3."""
    scales: Tensor
    """float16 [ins / 128, outs]."""

    def dequantised(self) -> Tensor:
        """The weight in float32."""
        levels = torch.tensor(LEVELS, device=self.codes.device)
        values = torch.cat([levels, -levels])[self.codes.int()]
        return values.mul_(self.scales.float().T.repeat_interleave(GROUP, 1))


def round_to_codes(weight: Tensor) -> Codes:
    """weight [outs, ins] rounded to the nearest values. Raises ValueError if ins is not a multiple of 128."""
    outs, ins = weight.shape
    if ins % GROUP:
        raise ValueError(
            f"a weight with {ins} inputs can't be rounded to 4 bits in groups of {GROUP} inputs: the number of inputs must be a "
            f"multiple of {GROUP}"
        )
    codes = torch.empty((outs, ins), dtype=torch.uint8, device=weight.device)
    scales = torch.empty((ins // GROUP, outs), dtype=torch.float16, device=weight.device)
    for begin in range(0, outs, _CHUNK):
        part = weight[begin : begin + _CHUNK].float().unflatten(1, (-1, GROUP))
        own, best = _round(part)
        codes[begin : begin + _CHUNK] = own.flatten(1)
        scales[:, begin : begin + _CHUNK] = best.T
    return Codes(codes, scales)


def _round(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of float32 groups [outs, groups, 128], and their scales [outs, groups]."""
    sizes = weight.abs()
    largest = sizes.amax(2)
    tried = (_round_sizes(sizes, largest * (share / LEVELS[-1])) for share in _SHARES)
    indices, scales, error = next(tried)
    for other_indices, other_scales, other_error in tried:
        better = other_error < error
        indices = torch.where(better[:, :, None], other_indices, indices)
        scales = torch.where(better, other_scales, scales)
        error = torch.where(better, other_error, error)
    return indices + 8 * (weight < 0), scales


def _round_sizes(sizes: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round the magnitudes of float32 groups [outs, groups, 128] with scales near `wanted` [outs, groups].

    Returns indices in `LEVELS`, the scales, and the squared error of each group.
    """
    levels = torch.tensor(LEVELS, device=sizes.device)
    # Scales are kept in float16, so weights are divided by the rounded scale. A group of zeros has the smallest scale.
    scales = wanted.clamp(min=2.0**-24).half()
    spread = scales.float()[:, :, None]
    indices = torch.bucketize(sizes / spread, (levels[1:] + levels[:-1]) / 2, out_int32=True)
    return indices, scales, (levels[indices] * spread - sizes).square_().sum(2)


def pack_codes(codes: Tensor) -> Tensor:
    """Codes uint8 [outs, ins] as int32 [outs, ins / 8], in the order in which the tensor cores read them once they are widened.

    Each run of 32 inputs is four words. Word q has the inputs 4q to 4q + 3, and then 16 + 4q to 19 + 4q. Widened, each of these
    two fours is one register of a thread. Bits 4n to 4n + 2 of a word are the index in `LEVELS` of its number n. The other bits
    are signs. Those of the first four numbers are where the bytes of a register have their signs; the others are 4 bits lower.
    """
    # [outs, runs of 32, half, word, number]
    parts = codes.view(codes.shape[0], -1, 2, 4, 4).long()
    shifts = 4 * torch.arange(8, device=codes.device).view(2, 1, 4)
    signs = (
        8 * torch.arange(4, device=codes.device) + torch.tensor([7, 3], device=codes.device)[:, None, None]
    )
    return as_words((((parts & 7) << shifts) + ((parts >> 3) << signs)).sum((2, 4))).flatten(1)
