"""Row-invariant linear layer on a GPU.

The weight's inputs are cut into segments whose number depends on the weight's shape alone. Inside a segment, products are
added to one float32 accumulator in order; segments are added in order. That tree is the same for every tile shape here,
and whether a program adds the segments it has computed itself or several programs compute one each, so a row has the same bits
alone, in a decode batch and in a prefill chunk. Operands are swapped: the weight is always on the matrix unit's M side, whose
tile (64) few rows would leave empty, and the rows are on its N side, which goes down to 8. One instruction for all row counts.
"""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

if TYPE_CHECKING:
    from kernels.linear import PackedLinear

_SEGMENT_UNIT = 128
"""Segment lengths are multiples of it: every tile's depth divides it."""
_SHORTEST_SEGMENT = 512
_MOST_SEGMENTS = 4
_FULL_GRID = 192
"""Programs that keep the memory of a GPU with 132 multiprocessors busy, by a third more than one each."""
_COUNTERS = 1 << 14


@cache
def num_segments(out_features: int, in_features: int) -> int:
    """Segments of a weight's inputs: enough that tiles of 64 outputs x segments fill a GPU when there is one row."""
    segments = 1
    while (
        segments < _MOST_SEGMENTS
        and segments * triton.cdiv(out_features, 64) < _FULL_GRID
        and in_features // (2 * segments) >= _SHORTEST_SEGMENT
    ):
        segments *= 2
    return segments


@dataclass(frozen=True)
class LinearTiles:
    """How a launch is cut up: outputs, rows and depth (inputs per step) of a tile; whether segments get programs of their own.

    None of it changes a bit of the result.
    """

    outs: int
    rows: int
    depth: int
    split: bool
    warps: int
    stages: int


@triton.jit
def _accumulate(
    w, x, out_at, row_at, begin, end, OUTS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr
):
    """Sum over one segment: float32 [OUTS, ROWS]. Reading past the weight's inputs, outputs or rows gives zeros."""
    total = tl.zeros((OUTS, ROWS), tl.float32)
    for k in range(begin, end, DEPTH):
        weights = w.load([out_at, k])
        rows = x.load([row_at, k])
        total = tl.dot(weights, rows.T, total, input_precision="ieee")
    return total


@triton.jit
def _store(total, bias, out, out_index, row_index, num_outs, num_rows, HAS_BIAS: tl.constexpr):
    inside = (row_index < num_rows)[None, :] & (out_index < num_outs)[:, None]
    if HAS_BIAS:
        total += tl.load(bias + out_index, mask=out_index < num_outs, other=0.0).to(tl.float32)[:, None]
    place = out + row_index[None, :].to(tl.int64) * num_outs + out_index[:, None]
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "segments"])
def _linear_kernel(
    w,
    x,
    bias,
    out,
    partials,
    arrivals,
    num_rows,
    num_outs,
    segment,
    segments,
    OUTS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLIT: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    # Neighbouring programs share a weight tile over a band of row tiles: both stay in the L2 cache.
    BAND: tl.constexpr = 16
    tile = tl.program_id(0)
    row_tiles = tl.cdiv(num_rows, ROWS)
    in_band = BAND * tl.cdiv(num_outs, OUTS)
    first = tile // in_band * BAND
    height = min(row_tiles - first, BAND)
    row_at = (first + tile % in_band % height) * ROWS
    out_at = tile % in_band // height * OUTS
    row_index = row_at + tl.arange(0, ROWS)
    out_index = out_at + tl.arange(0, OUTS)
    if SPLIT:
        which = tl.program_id(1)
        part = _accumulate(w, x, out_at, row_at, which * segment, (which + 1) * segment, OUTS, ROWS, DEPTH)
        inside = (row_index < num_rows)[None, :] & (out_index < num_outs)[:, None]
        plane = num_rows.to(tl.int64) * num_outs
        place = partials + row_index[None, :].to(tl.int64) * num_outs + out_index[:, None]
        tl.store(place + which * plane, part, mask=inside)
        # Whoever comes last finds all segments in memory, and adds them in order.
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals + tile, 1, sem="acq_rel", scope="gpu")
        if arrived == segments - 1:
            tl.store(arrivals + tile, 0)
            total = tl.zeros((OUTS, ROWS), tl.float32)
            for s in range(segments):
                total += tl.load(place + s * plane, mask=inside, other=0.0, cache_modifier=".cg")
            _store(total, bias, out, out_index, row_index, num_outs, num_rows, HAS_BIAS)
    else:
        total = _accumulate(w, x, out_at, row_at, 0, segment, OUTS, ROWS, DEPTH)
        if not WHOLE:
            for s in range(1, segments):
                total += _accumulate(w, x, out_at, row_at, s * segment, (s + 1) * segment, OUTS, ROWS, DEPTH)
        _store(total, bias, out, out_index, row_index, num_outs, num_rows, HAS_BIAS)


@cache
def _arrivals(device: torch.device) -> Tensor:
    """Counters of arrived segments, one per tile; each launch leaves them at zero for the next one in the stream."""
    return torch.zeros(_COUNTERS, dtype=torch.int32, device=device)


def choose_tiles(rows: int, out_features: int, segments: int, dtype: torch.dtype) -> LinearTiles:
    """Tiles for a launch, by its row count and weight."""
    if dtype == torch.float32:
        # Without a matrix unit, and only for checks: small enough to keep in registers.
        return LinearTiles(64, 16, 32, segments > 1, 4, 2)
    few = segments > 1
    if rows <= 64:
        row_tile = 16 if rows <= 16 else 32 if rows <= 32 else 64
        return LinearTiles(64 if out_features < 16384 else 128, row_tile, 128, few, 4, 4)
    if rows <= 128:
        return LinearTiles(128, 128, 64, few, 8, 4)
    if rows <= 256:
        return LinearTiles(128, 256, 64, few, 8, 4)
    if segments > 1:
        return LinearTiles(128, 128, 64, False, 8, 4)
    return LinearTiles(128, 256, 64, False, 8, 4)


def linear(
    x: Tensor, layer: "PackedLinear", tiles: LinearTiles | None = None, segments: int | None = None
) -> Tensor:
    """`kernels.linear` for float16, bfloat16 and float32; tiles, segments: for tests and measurements, not the usual choice.

    Raises ValueError if a row of x or of the weight is not a multiple of 16 bytes, which the GPU's copy engine needs.
    """
    weight, bias = layer.weight, layer.bias
    outs, ins = weight.shape
    rows = x.shape[0]
    if ins * x.itemsize % 16:
        raise ValueError(
            f"a linear layer with {ins} inputs of {x.dtype} can't run on a GPU: its rows must be multiples of 16 bytes"
        )
    segments = segments or num_segments(outs, ins)
    cut = tiles or choose_tiles(rows, outs, segments, x.dtype)
    out = torch.empty(rows, outs, device=x.device, dtype=x.dtype)
    num_tiles = triton.cdiv(outs, cut.outs) * triton.cdiv(rows, cut.rows)
    split = cut.split and segments > 1 and num_tiles <= _COUNTERS
    partials = torch.empty(segments, rows, outs, device=x.device, dtype=torch.float32) if split else out
    _linear_kernel[(num_tiles, segments if split else 1)](
        TensorDescriptor(weight, [outs, ins], [ins, 1], [cut.outs, cut.depth]),
        TensorDescriptor(x, [rows, ins], [x.stride(0), 1], [cut.rows, cut.depth]),
        out if bias is None else bias,
        out,
        partials,
        _arrivals(x.device),
        rows,
        outs,
        triton.cdiv(triton.cdiv(ins, segments), _SEGMENT_UNIT) * _SEGMENT_UNIT,
        segments,
        OUTS=cut.outs,
        ROWS=cut.rows,
        DEPTH=cut.depth,
        SPLIT=split,
        WHOLE=segments == 1,
        HAS_BIAS=bias is not None,
        num_warps=cut.warps,
        num_stages=cut.stages,
    )
    return out
