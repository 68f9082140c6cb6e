"""How the stream kernels divide a layer among programs, and the ring buffer through which they stream the weights.

Written in Gluon, Triton's language for explicit shared memory and copies. Gluon has no interpreter.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_wait

from orthrus.kernels.gluon_names import async_load

RING_BYTES = 200_000
"""Bytes of the ring. A program can use 227 KB of an SM's shared memory."""
REGISTERS = 128
"""Registers per thread when a warp-specialized program begins. The producer warps then give most of theirs to the consumers."""


class Work(NamedTuple):
    """The arguments of a launch that describe the work (for the words see `leaves`). Every warp makes its `Grid` from them."""

    num_ar: gl.tensor  # Pointer to the number of AR rows; read only where there are two views.
    num_rows: gl.tensor
    num_outs: gl.tensor  # Outputs of one view.
    parts: gl.tensor  # Split-K parts.
    part_leaves: gl.tensor  # Leaves of a part.
    all_steps: gl.tensor  # These three are `units`, `total` and `first` of `Leaves`, whose units are steps.
    all_leaves: gl.tensor
    first_leaf: gl.tensor


class Grid(NamedTuple):
    """How the work of a launch is divided into units: a tile of outputs and rows, and one part of the inputs."""

    work: Work
    ar_rows: gl.tensor  # Number of AR rows.
    ar_tiles: gl.tensor  # Row tiles of these.
    row_tiles: gl.tensor  # All row tiles; none has rows of both views.
    units: gl.tensor
    programs: gl.tensor


class Unit(NamedTuple):
    """Where a unit of work lies."""

    weight_at: gl.tensor  # First row of the weight, in which the views are concatenated.
    out_at: gl.tensor  # First output.
    row_at: gl.tensor  # First input row.
    row_end: gl.tensor  # End of the view's rows, exclusive.
    part: gl.tensor


class Step(NamedTuple):
    """A step of a program's K-loop: a tile of the weight is multiplied by a tile of the input rows."""

    unit: gl.tensor
    left: gl.tensor  # Steps of the unit, this one included.
    weight_at: gl.tensor
    row_at: gl.tensor
    k: gl.tensor  # First input.


class DenseRing(NamedTuple):
    """The ring buffer of `hopper`, in shared memory. A stage holds the two tiles of a step."""

    weights: gl.shared_memory_descriptor  # [stages, outs, depth]
    rows: gl.shared_memory_descriptor  # [stages, rows, depth]
    full: gl.shared_memory_descriptor  # An mbarrier per stage: both tiles have arrived.


@gluon.jit
def make_grid(work, OUTS: gl.constexpr, ROWS: gl.constexpr, TWO_VIEWS: gl.constexpr):
    """The division of `work` into units."""
    ar_rows = work.num_rows
    if TWO_VIEWS:
        ar_rows = gl.load(work.num_ar)  # Uploaded before the pass, so it may be read before `gdc_wait`.
    ar_tiles = gl.cdiv(ar_rows, ROWS)
    row_tiles = ar_tiles + gl.cdiv(work.num_rows - ar_rows, ROWS)
    units = row_tiles * gl.cdiv(work.num_outs, OUTS) * work.parts
    return Grid(work, ar_rows, ar_tiles, row_tiles, units, gl.num_programs(0))


@gluon.jit
def leaf_begin(leaf, grid):
    """The first step of a leaf, counted from the rank's first leaf."""
    work = grid.work
    first = work.first_leaf * work.all_steps // work.all_leaves
    return (work.first_leaf + leaf) * work.all_steps // work.all_leaves - first


@gluon.jit
def num_steps(part, grid):
    """Steps of a part."""
    leaves = grid.work.part_leaves
    return leaf_begin((part + 1) * leaves, grid) - leaf_begin(part * leaves, grid)


@gluon.jit
def count_steps(program, grid):
    """Steps of all units of a program."""
    total = 0
    for number in range(program, grid.units, grid.programs):
        total += num_steps(number % grid.work.parts, grid)
    return total


@gluon.jit
def unit_of(number, grid, OUTS: gl.constexpr, ROWS: gl.constexpr):
    """Where a unit lies. Parts change fastest, then row tiles, so that neighbouring programs share a tile of the weight."""
    part = number % grid.work.parts
    tile = number // grid.work.parts
    row_tile = tile % grid.row_tiles
    out_at = tile // grid.row_tiles * OUTS
    diffusion = row_tile >= grid.ar_tiles
    row_at = gl.where(diffusion, grid.ar_rows + (row_tile - grid.ar_tiles) * ROWS, row_tile * ROWS)
    row_end = gl.where(diffusion, grid.work.num_rows, grid.ar_rows)
    weight_at = out_at + gl.where(diffusion, grid.work.num_outs, 0)
    return Unit(weight_at, out_at, row_at, row_end, part)


@gluon.jit
def first_step(number, grid, OUTS: gl.constexpr, ROWS: gl.constexpr, DEPTH: gl.constexpr):
    """The first step of a unit."""
    unit = unit_of(number, grid, OUTS, ROWS)
    begin = leaf_begin(unit.part * grid.work.part_leaves, grid)
    return Step(number, num_steps(unit.part, grid), unit.weight_at, unit.row_at, begin * DEPTH)


@gluon.jit
def next_step(step, grid, OUTS: gl.constexpr, ROWS: gl.constexpr, DEPTH: gl.constexpr):
    """The step after this one: further along the inputs, or the first of the program's next unit."""
    left = step.left - 1
    step = Step(step.unit, left, step.weight_at, step.row_at, step.k + DEPTH)
    if left == 0:
        step = first_step(step.unit + grid.programs, grid, OUTS, ROWS, DEPTH)
    return step


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr, TURNS: gl.constexpr = 1):
    """The next stage of a ring whose stages `TURNS` warpgroups take in turn, and the phase of its mbarriers."""
    wraps = stage >= STAGES - TURNS
    return gl.where(wraps, stage + TURNS - STAGES, stage + TURNS), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def fetch_weights(w, ring, stage, step, wanted):
    """Issue the load of a step's weight tile. The stage's mbarrier is set to expect the bytes of this tile and the rows' tile."""
    LOADED: gl.constexpr = (
        (ring.weights.shape[1] + ring.rows.shape[1]) * ring.rows.shape[2] * w.dtype.primitive_bitwidth // 8
    )
    full = ring.full.index(stage)
    mbarrier.expect(full, LOADED, pred=wanted)
    async_load(w, [step.weight_at, step.k], full, ring.weights.index(stage), pred=wanted)


@gluon.jit
def fetch_rows(x, ring, stage, step, wanted):
    """Issue the load of a step's tile of the input rows."""
    async_load(x, [step.row_at, step.k], ring.full.index(stage), ring.rows.index(stage), pred=wanted)


@gluon.jit
def fill_ring(
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
    """Issue the loads of the program's first steps, one step for each stage. Those of the weights come before `gdc_wait`.

    Returns the step after these.
    """
    STAGES: gl.constexpr = ring.full.shape[0]
    first = first_step(gl.program_id(0), grid, OUTS, ROWS, DEPTH)
    ahead = first
    for stage in gl.static_range(STAGES):
        fetch_weights(w, ring, stage, ahead, stage < total)
        ahead = next_step(ahead, grid, OUTS, ROWS, DEPTH)
    if CHAINED:
        gdc_wait()
    ahead = first
    for stage in gl.static_range(STAGES):
        fetch_rows(x, ring, stage, ahead, stage < total)
        ahead = next_step(ahead, grid, OUTS, ROWS, DEPTH)
    return ahead


@gluon.jit
def silu_mul(acc, OUTS: gl.constexpr, ROWS: gl.constexpr):
    """silu(gate) * up [OUTS / 2, ROWS] of sums [OUTS, ROWS] that are blocks of 8 of the gate and of up in turn (see `alternate`).

    A thread holds both of a pair. The result has the layout of `acc`.
    """
    gate, up = acc.reshape((OUTS // 16, 2, 8, ROWS)).permute((0, 2, 3, 1)).split()
    return gl.convert_layout((gate / (1.0 + gl.exp(-gate)) * up).reshape((OUTS // 2, ROWS)), acc.type.layout)
