"""The ring buffer of `grouped_hopper`, and the producer warps that fill it.

Written in Gluon, Triton's language for explicit shared memory and copies. Gluon has no interpreter.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_wait

from orthrus.kernels.gluon_names import async_load
from orthrus.kernels.linear.stream import leaf_begin, make_grid, next_stage, unit_of


class GroupedRing(NamedTuple):
    """A ring buffer in shared memory. A stage holds the tiles of a step, which is two groups of inputs."""

    # FP8 weights [2 * stages, outs, depth], or words of 4-bit weights [stages, outs, words of both groups].
    weights: gl.shared_memory_descriptor
    rows: gl.shared_memory_descriptor  # [2 * stages, rows, depth]
    scales: gl.shared_memory_descriptor  # [2 * stages, outs]: the scales of the weights.
    # [2 * stages, at least outs or rows]: the scales of FP8 rows, or the zero points of integer weights.
    others: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor  # An mbarrier per stage: the tiles of both producer warps have arrived.
    empty: gl.shared_memory_descriptor  # An mbarrier per stage: its tiles have been multiplied.
    # [outs, rows]: the second consumer's sums of a unit. Not used with one consumer.
    sums: gl.shared_memory_descriptor
    sums_full: gl.shared_memory_descriptor  # An mbarrier: `sums` has been written.
    sums_empty: gl.shared_memory_descriptor  # An mbarrier: `sums` has been read.


@gluon.jit
def load_weights(
    w,
    scales,
    zeros,
    ring,
    work,
    GROUP_DEPTHS: gl.constexpr,
    OUTS: gl.constexpr,
    ROWS: gl.constexpr,
    BITS: gl.constexpr,
):
    """Load the weights, their scales and their zero points. They depend on no kernel, so there is no `gdc_wait`."""
    WIDTH: gl.constexpr = w.block_type.shape[1]
    TILES: gl.constexpr = 1 if BITS > 0 else 2
    LOADED: gl.constexpr = TILES * w.block_type.nbytes + 2 * (
        scales.block_type.nbytes + (zeros.block_type.nbytes if BITS > 0 else 0)
    )
    grid = make_grid(work, OUTS, ROWS, False)
    stage, phase = 0, 1
    for number in range(gl.program_id(0), grid.units, grid.programs):
        unit = unit_of(number, grid, OUTS, ROWS)
        first = leaf_begin(unit.part, grid)
        for step in range(first, leaf_begin(unit.part + 1, grid)):
            full = ring.full.index(stage)
            mbarrier.wait(ring.empty.index(stage), phase)
            mbarrier.expect(full, LOADED)
            for tile in gl.static_range(TILES):
                column = (TILES * step + tile) * WIDTH
                async_load(w, [unit.weight_at, column], full, ring.weights.index(TILES * stage + tile))
            for half in gl.static_range(2):
                group = [(2 * step + half) // GROUP_DEPTHS * work.num_outs + unit.weight_at]
                async_load(scales, group, full, ring.scales.index(2 * stage + half))
                if BITS > 0:
                    async_load(zeros, group, full, ring.others.index(2 * stage + half))
            stage, phase = next_stage(stage, phase, ring.full.shape[0])


@gluon.jit
def load_rows(
    x,
    x_scales,
    ring,
    work,
    x_stride,
    OUTS: gl.constexpr,
    ROWS: gl.constexpr,
    CHAINED: gl.constexpr,
):
    """Load the input rows and their scales, once earlier kernels of the stream have finished."""
    ROUNDED: gl.constexpr = x.dtype == gl.float8e4nv
    LOADED: gl.constexpr = 2 * (x.block_type.nbytes + (x_scales.block_type.nbytes if ROUNDED else 0))
    DEPTH: gl.constexpr = x.block_type.shape[1]
    grid = make_grid(work, OUTS, ROWS, False)
    if CHAINED:
        gdc_wait()
    stage, phase = 0, 1
    for number in range(gl.program_id(0), grid.units, grid.programs):
        unit = unit_of(number, grid, OUTS, ROWS)
        first = leaf_begin(unit.part, grid)
        for step in range(first, leaf_begin(unit.part + 1, grid)):
            full = ring.full.index(stage)
            mbarrier.wait(ring.empty.index(stage), phase)
            mbarrier.expect(full, LOADED)
            for half in gl.static_range(2):
                group = 2 * step + half
                async_load(x, [unit.row_at, group * DEPTH], full, ring.rows.index(2 * stage + half))
                if ROUNDED:
                    scale = [group * x_stride + unit.row_at]
                    async_load(x_scales, scale, full, ring.others.index(2 * stage + half))
            stage, phase = next_stage(stage, phase, ring.full.shape[0])
