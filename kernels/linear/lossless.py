"""Lossless packing of bfloat16 weights in 12 bits: packing, unpacking, and which weights can be packed.

A trained weight uses few exponents. Each row of a weight (the inputs of one output) has a window of 15 exponents that begins at
its base. A weight in the window is kept as its sign, its exponent minus the base in 4 bits, and 7 bits of mantissa. The first 8
of these 12 bits are stored in one plane, and the last 4 in another. The first plane alone is an e4m3 number, so a draft pass can
read only that.

Kernels widen a weight to a number whose exponent is `EXPONENT` plus the 4 bits. At the end, they multiply the float32 sums of a
row by 2 ** (base - EXPONENT). A power of two only changes exponents, so the sums have the bits that the weights themselves give,
as long as no product and no sum leaves the exponents of float32. With bases from `LEAST_BASE` to `MOST_BASE` that can only happen
where products or sums are below 2 ** -66, or above 2 ** 67.

Weights outside their row's window are exceptions. Their values are kept in lists, in the scale of the sums, and kernels put them
in place. A weight with many exceptions, or with an infinite value, is not packed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from orthrus.kernels.linear.integers import as_words, pack_words, unpack
from orthrus.kernels.linear.types import DenseLayer, LosslessLayer
from orthrus.kernels.lossless_sizes import ENTRIES, TILE_INS, TILE_OUTS, can_pack

EXPONENT = 112
"""The exponent field of a widened weight whose 4 bits of exponent are 0. Widened weights are below 1."""
LEAST_BASE, MOST_BASE = EXPONENT - 60, EXPONENT + 60
MOST_EXCEPTIONS = ENTRIES - 1
"""The most exceptions of a tile."""
CODES = 15
"""Exponents in a window. The 16th code would make one of the bytes a NaN of e4m3."""
PLANE_SCALE = 1.04 * 2.0**-8
"""The numbers of the first plane times this are about the widened weights. These have exponents that are smaller by 8. The bits
of mantissa that the plane lacks are 4 % of a weight on average."""
_CHUNK = 16 * TILE_OUTS
"""Rows that are packed or unpacked at once. This bounds the memory that packing needs."""


class NotPacked(ValueError):
    """A weight can't be kept in 12 bits; the message says why."""


@dataclass(frozen=True)
class _Rows:
    """Some rows of a `LosslessLayer`. bases: int64 [rows]."""

    high: Tensor
    low: Tensor
    exceptions: Tensor
    bases: Tensor


def _check_shape(outs: int, ins: int) -> None:
    if not can_pack(outs, ins):
        raise NotPacked(
            f"its shape is [{outs}, {ins}]: {TILE_OUTS} must divide its outputs and {TILE_INS} its inputs"
        )


def pack_lossless(layer: DenseLayer) -> LosslessLayer:
    """Pack a layer of bfloat16 weights in 12 bits, on their device. Raises NotPacked if a view's weight can't be packed."""
    outs, ins = layer.weights[0].shape
    for weight in layer.weights:
        if weight.dtype != torch.bfloat16:
            raise NotPacked(f"its dtype is {weight.dtype}, not bfloat16")
    _check_shape(outs, ins)
    rows, device = outs * len(layer.weights), layer.weights[0].device
    high, low, exceptions = (
        torch.empty(shape, dtype=torch.int32, device=device)
        for shape in ((rows, ins // 4), (rows, ins // 8), (rows // TILE_OUTS, ins // TILE_INS, ENTRIES))
    )
    bases = torch.empty(rows, dtype=torch.int64, device=device)
    for view, weight in enumerate(layer.weights):
        for begin in range(0, outs, _CHUNK):
            part = _pack_rows(weight[begin : begin + _CHUNK])
            first = view * outs + begin
            end = first + part.high.shape[0]
            high[first:end], low[first:end], bases[first:end] = part.high, part.low, part.bases
            exceptions[first // TILE_OUTS : end // TILE_OUTS] = part.exceptions
    scales = _power_of_two(bases - EXPONENT)
    return LosslessLayer(high, low, exceptions, scales.view(-1, outs), layer.bias, layer.interleaved)


def unpack_lossless(layer: LosslessLayer) -> DenseLayer:
    """The opposite of `pack_lossless`."""
    rows, ins = layer.high.shape[0], layer.high.shape[1] * 4
    bases = (layer.scales.flatten().view(torch.int32).long() >> 23) - 127 + EXPONENT
    weight = torch.empty(rows, ins, dtype=torch.bfloat16, device=layer.high.device)
    for begin in range(0, rows, _CHUNK):
        end = begin + _CHUNK
        tiles = slice(begin // TILE_OUTS, end // TILE_OUTS)
        weight[begin:end] = _unpack_rows(
            _Rows(layer.high[begin:end], layer.low[begin:end], layer.exceptions[tiles], bases[begin:end])
        )
    return DenseLayer(weight.view(-1, layer.outs, ins).unbind(), layer.bias, layer.interleaved)


def high_bytes(high: Tensor) -> Tensor:
    """The words of the first plane, int32 [rows, ins / 4], as bytes in the order of the inputs: uint8 [rows, ins]."""
    # In the order of the memory: [rows, runs of 16, word, neighbour, run of 8, of which the second comes first].
    parts = high.contiguous().view(torch.uint8).view(high.shape[0], -1, 4, 2, 2)
    return parts.flip(4).permute(0, 1, 4, 2, 3).flatten(1)


def first_plane(layer: LosslessLayer) -> Tensor:
    """The approximation of the weights that a draft pass multiplies by: float32 [views, outs, ins]."""
    numbers = high_bytes(layer.high).view(torch.float8_e4m3fn).float()
    return numbers.view(*layer.scales.shape, -1) * (layer.scales * PLANE_SCALE)[..., None]


def _high_words(numbers: Tensor) -> Tensor:
    """The opposite of `high_bytes`."""
    parts = numbers.view(numbers.shape[0], -1, 2, 4, 2).permute(0, 1, 3, 4, 2).flip(4)
    return parts.flatten(1).view(torch.int32)


def _pack_rows(weight: Tensor) -> _Rows:
    bits = weight.contiguous().view(torch.int16).int() & 0xFFFF
    exponents = bits >> 7 & 255
    if bool((exponents == 255).any()):
        raise NotPacked("it has values that are NaN or infinite")
    bases = _bases(exponents)
    codes = exponents - bases[:, None]
    outside = (codes < 0) | (codes >= CODES)
    # A draft pass reads no exceptions. In the first plane each is the nearest number that it can hold.
    mantissas = torch.where(codes >= CODES, 127, torch.where(codes < 0, 0, bits & 127))
    codes = codes.clamp(0, CODES - 1)
    high = bits >> 15 << 7 | codes << 3 | mantissas >> 4
    exceptions = _exceptions(weight, outside, bases)
    return _Rows(_high_words(high.byte()), pack_words((mantissas & 15).byte()), exceptions, bases.long())


def _bases(exponents: Tensor) -> Tensor:
    """For each row, the base whose window holds the most exponents; the smallest of equal ones: int32 [rows]."""
    counts = exponents.new_zeros(exponents.shape[0], 257)
    counts.scatter_add_(1, exponents.long() + 1, torch.ones_like(exponents))
    below = counts.cumsum(1)
    bases = torch.arange(LEAST_BASE, MOST_BASE + 1, device=exponents.device)
    inside = below.index_select(1, bases + CODES) - below.index_select(1, bases)
    return bases[(inside * 256 - bases).argmax(1)].int()


def _exceptions(weight: Tensor, outside: Tensor, bases: Tensor) -> Tensor:
    """The lists of exceptions: int32 [rows / 64, ins / 128, 32]. Raises NotPacked if a list is full or can't hold a value."""
    row, column = outside.nonzero(as_tuple=True)
    exact = weight[row, column].double()
    scaled = exact * _power_of_two(EXPONENT - bases[row])
    kept = scaled.bfloat16()
    found = lists_of(Exceptions(row, column, kept.view(torch.int16).long() & 0xFFFF), *weight.shape)
    normal = (kept.view(torch.int16) & 0x7F80) != 0
    if not bool(((kept.double() == scaled) & kept.isfinite() & (normal | (exact == 0))).all()):
        raise NotPacked("it has values that are too small or too large beside the others of their row")
    return found


@dataclass(frozen=True)
class Exceptions:
    """Weights that the planes do not hold: int64 [number of them] each."""

    row: Tensor
    column: Tensor
    bits: Tensor
    """The 16 bits of the value that kernels take."""


def lists_of(exceptions: Exceptions, rows: int, ins: int) -> Tensor:
    """The lists of a weight [rows, ins]: int32 [rows / 64, ins / 128, 32]. Raises NotPacked if a list is full."""
    steps = ins // TILE_INS
    row, column = exceptions.row, exceptions.column
    tile = row // TILE_OUTS * steps + column // TILE_INS
    index = row % TILE_OUTS * TILE_INS + column % TILE_INS
    order = (tile * (TILE_OUTS * TILE_INS) + index).argsort()
    tiles = rows // TILE_OUTS * steps
    counts = torch.bincount(tile, minlength=tiles)
    most = int(counts.max())
    if most > MOST_EXCEPTIONS:
        raise NotPacked(
            f"{most} of the {TILE_OUTS * TILE_INS} weights of a tile are outside the {CODES} exponents that a row holds; "
            f"there is room for {MOST_EXCEPTIONS}"
        )
    entries = torch.zeros(tiles, ENTRIES, dtype=torch.int64, device=row.device)
    entries[:, 0] = counts
    tile, first = tile[order], counts.cumsum(0) - counts
    number = torch.arange(tile.shape[0], device=row.device) - first[tile]
    entries[tile, number + 1] = exceptions.bits[order] << 16 | index[order]
    return as_words(entries).view(-1, steps, ENTRIES)


def exceptions_in(lists: Tensor) -> Exceptions:
    """The opposite of `lists_of`."""
    numbers = torch.arange(1, MOST_EXCEPTIONS + 1, device=lists.device)
    tile, step, number = (numbers <= lists[..., :1]).nonzero(as_tuple=True)
    entries = lists[tile, step, number + 1].long()
    index = entries & (TILE_OUTS * TILE_INS - 1)
    row, column = tile * TILE_OUTS + index // TILE_INS, step * TILE_INS + index % TILE_INS
    return Exceptions(row, column, entries >> 16 & 0xFFFF)


def _unpack_rows(rows: _Rows) -> Tensor:
    """The weights of the rows: bfloat16 [rows, ins]."""
    numbers = high_bytes(rows.high).int()
    # In the order of the memory: [rows, runs of 32, word, neighbour, run of 8].
    nibbles = unpack(rows.low, 4).view(rows.low.shape[0], -1, 4, 2, 4).permute(0, 1, 4, 2, 3).flatten(1)
    exponents = (numbers >> 3 & 15) + rows.bases[:, None].int()
    bits = numbers >> 7 << 15 | exponents << 7 | (numbers & 7) << 4 | nibbles
    weight = bits.short().view(torch.bfloat16)
    found = exceptions_in(rows.exceptions)
    kept = found.bits.short().view(torch.bfloat16).double()
    exact = kept * _power_of_two(rows.bases[found.row] - EXPONENT)
    weight[found.row, found.column] = exact.bfloat16()
    return weight


def _power_of_two(exponents: Tensor) -> Tensor:
    """2 ** exponents, which are at least -126 and at most 127, as float32. Set as bits: a GPU's `pow` need not be exact."""
    return (exponents + 127 << 23).int().view(torch.float32)
