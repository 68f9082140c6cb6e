"""The ring buffers of `lossless_hopper`, and the producer warps that fill them.

Written in Gluon, Triton's language for explicit shared memory and copies. Gluon has no interpreter.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_wait

from orthrus.kernels.gluon_names import async_load
from orthrus.kernels.linear.stream import leaf_begin, make_grid, next_stage, num_steps, unit_of


class LosslessRings(NamedTuple):
    """Two ring buffers in shared memory: of packed weights, and of widened ones with the input rows. A stage holds a step."""

    high: gl.shared_memory_descriptor  # [packed stages, outs, words]
    low: gl.shared_memory_descriptor  # [packed stages, outs, words]
    exceptions: gl.shared_memory_descriptor  # [packed stages, entries]
    wide: gl.shared_memory_descriptor  # [wide stages, outs, depth], bfloat16
    rows: gl.shared_memory_descriptor  # [wide stages, rows, depth]
    packed_full: (
        gl.shared_memory_descriptor
    )  # An mbarrier per packed stage: the weights in 12 bits have arrived.
    packed_empty: gl.shared_memory_descriptor  # An mbarrier per packed stage: its weights have been widened.
    wide_full: (
        gl.shared_memory_descriptor
    )  # An mbarrier per wide stage: it has widened weights and input rows.
    wide_empty: gl.shared_memory_descriptor  # An mbarrier per wide stage: these have been multiplied.


@gluon.jit
def load_weights(high, low, exceptions, rings, work, row_steps, ROWS: gl.constexpr, TWO_VIEWS: gl.constexpr):
    """Load weights into the packed stages. They depend on no kernel, so there is no `gdc_wait`.

    row_steps: steps of all inputs that the rank has.
    """
    OUTS: gl.constexpr = rings.high.shape[1]
    LOADED: gl.constexpr = high.block_type.nbytes + low.block_type.nbytes + exceptions.block_type.nbytes
    grid = make_grid(work, OUTS, ROWS, TWO_VIEWS)
    stage, phase = 0, 1
    for number in range(gl.program_id(0), grid.units, grid.programs):
        unit = unit_of(number, grid, OUTS, ROWS)
        first = leaf_begin(unit.part * grid.work.part_leaves, grid)
        lists = unit.weight_at // OUTS * row_steps
        for step in range(first, first + num_steps(unit.part, grid)):
            full = rings.packed_full.index(stage)
            mbarrier.wait(rings.packed_empty.index(stage), phase)
            mbarrier.expect(full, LOADED)
            async_load(high, [unit.weight_at, step * high.block_type.shape[1]], full, rings.high.index(stage))
            async_load(low, [unit.weight_at, step * low.block_type.shape[1]], full, rings.low.index(stage))
            entry = [(lists + step) * exceptions.block_type.shape[0]]
            async_load(exceptions, entry, full, rings.exceptions.index(stage))
            stage, phase = next_stage(stage, phase, rings.packed_full.shape[0])


@gluon.jit
def load_rows(x, rings, work, TWO_VIEWS: gl.constexpr, CHAINED: gl.constexpr):
    """Load input rows into the wide stages, once earlier kernels of the stream have finished."""
    OUTS: gl.constexpr = rings.high.shape[1]
    ROWS: gl.constexpr = rings.rows.shape[1]
    DEPTH: gl.constexpr = rings.rows.shape[2]
    grid = make_grid(work, OUTS, ROWS, TWO_VIEWS)
    if CHAINED:
        gdc_wait()
    stage, phase = 0, 1
    for number in range(gl.program_id(0), grid.units, grid.programs):
        unit = unit_of(number, grid, OUTS, ROWS)
        first = leaf_begin(unit.part * grid.work.part_leaves, grid)
        for step in range(first, first + num_steps(unit.part, grid)):
            full = rings.wide_full.index(stage)
            mbarrier.wait(rings.wide_empty.index(stage), phase)
            mbarrier.expect(full, x.block_type.nbytes)
            async_load(x, [unit.row_at, step * DEPTH], full, rings.rows.index(stage))
            stage, phase = next_stage(stage, phase, rings.wide_full.shape[0])
