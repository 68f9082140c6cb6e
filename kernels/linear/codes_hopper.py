"""The linear kernel for weights in 4-bit codes on Hopper (see `codes`). It reads little more than half of the bytes of FP8.

The kernel is persistent and warp-specialized. One producer warp loads codes and tables into a ring buffer in shared memory, and
another loads the input rows. Up to three consumer warpgroups have 64 outputs each, and share the input rows. A consumer loads
codes to the registers from which the tensor cores read weights, and looks up which numbers they stand for. While the tensor cores
multiply the numbers of one group of 128 inputs, it looks up those of the next.

A program leaves registers and shared memory of its SM free. So the small kernels before and behind can run there meanwhile.

Written in Gluon, Triton's language for explicit shared memory and copies. Gluon has no interpreter.
"""

from functools import cache
from math import ceil
from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents

from orthrus.kernels.device import chaining, num_sms
from orthrus.kernels.gluon_names import reinterpret
from orthrus.kernels.int4_sizes import GROUP, TILE_INS, TILE_OUTS
from orthrus.kernels.linear.codes_ring import CodeRing, load_codes, load_rows
from orthrus.kernels.linear.descriptors import tiles_of
from orthrus.kernels.linear.stream import (
    RING_BYTES,
    Work,
    count_steps,
    make_grid,
    next_stage,
    num_steps,
    unit_of,
)
from orthrus.kernels.linear.stream_finish import finish, output_scales
from orthrus.kernels.linear.tiles import MOST_PARTS, SHORTEST_PART, SMS, rows_of_tile
from orthrus.kernels.linear.types import CodeLayer
from orthrus.kernels.rounding import Rounding, stored_as

_OUTS, _INS, _GROUP = gl.constexpr(TILE_OUTS), gl.constexpr(TILE_INS), gl.constexpr(GROUP)
_STEP_CYCLES = (700, 1050, 1650)
"""About how many clock cycles a step takes with one, two and three consumers (H200, 32 rows)."""
_REGISTERS = {16: 96, 32: 104, 64: 112, 128: 152}
"""Registers per thread of a consumer, for each number of rows of a tile."""
_LEAST_REGISTERS = 96
"""The least registers per thread at launch with which the compiler can compile a tile of 128 rows."""
_PRODUCER_REGISTERS = gl.constexpr(24)


class Result(NamedTuple):
    """What becomes of the sums, see `finish`."""

    scales: gl.tensor
    bias: gl.tensor
    out: gl.tensor
    factor: gl.tensor


@gluon.jit
def _look_up(words, low, high):
    """Words of codes [outs, 4, 4], and the halves of their tables [outs] -> int32 tensors of the words' shape.

    They have four e4m3 numbers in an element: those of the first, and of the second half of 32 inputs.
    """
    # prmt looks up four of eight bytes at a time. 0xea stands for "(first and second) or third".
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 place, number;
        and.b32 place, $2, 0x77777777;
        prmt.b32 number, $3, $4, place; lop3.b32 $0, $2, 0x80808080, number, 0xea;
        shr.u32 place, place, 16; prmt.b32 number, $3, $4, place;
        shl.b32 place, $2, 4; lop3.b32 $1, place, 0x80808080, number, 0xea;
        }""",
        "=&r,=&r,r,r,r",
        [words, low[:, None, None], high[:, None, None]],
        dtype=[gl.int32, gl.int32],
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _as_numbers(first, second):
    """What `_look_up` returns as e4m3 numbers [outs, 128]."""
    n0, n1, n2, n3, n4, n5, n6, n7 = gl.inline_asm_elementwise(
        """
        mov.b32 $0, $8; mov.b32 $1, $12; mov.b32 $2, $9; mov.b32 $3, $13;
        mov.b32 $4, $10; mov.b32 $5, $14; mov.b32 $6, $11; mov.b32 $7, $15;
        """,
        "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r,r,r,r",
        [first, second],
        dtype=[gl.float8e4nv] * 8,
        is_pure=True,
        pack=4,
    )
    # A thread has four words of an output, of four runs of 32 inputs. Triton takes a result register to hold one number of each
    # word. In fact it holds four neighbours of one word, and each word fills two registers in turn, one for each half.
    some = gl.join(gl.join(n0, n1), gl.join(n2, n3))
    others = gl.join(gl.join(n4, n5), gl.join(n6, n7))
    # From [half of 16 outputs, warp, output, quarter, neighbour, half, run's low bit, run's high bit].
    joined = gl.join(some, others).reshape((2, 4, 8, 4, 4, 2, 2, 2))
    return joined.permute((1, 0, 2, 7, 6, 5, 3, 4)).reshape((_OUTS, _GROUP))


@gluon.jit
def _numbers_of(ring, tile, GROUP: gl.constexpr, WORDS: gl.constexpr):
    """The numbers of a group of a tile, the first (GROUP = 0) or the second: see `_look_up`."""
    OUTS: gl.constexpr = _OUTS
    HALVES: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, WORDS))
    words = reinterpret(ring.codes.index(tile), [2 * OUTS, 4, 4], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    words = words.slice(GROUP * OUTS, OUTS, dim=0).load(WORDS)
    table = ring.tables.index(tile)
    low = table.slice(GROUP * OUTS, OUTS).load(HALVES)
    high = table.slice((2 + GROUP) * OUTS, OUTS).load(HALVES)
    return _look_up(words, low, high)


@gluon.jit
def _multiply_group(numbers, rows, acc, GROUP: gl.constexpr):
    """Start to add the product of a group to acc. rows: the step's input rows in shared memory [rows, ins]."""
    numbers = gl.convert_layout(
        _as_numbers(numbers[0], numbers[1]), gl.DotOperandLayout(0, acc.type.layout, 4)
    )
    rows = rows.slice(GROUP * _GROUP, _GROUP, dim=1).permute((1, 0))
    return warpgroup_mma(numbers, rows, acc, is_async=True)


@gluon.jit
def _tile_of(number, grid, NUMBER: gl.constexpr, CONSUMERS: gl.constexpr):
    """The number of consumer `NUMBER`'s tile in a unit, counted as if units had one tile each, which is what `finish` takes."""
    parts = grid.work.parts
    tile = number // parts
    own = tile // grid.row_tiles * CONSUMERS + NUMBER
    return (own * grid.row_tiles + tile % grid.row_tiles) * parts + number % parts


@gluon.jit
def _multiply(
    ring,
    work,
    result,
    NUMBER: gl.constexpr,
    WORDS: gl.constexpr,
    GATED: gl.constexpr,
    SPLIT: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    """Run consumer `NUMBER`: sum its tile in each of the program's units."""
    CONSUMERS: gl.constexpr = ring.codes.shape[0] // ring.full.shape[0]
    ROWS: gl.constexpr = ring.rows.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 32])
    grid = make_grid(work, CONSUMERS * _OUTS, ROWS, False)
    total = count_steps(gl.program_id(0), grid)
    stage, phase, done = 0, 0, 0
    first = gl.zeros((_OUTS, 4, 4), gl.int32, WORDS), gl.zeros((_OUTS, 4, 4), gl.int32, WORDS)
    if total > 0:
        mbarrier.wait(ring.full.index(0), 0)
        first = _numbers_of(ring, NUMBER, 0, WORDS)
    for number in range(gl.program_id(0), grid.units, grid.programs):
        own = _tile_of(number, grid, NUMBER, CONSUMERS)
        scale = output_scales(result.scales, unit_of(own, grid, _OUTS, ROWS), work.num_outs, _OUTS, layout)
        acc = gl.zeros((_OUTS, ROWS), gl.float32, layout)
        for _ in range(num_steps(number % work.parts, grid)):
            # While the tensor cores multiply the numbers of one group, those of the next are looked up. The two are in different
            # registers. Otherwise the compiler would wait for the tensor cores after each of their instructions.
            rows = ring.rows.index(stage)
            acc = _multiply_group(first, rows, acc, 0)
            second = _numbers_of(ring, stage * CONSUMERS + NUMBER, 1, WORDS)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            acc = _multiply_group(second, rows, acc, 1)
            done += 1
            now = stage
            # After the last step its own numbers are looked up again, because a branch would make the compiler wait too.
            later_stage, later_phase = next_stage(stage, phase, ring.full.shape[0])
            stage, phase = (
                gl.where(done < total, later_stage, stage),
                gl.where(done < total, later_phase, phase),
            )
            mbarrier.wait(ring.full.index(stage), phase)
            first = _numbers_of(ring, stage * CONSUMERS + NUMBER, 0, WORDS)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(ring.empty.index(now), count=1)
        finish(
            acc * scale[:, None], own, grid, result.bias, result.out, None, result.factor,
            GATED, SPLIT, HAS_BIAS, False, False,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["num_rows", "parts", "all_steps"])
def _codes_kernel(
    codes,
    tables,
    x,
    scales,
    bias,
    out,
    num_rows,
    num_outs,
    parts,
    all_steps,
    factor,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    REGISTERS: gl.constexpr,
    WORDS: gl.constexpr,
    GATED: gl.constexpr,
    SPLIT: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    CHAINED: gl.constexpr,
):
    ring = CodeRing(
        gl.allocate_shared_memory(gl.int32, [STAGES * CONSUMERS, 8, 256], codes.layout),
        gl.allocate_shared_memory(gl.int32, [STAGES * CONSUMERS, 256], tables.layout),
        gl.allocate_shared_memory(x.dtype, [STAGES, ROWS, _INS], x.layout),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
    )
    for i in gl.static_range(STAGES):
        mbarrier.init(ring.full.index(i), count=2)
        mbarrier.init(ring.empty.index(i), count=CONSUMERS)
    if CHAINED:
        gdc_launch_dependents()
    # Each part is one leaf of the tree that `add_rms_norm` sums.
    one, none = gl.to_tensor(1), gl.to_tensor(0)
    work = Work(num_rows, num_rows, num_outs, parts, one, all_steps, parts, none)
    result = Result(scales, bias, out, factor)
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (_multiply, (ring, work, result, 0, WORDS, GATED, SPLIT, HAS_BIAS)),
                (load_codes, (codes, tables, ring, work)),
                (load_rows, (x, ring, work, CHAINED)),
            ],
            [1, 1],
            [_PRODUCER_REGISTERS, _PRODUCER_REGISTERS],
        )
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_multiply, (ring, work, result, 0, WORDS, GATED, SPLIT, HAS_BIAS)),
                (_multiply, (ring, work, result, 1, WORDS, GATED, SPLIT, HAS_BIAS)),
                (load_codes, (codes, tables, ring, work)),
                (load_rows, (x, ring, work, CHAINED)),
            ],
            [4, 1, 1],
            [REGISTERS, _PRODUCER_REGISTERS, _PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (ring, work, result, 0, WORDS, GATED, SPLIT, HAS_BIAS)),
                (_multiply, (ring, work, result, 1, WORDS, GATED, SPLIT, HAS_BIAS)),
                (_multiply, (ring, work, result, 2, WORDS, GATED, SPLIT, HAS_BIAS)),
                (load_codes, (codes, tables, ring, work)),
                (load_rows, (x, ring, work, CHAINED)),
            ],
            [4, 4, 1, 1],
            [REGISTERS, REGISTERS, _PRODUCER_REGISTERS, _PRODUCER_REGISTERS],
        )


@cache
def words_layout() -> gl.DistributedLinearLayout:
    """The words of a group of a tile [outs, 4, 4] that a thread holds: those of its numbers in an operand of wgmma."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 2], [32, 0, 0]],
        lane_bases=[[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[8, 0, 0], [16, 0, 0]],
        block_bases=[],
        shape=[TILE_OUTS, 4, 4],
    )


def launch_registers(row_tile: int, consumers: int) -> int:
    """Registers per thread when a program begins. The two producer warps then give most of theirs to the consumers."""
    wanted = (consumers * _REGISTERS[row_tile] + _PRODUCER_REGISTERS.value) / (consumers + 1)
    return max(_LEAST_REGISTERS if row_tile == 128 else 0, 8 * ceil(wanted / 8))


def _cycles(tiles: int, programs: int, consumers: int) -> int:
    """About how many cycles each step of all tiles takes: those of the program that has the most units."""
    return ceil(ceil(tiles / consumers) / programs) * _STEP_CYCLES[consumers - 1]


@cache
def num_consumers(tiles: int, programs: int, row_tile: int) -> int:
    """How many tiles a unit has, so that the program with the most units is done soonest.

    With 128 rows, the tensor cores are busy with one tile, and more tiles take longer (H200).
    """
    most = 3 if row_tile <= 64 else 1
    return min(range(1, most + 1), key=lambda count: _cycles(tiles, programs, count))


@cache
def num_parts(rows: int, outs: int, ins: int) -> int:
    """Split-K parts of a layer whose result goes into the residual stream: so many that the GPU is done soonest."""
    row_tile = rows_of_tile(rows, *_REGISTERS)

    def cycles(parts: int) -> int:
        tiles = ceil(outs / TILE_OUTS) * ceil(rows / row_tile) * parts
        consumers = num_consumers(tiles, SMS, row_tile)
        return _cycles(tiles, SMS, consumers) * ceil(ins / TILE_INS / parts)

    return min(
        (parts for parts in (1, 2, MOST_PARTS) if parts == 1 or ins >= parts * SHORTEST_PART), key=cycles
    )


def launch(
    x: Tensor,
    layer: CodeLayer,
    out: Tensor,
    parts: int,
    rounding: Rounding | None = None,
    *,
    consumers: int | None = None,
) -> None:
    """Write the result of `layer` to out. x: e4m3. The arguments are those of `hopper.launch`.

    consumers: for tests and measurements; None for the usual number.
    """
    rows, ins = x.shape
    row_tile = rows_of_tile(rows, *_REGISTERS)
    programs = num_sms(x.device)
    tiles = ceil(layer.outs / TILE_OUTS) * ceil(rows / row_tile) * parts
    consumers = consumers or num_consumers(tiles, programs, row_tile)
    bias = layer.bias if out.dim() == 2 else None
    factor, _ = stored_as(rounding)
    stage_bytes = consumers * (TILE_OUTS * TILE_INS // 2 + 16 * TILE_OUTS) + row_tile * TILE_INS
    stages = RING_BYTES // stage_bytes
    assert stages >= 2, "a consumer waits for the next stage before it gives one back"
    _codes_kernel[(programs,)](
        tiles_of(layer.codes, 8, 256, swizzled=False),
        tiles_of(layer.tables.view(-1), 256),
        tiles_of(x, row_tile, TILE_INS),
        layer.scales,
        out if bias is None else bias,
        out,
        rows,
        layer.outs,
        parts,
        ceil(ins / TILE_INS),
        factor,
        ROWS=row_tile,
        STAGES=stages,
        CONSUMERS=consumers,
        REGISTERS=_REGISTERS[row_tile],
        WORDS=words_layout(),
        GATED=layer.interleaved,
        SPLIT=parts > 1,
        HAS_BIAS=bias is not None,
        num_warps=4,
        maxnreg=launch_registers(row_tile, consumers),
        **chaining(),
    )
