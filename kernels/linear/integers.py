"""Weights as small integers with a scale and a zero point for each output of a group of inputs: what GPTQ and AWQ store."""

from dataclasses import dataclass

import torch
from torch import Tensor

from orthrus.kernels.linear.stored import float_type

WORD = 32
"""Bits of the integers that several numbers are packed into."""
_CHUNK = 1024
"""Outputs of a weight that are rounded at once: float32 copies of more would need much memory."""


@dataclass(frozen=True)
class Integers:
    """A weight [outs, ins]. The weight of output o and input i is (numbers[o, i] - zeros[g, o]) * scales[g, o], where g is the
    group of i."""

    bits: int
    """4 or 8."""
    numbers: Tensor
    """uint8 [outs, ins]."""
    zeros: Tensor
    """int16 [groups, outs]."""
    scales: Tensor
    """float [groups, outs]."""
    group_of: Tensor
    """int64 [ins]: the group of each input."""

    def dequantised(self) -> Tensor:
        """The weight in float32 or wider."""
        dtype = float_type(self.scales)
        zeros, scales = (t.to(dtype).index_select(0, self.group_of).T for t in (self.zeros, self.scales))
        return self.numbers.to(dtype).sub_(zeros).mul_(scales).contiguous()


def round_to_integers(weight: Tensor, bits: int, group_size: int) -> Integers:
    """weight [outs, ins] rounded to the nearest integers, symmetric around zero, with scales in float16.

    Raises ValueError if ins is not a multiple of `group_size`.
    """
    outs, ins = weight.shape
    if ins % group_size:
        raise ValueError(
            f"a weight with {ins} inputs can't be rounded to {bits} bits in groups of {group_size} inputs: the number of inputs "
            f"must be a multiple of {group_size}"
        )
    middle = 1 << (bits - 1)
    numbers = torch.empty((outs, ins), dtype=torch.uint8, device=weight.device)
    scales = torch.empty((ins // group_size, outs), dtype=torch.float16, device=weight.device)
    for begin in range(0, outs, _CHUNK):
        groups = weight[begin : begin + _CHUNK].float().unflatten(1, (-1, group_size))
        largest = groups.abs().amax(2)
        # Scales are kept in float16, so weights are divided by the rounded scale.
        own = (torch.where(largest > 0, largest, 1.0) / (middle - 1)).clamp(min=2.0**-24).half()
        rounded = (groups / own.float()[:, :, None]).round().clamp(-middle, middle - 1) + middle
        numbers[begin : begin + _CHUNK] = rounded.flatten(1)
        scales[:, begin : begin + _CHUNK] = own.T
    zeros = torch.full(scales.shape, middle, dtype=torch.int16, device=weight.device)
    return Integers(bits, numbers, zeros, scales, torch.arange(ins, device=weight.device) // group_size)


def unpack(words: Tensor, bits: int) -> Tensor:
    """The numbers in int32 words [n, m], the lowest bits first: uint8 [n, m * 32 / bits]."""
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=words.device)
    return ((words[:, :, None] >> shifts) & ((1 << bits) - 1)).to(torch.uint8).flatten(1)


def pack(numbers: Tensor, bits: int) -> Tensor:
    """The opposite of `unpack`."""
    parts = numbers.to(torch.int64).unflatten(1, (-1, WORD // bits))
    shifts = torch.arange(0, WORD, bits, device=numbers.device)
    return as_words((parts << shifts).sum(2))


def as_words(bits: Tensor) -> Tensor:
    """int64 numbers from 0 to 2**32 - 1 as int32 with the same 32 bits."""
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32)


def pack_words(numbers: Tensor) -> Tensor:
    """4-bit numbers uint8 [outs, ins] as int32 [outs, ins / 8], in the order in which the tensor cores read them from registers.

    Each run of 32 inputs is four words. Word q has the inputs 2q, 2q + 1, 8 + 2q, 8 + 2q + 1, and so on: those that one thread
    holds. The first of each two neighbours is in the low half of the word, and the second in the same bits of the high half.
    """
    outs = numbers.shape[0]
    # [outs, runs of 32, eights, word, neighbour]. The shift depends on the eight and on the neighbour.
    parts = numbers.view(outs, -1, 4, 4, 2).long()
    shifts = torch.arange(4, device=numbers.device)[:, None, None] * 4
    shifts = shifts + torch.tensor([0, 16], device=numbers.device)
    return as_words((parts << shifts).sum((2, 4))).flatten(1)
