"""Weights as 4-bit codes. A code is a sign, and one of eight magnitudes from a table of the output's group of 128 inputs.

The magnitudes are e4m3 numbers. So a GPU widens codes by table lookups, eight codes in seven instructions, and multiplies them by
FP8 inputs. Since a table also holds the scale of its group, the tensor cores can add up a whole sum: only outputs have scales.

The tables are found by Lloyd's algorithm (S. Lloyd, "Least squares quantization in PCM", 1982): assign each weight to the nearest
magnitude, replace each magnitude by the mean of its weights, and repeat. The sum of squared errors is 0.0079 of the sum of
squared weights if these are normally distributed, and 0.0138 with 4-bit integers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from orthrus.kernels.int4_sizes import GROUP, TILE_INS, TILE_OUTS
from orthrus.kernels.linear.integers import as_words
from orthrus.kernels.rounding import LARGEST

_START = (0.6875, 2.0, 3.5, 5.0, 6.5, 8.0, 10.0, 13.0)
"""The magnitudes at the start of Lloyd's algorithm, in proportion: nearly the best ones for normally distributed weights."""
_SHARES = (1.0, 0.85)
"""At the start the largest magnitude is one of these shares of a group's largest weight. The better result is taken."""
_ROUNDS = 6
"""How often magnitudes are replaced by means."""
_CHUNK = 1024
"""Outputs of a weight that are rounded at once: float32 copies of more would need much memory."""


@dataclass(frozen=True)
class Codes:
    """A weight [outs, ins]. The magnitude of weight (o, i) is tables[o, i // 128, n] * scales[o], where n is its code's index."""

    codes: Tensor
    """uint8 [outs, ins]: the index in bits 0 to 2, the sign in bit 3."""
    tables: Tensor
    """e4m3 [outs, groups, 8], in ascending order."""
    scales: Tensor
    """float32 [outs]."""

    def dequantised(self) -> Tensor:
        """The weight in float32."""
        codes = self.codes.unflatten(1, (-1, GROUP)).long()
        sizes = self.tables.float().gather(2, codes & 7)
        return (torch.where(codes >= 8, -sizes, sizes) * self.scales[:, None, None]).flatten(1)


def round_to_codes(weight: Tensor) -> Codes:
    """weight [outs, ins] rounded to codes. Raises ValueError if ins is not a multiple of 128."""
    ins = weight.shape[1]
    if ins % GROUP:
        raise ValueError(
            f"a weight with {ins} inputs can't be rounded to 4 bits in groups of {GROUP} inputs: the number of inputs must be a "
            f"multiple of {GROUP}"
        )
    parts = [_round(part.float()) for part in weight.split(_CHUNK)]
    codes, tables, scales = zip(*parts, strict=True)
    return Codes(torch.cat(codes), torch.cat(tables).view(torch.float8_e4m3fn), torch.cat(scales))


def _round(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The codes of float32 weights, the bytes of their tables, and their scales."""
    # The largest weight of an output becomes the largest number of e4m3. An output of zeros has the smallest scale.
    scales = (weight.abs().amax(1) / LARGEST).clamp(min=2.0**-100)
    groups = (weight / scales[:, None]).unflatten(1, (-1, GROUP))
    sizes = groups.abs()
    # Of sorted sizes, each magnitude has a run. So a round needs only the ends of the runs, and the sums up to there.
    ordered = sizes.sort(2).values
    sums = pad(ordered.cumsum(2), (1, 0))
    best_tables, best_indices, best_error = _lloyd(sizes, ordered, sums, _SHARES[0])
    for share in _SHARES[1:]:
        tables, indices, error = _lloyd(sizes, ordered, sums, share)
        better = (error < best_error)[:, :, None]
        best_tables = torch.where(better, tables, best_tables)
        best_indices = torch.where(better, indices, best_indices)
        best_error = torch.minimum(error, best_error)
    codes = best_indices + 8 * (groups < 0)
    return codes.flatten(1).to(torch.uint8), _e4m3(best_tables).view(torch.uint8), scales


def _lloyd(sizes: Tensor, ordered: Tensor, sums: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Magnitudes [outs, groups, 8], the index of the nearest one for each size [outs, groups, 128], and each group's error.

    ordered: the sizes of each group, sorted. sums [outs, groups, 129]: those of the first 0 to 128 of them.
    """
    start = torch.tensor(_START, device=sizes.device) * (share / _START[-1])
    tables = _e4m3(ordered[:, :, -1:] * start).float()
    for _ in range(_ROUNDS):
        ends = pad(torch.searchsorted(ordered, _boundaries(tables)), (1, 0))
        ends = pad(ends, (0, 1), value=GROUP)
        counts = ends.diff(dim=2)
        means = sums.gather(2, ends).diff(dim=2) / counts.clamp(min=1)
        # Means are in ascending order, but for errors of the sums, because each is between the boundaries of its magnitude.
        tables = _e4m3(torch.where(counts > 0, means, tables)).float().sort(2).values
    indices = torch.searchsorted(_boundaries(tables), sizes)
    return tables, indices, (tables.gather(2, indices) - sizes).square().sum(2)


def _boundaries(tables: Tensor) -> Tensor:
    """Halfway between neighbouring magnitudes: [outs, groups, 7]."""
    return (tables[:, :, 1:] + tables[:, :, :-1]) / 2


def _e4m3(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn)


def pack_codes(codes: Tensor) -> Tensor:
    """Codes uint8 [outs, ins] as int32 [tiles * steps * 8, 256], in the order in which the threads of a consumer load them.

    outs is a multiple of 64, and ins one of 256. A tile of 64 outputs and 256 inputs is 2,048 words, and each word has eight
    inputs of one output. The places in a tile have these names:

    - Output 16 w + 8 h + r: warp w, half h of its outputs, output r of the half.
    - Input 128 g + 32 b + 16 f + 4 q + n: group g, run b of 32 inputs, half f of the run, quarter q of the half, input n of it.

    A word has the inputs of one g, b and q. Thread 4 r + q of warp w loads it from place [g, h, w, r, q, b]. After the lookup,
    the four inputs n of each f are one register.

    Bits 16 f + 4 n to 16 f + 4 n + 2 of a word are the index of an input. The other bits are signs. Those of f = 0 are where the
    bytes of a register have their signs; those of f = 1 are 4 bits lower.
    """
    steps = codes.shape[1] // TILE_INS
    parts = codes.view(-1, 4, 2, 8, steps, 2, 4, 2, 4, 4)  # [tile, w, h, r, step, g, b, f, q, n]
    parts = parts.permute(0, 4, 5, 2, 1, 3, 8, 6, 7, 9).long()  # [tile, step, g, h, w, r, q, b, f, n]
    shifts = 4 * torch.arange(8, device=codes.device).view(2, 4)
    signs = 8 * torch.arange(4, device=codes.device) + torch.tensor([[7], [3]], device=codes.device)
    return as_words((((parts & 7) << shifts) + ((parts >> 3) << signs)).sum((8, 9))).reshape(-1, TILE_INS)


def pack_tables(tables: Tensor) -> Tensor:
    """Tables e4m3 [outs, groups, 8] as int32 [tiles * steps, 256]: for each tile all first halves, and then all second halves.

    Both are in the order [g, h, w, r] of `pack_codes`.
    """
    steps = tables.shape[1] // 2
    parts = tables.view(torch.uint8).view(-1, 4, 2, 8, steps, 2, 2, 4)  # [tile, w, h, r, step, g, half, byte]
    return parts.permute(0, 4, 6, 5, 2, 1, 3, 7).contiguous().view(torch.int32).reshape(-1, 4 * TILE_OUTS)
