"""The ring buffers of `lossless_hopper`, and the producer warps that fill them.

Written in Gluon, Triton's language for explicit shared memory and copies. Gluon has no interpreter.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_wait

from orthrus.kernels.gluon_names import async_load
from orthrus.kernels.linear.stream import leaf_begin, make_grid, next_place, num_steps, unit_of


class Ring(NamedTuple):
    """Two ring buffers in shared memory. Each place of the first, and each slot of the second, holds a step."""

    high: gl.shared_memory_descriptor  # [places, outs, words]
    low: gl.shared_memory_descriptor  # [places, outs, words]
    exceptions: gl.shared_memory_descriptor  # [places, entries]
    wide: gl.shared_memory_descriptor  # [slots, outs, depth], bfloat16
    rows: gl.shared_memory_descriptor  # [slots, rows, depth]
    full: gl.shared_memory_descriptor  # An mbarrier per place: the weights in 12 bits have arrived.
    empty: gl.shared_memory_descriptor  # An mbarrier per place: its weights have been widened.
    ready: gl.shared_memory_descriptor  # An mbarrier per slot: it has widened weights and input rows.
    used: gl.shared_memory_descriptor  # An mbarrier per slot: these have been multiplied.


@gluon.jit
def load_weights(high, low, exceptions, ring, work, row_steps, ROWS: gl.constexpr, TWO_VIEWS: gl.constexpr):
    """Load weights into the places. They depend on no kernel, so there is no `gdc_wait`.

    row_steps: steps of all inputs that the rank has.
    """
    OUTS: gl.constexpr = ring.high.shape[1]
    LOADED: gl.constexpr = high.block_type.nbytes + low.block_type.nbytes + exceptions.block_type.nbytes
    grid = make_grid(work, OUTS, ROWS, TWO_VIEWS)
    place, phase = 0, 1
    for number in range(gl.program_id(0), grid.units, grid.programs):
        unit = unit_of(number, grid, OUTS, ROWS)
        first = leaf_begin(unit.part * grid.leaves, grid)
        lists = unit.weight_at // OUTS * row_steps
        for step in range(first, first + num_steps(unit.part, grid)):
            full = ring.full.index(place)
            mbarrier.wait(ring.empty.index(place), phase)
            mbarrier.expect(full, LOADED)
            async_load(high, [unit.weight_at, step * high.block_type.shape[1]], full, ring.high.index(place))
            async_load(low, [unit.weight_at, step * low.block_type.shape[1]], full, ring.low.index(place))
            entry = [(lists + step) * exceptions.block_type.shape[0]]
            async_load(exceptions, entry, full, ring.exceptions.index(place))
            place, phase = next_place(place, phase, ring.full.shape[0])


@gluon.jit
def load_rows(x, ring, work, TWO_VIEWS: gl.constexpr, CHAINED: gl.constexpr):
    """Load input rows into the slots, once earlier kernels of the stream have finished."""
    OUTS: gl.constexpr = ring.high.shape[1]
    ROWS: gl.constexpr = ring.rows.shape[1]
    DEPTH: gl.constexpr = ring.rows.shape[2]
    grid = make_grid(work, OUTS, ROWS, TWO_VIEWS)
    if CHAINED:
        gdc_wait()
    slot, phase = 0, 1
    for number in range(gl.program_id(0), grid.units, grid.programs):
        unit = unit_of(number, grid, OUTS, ROWS)
        first = leaf_begin(unit.part * grid.leaves, grid)
        for step in range(first, first + num_steps(unit.part, grid)):
            ready = ring.ready.index(slot)
            mbarrier.wait(ring.used.index(slot), phase)
            mbarrier.expect(ready, x.block_type.nbytes)
            async_load(x, [unit.row_at, step * DEPTH], ready, ring.rows.index(slot))
            slot, phase = next_place(slot, phase, ring.ready.shape[0])
