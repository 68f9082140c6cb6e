"""How a layer takes its inputs if it multiplies in FP8. The kernel before it stores them so, which saves a kernel that rounds.

The inputs are multiplied by a fixed factor, which is known before the pass, and stored in e4m3. A scale for each row, made from
its largest number, would need the whole row before any of it can be stored. e4m3 has 3 bits of mantissa for numbers from 2**-6 to
448, so a factor need not be near the best one (see `orthrus.models.factors`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 448.0
"""The largest number of e4m3."""


@dataclass(frozen=True)
class Rounding:
    """How the inputs of a layer are rounded."""

    factor: float | None
    """They are stored as e4m3 numbers of so many times their size: a power of two. None: as `RoundedGroups`, with a scale for
    each 128 inputs of a row. Only `add_rms_norm` stores these; other kernels leave the rows as they are."""
    words: bool = False
    """Whether the numbers of a row are stored in the order of the words of `LosslessLayer.high`."""


def stored_as(rounding: Rounding | None) -> tuple[float, bool]:
    """The arguments of kernels for a fixed rounding: the factor, and whether the order is that of words."""
    return (1.0, False) if rounding is None else (rounding.factor or 1.0, rounding.words)


def is_fixed(rounding: Rounding | None) -> bool:
    """Whether rows are to be stored as e4m3 numbers with a fixed factor."""
    return rounding is not None and rounding.factor is not None


def rounded(x: Tensor, rounding: Rounding | None) -> Tensor:
    """Rows x [rows, width] as a layer with this rounding takes them, in plain PyTorch: e4m3, or x if the factor is not fixed.

    Numbers that are too large become the largest, as on a GPU.
    """
    if rounding is None or rounding.factor is None or x.dtype == torch.float8_e4m3fn:
        return x
    numbers = (x * rounding.factor).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return numbers[:, word_order(x.shape[1], x.device)] if rounding.words else numbers


def word_order(width: int, device: torch.device) -> Tensor:
    """The input at each place of a row in the order of words: int64 [width].

    It is that of the bytes in `LosslessLayer.high`: of each 16 inputs, word q has the inputs 8 + 2q, 2q, 9 + 2q and 2q + 1.
    """
    place = torch.arange(width, device=device)
    return place // 16 * 16 + 8 * (1 - place % 2) + place % 16 // 4 * 2 + place % 4 // 2
