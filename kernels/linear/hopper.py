"""The linear kernel for few rows on Hopper. It takes as long as reading the weights, so the reading never stops.

There is one program for each multiprocessor, and each goes through its share of the weight's tiles. A ring of tiles in shared
memory is always being filled: while the sum of one tile ends and the next begins, and before the kernels ahead in the stream
have finished, because weights depend on no kernel. Only then does a program wait for its input rows. The sums are those of
`triton`, by the same instructions in the same order. So a row has the same bits in a decode pass and in a prefill chunk.

Written in Gluon, Triton's language for explicit shared memory and copies; there is no interpreter for it.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from orthrus.kernels.device import chaining, has_warpgroup_mma, multiprocessors
from orthrus.kernels.linear.tiles import segment_length
from orthrus.kernels.linear.types import DenseLayer
from orthrus.kernels.rows.sampling_triton import nan_to_inf, perturb

MOST_ROWS = 64
_OUTS = 64
"""Outputs of a tile: as many as one instruction computes."""
_DEPTH = 128
"""Inputs of a step."""
_RING_BYTES = 200_000
"""Bytes of the ring. A multiprocessor has 227 KB of shared memory."""


class Grid(NamedTuple):
    """How the work of a launch is divided into units: a tile of outputs and rows, and one segment of the inputs."""

    split: gl.tensor  # Number of AR rows.
    ar_tiles: gl.tensor  # Row tiles of these.
    row_tiles: gl.tensor  # All row tiles; none has rows of both views.
    segments: gl.tensor
    steps: gl.tensor  # Steps of a segment.
    num_rows: gl.tensor
    num_outs: gl.tensor  # Outputs of one view.
    units: gl.tensor
    programs: gl.tensor


class Unit(NamedTuple):
    """Where a unit of work lies."""

    weight_at: gl.tensor  # First row of the weight, which has the views one behind the other.
    out_at: gl.tensor  # First output.
    row_at: gl.tensor  # First input row.
    row_end: gl.tensor  # The row behind the view's last.
    segment: gl.tensor


class Cursor(NamedTuple):
    """A step of a program: a tile of the weight and one of the input rows, which meet."""

    unit: gl.tensor
    step: gl.tensor  # Of its segment.
    weight_at: gl.tensor
    row_at: gl.tensor
    k: gl.tensor  # First input.


class Ring(NamedTuple):
    """Tiles in shared memory, filled in turn."""

    weights: gl.shared_memory_descriptor  # [places, outs, depth]
    rows: gl.shared_memory_descriptor  # [places, rows, depth]
    full: gl.shared_memory_descriptor  # For each place a barrier: both tiles have arrived.


@gluon.jit
def _make_grid(
    num_ar,
    num_rows,
    num_outs,
    steps,
    segments,
    OUTS: gl.constexpr,
    ROWS: gl.constexpr,
    TWO_VIEWS: gl.constexpr,
):
    split = num_rows
    if TWO_VIEWS:
        split = gl.load(num_ar)  # Uploaded before the pass: no kernel writes it.
    ar_tiles = gl.cdiv(split, ROWS)
    row_tiles = ar_tiles + gl.cdiv(num_rows - split, ROWS)
    units = row_tiles * gl.cdiv(num_outs, OUTS) * segments
    return Grid(split, ar_tiles, row_tiles, segments, steps, num_rows, num_outs, units, gl.num_programs(0))


@gluon.jit
def _unit(number, grid, OUTS: gl.constexpr, ROWS: gl.constexpr):
    """Where a unit lies. Segments change fastest, then row tiles, so that neighbours share a tile of the weight."""
    segment = number % grid.segments
    tile = number // grid.segments
    row_tile = tile % grid.row_tiles
    out_at = tile // grid.row_tiles * OUTS
    diffusion = row_tile >= grid.ar_tiles
    row_at = gl.where(diffusion, grid.split + (row_tile - grid.ar_tiles) * ROWS, row_tile * ROWS)
    row_end = gl.where(diffusion, grid.num_rows, grid.split)
    weight_at = out_at + gl.where(diffusion, grid.num_outs, 0)
    return Unit(weight_at, out_at, row_at, row_end, segment)


@gluon.jit
def _first_step(number, grid, OUTS: gl.constexpr, ROWS: gl.constexpr, DEPTH: gl.constexpr):
    """The first step of a unit."""
    unit = _unit(number, grid, OUTS, ROWS)
    return Cursor(number, gl.to_tensor(0), unit.weight_at, unit.row_at, unit.segment * grid.steps * DEPTH)


@gluon.jit
def _advance(cursor, grid, OUTS: gl.constexpr, ROWS: gl.constexpr, DEPTH: gl.constexpr):
    """The step after this one: further along the inputs, or the first of the program's next unit."""
    step = cursor.step + 1
    cursor = Cursor(cursor.unit, step, cursor.weight_at, cursor.row_at, cursor.k + DEPTH)
    if step == grid.steps:
        cursor = _first_step(cursor.unit + grid.programs, grid, OUTS, ROWS, DEPTH)
    return cursor


@gluon.jit
def _fetch_weights(w, ring, place, cursor, wanted):
    """Ask for a step's tile of the weight, and let the place's barrier wait for it and for the rows."""
    LOADED: gl.constexpr = (
        (ring.weights.shape[1] + ring.rows.shape[1]) * ring.rows.shape[2] * w.dtype.primitive_bitwidth // 8
    )
    full = ring.full.index(place)
    mbarrier.expect(full, LOADED, pred=wanted)
    tma.async_copy_global_to_shared(
        w, [cursor.weight_at, cursor.k], full, ring.weights.index(place), pred=wanted
    )


@gluon.jit
def _fetch_rows(x, ring, place, cursor, wanted):
    """Ask for a step's tile of the input rows."""
    tma.async_copy_global_to_shared(
        x, [cursor.row_at, cursor.k], ring.full.index(place), ring.rows.index(place), pred=wanted
    )


@gluon.jit
def _fill_ring(
    w,
    x,
    ring,
    grid,
    total,
    OUTS: gl.constexpr,
    ROWS: gl.constexpr,
    DEPTH: gl.constexpr,
    CHAINED: gl.constexpr,
):
    """Ask for the tiles of the program's first steps, and for the weights before the input rows are there.

    Returns the step behind these.
    """
    RING: gl.constexpr = ring.full.shape[0]
    first = _first_step(gl.program_id(0), grid, OUTS, ROWS, DEPTH)
    ahead = first
    for place in gl.static_range(RING):
        _fetch_weights(w, ring, place, ahead, place < total)
        ahead = _advance(ahead, grid, OUTS, ROWS, DEPTH)
    if CHAINED:
        gdc_wait()
    ahead = first
    for place in gl.static_range(RING):
        _fetch_rows(x, ring, place, ahead, place < total)
        ahead = _advance(ahead, grid, OUTS, ROWS, DEPTH)
    return ahead


@gluon.jit
def _best(logits, token, row, live, temperatures, keys, vocab):
    """For each row, the highest score among a tile's tokens and that token, as in `gumbel_argmax`. logits [tokens, rows]."""
    score = logits
    temperature = gl.load(temperatures + row, mask=live, other=0.0)
    if gl.max(temperature, 0) > 0.0:
        warm = (temperature > 0.0)[None, :]
        divisor = gl.where(temperature > 0.0, temperature, 1.0)[None, :]
        noisy = perturb(logits, divisor, keys, gl.where(live, row, 0)[None, :], token[:, None])
        score = gl.where(warm, noisy, logits)
    score = nan_to_inf(gl.where((token < vocab)[:, None], score, float("-inf")))
    best = gl.max(score, 0)
    return best, gl.min(gl.where(score == best[None, :], token[:, None], vocab - 1), 0)


@gluon.jit(do_not_specialize=["num_rows", "segments", "steps"])
def _stream_kernel(
    w,
    x,
    bias,
    out,
    num_ar,
    temperatures,
    keys,
    out_wanted,
    values,
    indices,
    num_rows,
    num_outs,
    steps,
    segments,
    OUTS: gl.constexpr,
    ROWS: gl.constexpr,
    DEPTH: gl.constexpr,
    RING: gl.constexpr,
    TWO_VIEWS: gl.constexpr,
    GATED: gl.constexpr,
    SPLIT: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    PICKS: gl.constexpr,
    CHAINED: gl.constexpr,
    num_warps: gl.constexpr,
):
    w_ring = gl.allocate_shared_memory(w.dtype, [RING, OUTS, DEPTH], w.layout)
    x_ring = gl.allocate_shared_memory(x.dtype, [RING, ROWS, DEPTH], x.layout)
    full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    ring = Ring(w_ring, x_ring, full)
    for i in gl.static_range(RING):
        mbarrier.init(full.index(i), count=1)
    if CHAINED:
        gdc_launch_dependents()
    grid = _make_grid(num_ar, num_rows, num_outs, steps, segments, OUTS, ROWS, TWO_VIEWS)
    program = gl.program_id(0)
    total = gl.cdiv(gl.maximum(grid.units - program, 0), grid.programs) * steps
    ahead = _fill_ring(w, x, ring, grid, total, OUTS, ROWS, DEPTH, CHAINED)

    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, ROWS, 16])
    place, phase, done, free = 0, 0, 0, 0
    for number in range(program, grid.units, grid.programs):
        acc = gl.zeros((OUTS, ROWS), gl.float32, layout)
        for _ in range(steps):
            mbarrier.wait(full.index(place), phase)
            acc = warpgroup_mma(w_ring.index(place), x_ring.index(place).permute((1, 0)), acc, is_async=True)
            # The product of the step before this one is complete: its place in the ring is free.
            acc = warpgroup_mma_wait(1, deps=(acc,))
            if (done > 0) & (done + RING - 1 < total):
                _fetch_weights(w, ring, free, ahead, True)
                _fetch_rows(x, ring, free, ahead, True)
                ahead = _advance(ahead, grid, OUTS, ROWS, DEPTH)
            done += 1
            free = place
            place += 1
            if place == RING:
                place = 0
                phase ^= 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        unit = _unit(number, grid, OUTS, ROWS)
        row_index = unit.row_at + gl.arange(0, ROWS, gl.SliceLayout(0, layout))
        live = row_index < unit.row_end
        out_at, width = unit.out_at, num_outs
        if HAS_BIAS:
            shift = gl.where(unit.row_at >= grid.split, num_outs, 0)
            index = out_at + gl.arange(0, OUTS, gl.SliceLayout(1, layout))
            offset = gl.load(bias + shift + index, mask=index < num_outs, other=0.0)
            acc += offset.to(gl.float32)[:, None]
        result = acc
        if GATED:
            # Blocks of 8: gate, up, gate, ... (see `interleave`); a thread holds both of a pair.
            gate, up = acc.reshape((OUTS // 16, 2, 8, ROWS)).permute((0, 2, 3, 1)).split()
            result = gl.convert_layout((gate / (1.0 + gl.exp(-gate)) * up).reshape((OUTS // 2, ROWS)), layout)
            out_at, width = out_at // 2, num_outs // 2
        index = out_at + gl.arange(0, result.shape[0], gl.SliceLayout(1, layout))
        inside = live[None, :] & (index < width)[:, None]
        stored = True
        if PICKS:
            stored = gl.load(out_wanted) != 0
            best, token = _best(result, index, row_index, live, temperatures, keys, width)
            tile = row_index * gl.cdiv(width, OUTS) + out_at // OUTS
            gl.store(values + tile, best, mask=live)
            gl.store(indices + tile, token, mask=live)
        if stored:
            goal = row_index[None, :].to(gl.int64) * width + index[:, None]
            if SPLIT:
                goal += unit.segment * num_rows.to(gl.int64) * num_outs
            gl.store(out + goal, result.to(out.dtype.element_ty), mask=inside)


def num_tiles(outs: int) -> int:
    """Number of tiles of a layer with `outs` outputs."""
    return -(-outs // _OUTS)


@cache
def _layout(block: tuple[int, int], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a tile lies in shared memory for both the copy engine and the matrix unit."""
    return gl.NVMMASharedLayout.get_default_for(
        list(block), gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    )


def streams(x: Tensor) -> bool:
    """Whether `launch` takes these rows x [rows, in_features]."""
    return x.shape[0] <= MOST_ROWS and x.itemsize == 2 and has_warpgroup_mma()


def launch(
    x: Tensor,
    layer: DenseLayer,
    out: Tensor,
    num_ar: Tensor | None,
    segments: int,
    picking: tuple[Tensor, ...] = (),
) -> None:
    """Compute `layer` into out: [rows, outs], or [segments, rows, outs] without the bias where there are several.

    picking: empty, or what is needed to pick from the outputs. First come the temperatures, the noise keys, and whether `out` is
    wanted at all, as `Weight.linear_gumbel_argmax` takes them; then where the best score of each tile and its token go, which
    are float32 and int32 [rows, num_tiles].
    """
    rows, ins = x.shape
    outs, views = layer.weights[0].shape[0], len(layer.weights)
    row_tile = 16 if rows <= 16 else 32 if rows <= 32 else 64
    bias = layer.bias if segments == 1 else None
    weight_block, row_block = (_OUTS, _DEPTH), (row_tile, _DEPTH)
    weight, last = layer.weights[0], [ins, 1]
    _stream_kernel[(multiprocessors(x.device),)](
        TensorDescriptor(
            weight, [views * outs, ins], last, list(weight_block), _layout(weight_block, x.dtype)
        ),
        TensorDescriptor(x, [rows, ins], [x.stride(0), 1], list(row_block), _layout(row_block, x.dtype)),
        out if bias is None else bias,
        out,
        out if num_ar is None else num_ar,
        *(picking or 5 * (out,)),
        rows,
        outs,
        segment_length(ins, segments) // _DEPTH,
        segments,
        OUTS=_OUTS,
        ROWS=row_tile,
        DEPTH=_DEPTH,
        RING=_RING_BYTES // ((_OUTS + row_tile) * _DEPTH * 2),
        TWO_VIEWS=views > 1,
        GATED=layer.interleaved,
        SPLIT=segments > 1,
        HAS_BIAS=bias is not None,
        PICKS=bool(picking),
        num_warps=4,
        **chaining(),
    )
