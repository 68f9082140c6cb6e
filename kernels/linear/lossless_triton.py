"""Weights in 12 bits (see `lossless`) in the linear kernel of `triton`: widening, and putting the exceptions in place."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from orthrus.kernels.device import chaining
from orthrus.kernels.linear.tiles import rows_of_tile
from orthrus.kernels.linear.types import DenseLayer, LinearTiles, LosslessLayer


@triton.jit
def _widen(high, low, OUTS: tl.constexpr, DEPTH: tl.constexpr):
    """The words of both planes as bfloat16 weights, two neighbouring inputs in an int32: [OUTS, DEPTH / 2]."""
    half = tl.arange(0, 2)
    # [outs, runs of 32, half of the run, run of 8 in the half, word]: with the neighbours, this is the order of the inputs.
    upper = tl.reshape(high, (OUTS, DEPTH // 32, 2, 1, 4)) >> tl.reshape(8 - 8 * half, (1, 1, 1, 2, 1))
    shifts = tl.reshape(8 * half, (1, 1, 2, 1, 1)) + tl.reshape(4 * half, (1, 1, 1, 2, 1))
    nibbles = (tl.reshape(low, (OUTS, DEPTH // 32, 1, 1, 4)) >> shifts) & 0x000F000F
    # The sign is shifted by 8 bits, and exponent and upper mantissa by 4. `lossless.EXPONENT` is added to the exponent.
    pairs = ((upper & 0x00800080) << 8) | (((upper & 0x007F007F) << 4) + 0x38003800) | nibbles
    return tl.reshape(pairs, (OUTS, DEPTH // 2))


@triton.jit
def _put(pairs, index, entry, live):
    """Put one exception in place in `pairs`, if it is `live`. index: the index of each pair in the tile."""
    target = entry & 0xFFFF
    odd = target & 1
    others = tl.where(odd == 1, 0xFFFF, -0x10000)
    here = index == tl.where(live, target >> 1, -1)
    value = tl.where(odd == 1, entry & -0x10000, (entry >> 16) & 0xFFFF)
    return tl.where(here, (pairs & others) | value, pairs)


@triton.jit
def sum_lossless(
    high, low, lists, x, out_at, row_at, begin, end, steps,
    OUTS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """See `triton._sum`. The weights are 2 ** (EXPONENT - base) times those of the layer.

    lists: the lists of exceptions. steps: number of tiles along the inputs. A tile [OUTS, DEPTH] is one that has a list.
    """
    tl.static_assert(OUTS == 64 and DEPTH == 128)
    total = tl.zeros((OUTS, ROWS), tl.float32)
    index = tl.arange(0, OUTS)[:, None] * (DEPTH // 2) + tl.arange(0, DEPTH // 2)[None, :]
    lists += out_at // OUTS * steps * 32
    last = steps - 1
    # The number of exceptions and the first two are loaded one step ahead, to hide the latency. Few tiles have more. Exceptions
    # are unrolled, because Triton does not pipeline a loop that contains another loop.
    entries = lists + min(begin // DEPTH, last) * 32
    count, one, two = tl.load(entries), tl.load(entries + 1), tl.load(entries + 2)
    for k in range(begin, end, DEPTH):
        pairs = _widen(high.load([out_at, k // 4]), low.load([out_at, k // 8]), OUTS, DEPTH)
        entries = lists + k // DEPTH * 32
        if count > 0:
            pairs = _put(pairs, index, one, True)
            pairs = _put(pairs, index, two, count > 1)
        if count > 2:
            for number in tl.static_range(3, 9):
                pairs = _put(pairs, index, tl.load(entries + number), count >= number)
        if count > 8:
            for number in tl.static_range(9, 32):
                pairs = _put(pairs, index, tl.load(entries + number), count >= number)
        entries = lists + min(k // DEPTH + 1, last) * 32
        count, one, two = tl.load(entries), tl.load(entries + 1), tl.load(entries + 2)
        bits = tl.reshape(tl.join(pairs & 0xFFFF, (pairs >> 16) & 0xFFFF), (OUTS, DEPTH))
        rows = x.load([row_at, k])
        if rows.dtype == tl.float32:
            weights = (bits << 16).to(tl.float32, bitcast=True)
        else:
            weights = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        total = tl.dot(weights, rows.T, total, input_precision="ieee")
    return total


def lossless_tiles(rows: int, leaves: int) -> LinearTiles:
    """The usual tiles. Outputs and depth are those of the lists of exceptions. leaves: number of leaves of the layer's sum."""
    return LinearTiles(64, rows_of_tile(rows, 16, 32, 64, 128), 128, leaves > 1 and rows <= 128)


@triton.jit
def _exponent(power):
    """The exponent of a power of two."""
    return (power.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def _scaled(bits, exponent):
    """The bits of a bfloat16 number times 2 ** exponent: int16. The number is normal or zero; the result may be subnormal."""
    magnitude = bits & 0x7FFF
    field = (magnitude >> 7) + exponent
    normal = magnitude + (exponent << 7)
    subnormal = ((magnitude & 0x7F) | 0x80) >> tl.minimum(tl.maximum(1 - field, 0), 31)
    scaled = tl.where(magnitude == 0, 0, tl.where(field > 0, normal, subnormal))
    return ((bits & 0x8000) | scaled).to(tl.int16)


@triton.jit
def _widen_kernel(
    high, low, exceptions, scales, pairs_out, out, ins,
    OUTS: tl.constexpr, DEPTH: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    steps = ins // DEPTH
    out_at, k = tl.program_id(0) // steps * OUTS, tl.program_id(0) % steps * DEPTH
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    index = (out_at + tl.arange(0, OUTS)).to(tl.int64)[:, None]
    upper = tl.load(high + index * (ins // 4) + k // 4 + tl.arange(0, DEPTH // 4)[None, :])
    lower = tl.load(low + index * (ins // 8) + k // 8 + tl.arange(0, DEPTH // 8)[None, :])
    # From the scale of the sums to that of the layer, by adding to the exponents of both neighbours.
    pairs = _widen(upper, lower, OUTS, DEPTH) + _exponent(tl.load(scales + index)) * 0x00800080
    tl.store(pairs_out + index * (ins // 2) + k // 2 + tl.arange(0, DEPTH // 2)[None, :], pairs)
    tl.debug_barrier()  # The exceptions are written over what is there.
    number = tl.arange(0, 32)
    entries = exceptions + tl.program_id(0) * 32
    entry = tl.load(entries + number)
    row, column = (entry & 0xFFFF) // DEPTH, entry & (DEPTH - 1)
    live = (number > 0) & (number <= tl.load(entries))
    exact = _scaled(entry >> 16, _exponent(tl.load(scales + out_at + row, mask=live, other=1.0)))
    tl.store(
        out + (out_at + row).to(tl.int64) * ins + k + column, exact.to(tl.bfloat16, bitcast=True), mask=live
    )


def widen_layer(layer: LosslessLayer) -> DenseLayer:
    """`lossless.unpack_lossless` on a GPU."""
    rows, ins = layer.high.shape[0], layer.high.shape[1] * 4
    out = torch.empty(rows, ins, device=layer.high.device, dtype=torch.bfloat16)
    _widen_kernel[(rows // 64 * (ins // 128),)](
        layer.high,
        layer.low,
        layer.exceptions,
        layer.scales,
        out.view(torch.int32),
        out,
        ins,
        OUTS=64,
        DEPTH=128,
        **chaining(),
    )
    return DenseLayer(out.view(-1, layer.outs, ins).unbind(), layer.bias, layer.interleaved)
