"""The ring buffer of `codes_hopper`, and the producer warps that fill it.

Written in Gluon, Triton's language for explicit shared memory and copies. Gluon has no interpreter.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_wait

from orthrus.kernels.gluon_names import async_load
from orthrus.kernels.int4_sizes import TILE_INS, TILE_OUTS
from orthrus.kernels.linear.stream import leaf_begin, make_grid, next_stage, num_steps, unit_of

_OUTS, _INS = gl.constexpr(TILE_OUTS), gl.constexpr(TILE_INS)


class CodeRing(NamedTuple):
    """The ring buffer in shared memory. A stage holds a step: a tile of each consumer, and their input rows."""

    codes: gl.shared_memory_descriptor  # [stages * consumers, 8, 256]: the words of a tile.
    tables: gl.shared_memory_descriptor  # [stages * consumers, 256]
    rows: gl.shared_memory_descriptor  # [stages, rows, ins]
    full: gl.shared_memory_descriptor  # An mbarrier per stage: what both producer warps load has arrived.
    empty: gl.shared_memory_descriptor  # An mbarrier per stage: all consumers have multiplied what it holds.


@gluon.jit
def load_codes(codes, tables, ring, work):
    """Load codes and tables. They depend on no kernel, so there is no `gdc_wait`."""
    CONSUMERS: gl.constexpr = ring.codes.shape[0] // ring.full.shape[0]
    ROWS: gl.constexpr = ring.rows.shape[1]
    LOADED: gl.constexpr = CONSUMERS * (codes.block_type.nbytes + tables.block_type.nbytes)
    grid = make_grid(work, CONSUMERS * _OUTS, ROWS, False)
    stage, phase = 0, 1
    for number in range(gl.program_id(0), grid.units, grid.programs):
        unit = unit_of(number, grid, CONSUMERS * _OUTS, ROWS)
        first = leaf_begin(unit.part, grid)
        tile = unit.out_at // _OUTS * work.all_steps
        for step in range(first, first + num_steps(unit.part, grid)):
            full = ring.full.index(stage)
            mbarrier.wait(ring.empty.index(stage), phase)
            mbarrier.expect(full, LOADED)
            for i in gl.static_range(CONSUMERS):
                at = tile + i * work.all_steps + step
                async_load(codes, [at * 8, 0], full, ring.codes.index(stage * CONSUMERS + i))
                async_load(tables, [at * 256], full, ring.tables.index(stage * CONSUMERS + i))
            stage, phase = next_stage(stage, phase, ring.full.shape[0])


@gluon.jit
def load_rows(x, ring, work, CHAINED: gl.constexpr):
    """Load input rows, once earlier kernels of the stream have finished."""
    CONSUMERS: gl.constexpr = ring.codes.shape[0] // ring.full.shape[0]
    ROWS: gl.constexpr = ring.rows.shape[1]
    grid = make_grid(work, CONSUMERS * _OUTS, ROWS, False)
    if CHAINED:
        gdc_wait()
    stage, phase = 0, 1
    for number in range(gl.program_id(0), grid.units, grid.programs):
        unit = unit_of(number, grid, CONSUMERS * _OUTS, ROWS)
        first = leaf_begin(unit.part, grid)
        for step in range(first, first + num_steps(unit.part, grid)):
            full = ring.full.index(stage)
            mbarrier.wait(ring.empty.index(stage), phase)
            mbarrier.expect(full, x.block_type.nbytes)
            async_load(x, [unit.row_at, step * _INS], full, ring.rows.index(stage))
            stage, phase = next_stage(stage, phase, ring.full.shape[0])
