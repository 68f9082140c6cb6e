"""The linear kernel for few rows of weights in 12 bits on Hopper: three quarters of the bytes, and the bits of `hopper`.

The warps of a program have different tasks: one loads weights, another input rows, into a ring of tiles in shared memory. Four
take the two planes of a step's weights into registers, widen them there to bfloat16 (see `lossless`), set the exceptions, and
multiply. The weights are those of the bfloat16 layer times a power of two for each output. The sums are divided by it in the
end, which changes no bit of their mantissas. They are made in the order of `hopper`, by the same instructions on operands from
registers.

Written in Gluon, Triton's language for explicit shared memory and copies; there is no interpreter for it.
"""

from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents

from orthrus.kernels.device import chaining, has_warpgroup_mma, multiprocessors
from orthrus.kernels.gluon_names import HAS_REINTERPRET
from orthrus.kernels.leaves import Leaves
from orthrus.kernels.linear.descriptors import tiles_of
from orthrus.kernels.linear.hopper import MOST_ROWS
from orthrus.kernels.linear.lossless_ring import Ring, load_rows, load_weights
from orthrus.kernels.linear.stream import (
    REGISTERS,
    RING_BYTES,
    Work,
    leaf_begin,
    make_grid,
    next_place,
    unit_of,
)
from orthrus.kernels.linear.stream_finish import Picking, finish, join_leaf, scale_outputs
from orthrus.kernels.linear.tiles import rows_of_tile
from orthrus.kernels.linear.types import LosslessLayer
from orthrus.kernels.lossless_sizes import ENTRIES, TILE_INS, TILE_OUTS


@gluon.jit
def _widen(even, odd, low):
    """A quarter of a step, 32 inputs: words of the first plane [outs, 4] for the first and the last 16, and of the second plane
    [outs, 4] -> bfloat16 [outs, 32]."""
    OUTS: gl.constexpr = low.shape[0]
    # s, m and n are the places of sign, exponent with upper mantissa, and lower mantissa (see `lossless`), and e is exponent 112.
    # 0xea stands for "(first and second) or third".
    n0, n1, n2, n3, n4, n5, n6, n7 = gl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, c, s, m, n, e;
        mov.b32 s, 0x80008000; mov.b32 m, 0x07f007f0; mov.b32 n, 0x000f000f; mov.b32 e, 0x38003800;
        shr.u32 b, $8, 4; lop3.b32 c, $12, n, e, 0xea;
        lop3.b32 b, b, m, c, 0xea; lop3.b32 $0, $8, s, b, 0xea;
        shr.u32 c, $12, 4; shl.b32 b, $8, 4; shl.b32 a, $8, 8; lop3.b32 c, c, n, e, 0xea;
        lop3.b32 b, b, m, c, 0xea; lop3.b32 $1, a, s, b, 0xea;
        shr.u32 c, $12, 8; shr.u32 b, $10, 4; lop3.b32 c, c, n, e, 0xea;
        lop3.b32 b, b, m, c, 0xea; lop3.b32 $2, $10, s, b, 0xea;
        shr.u32 c, $12, 12; shl.b32 b, $10, 4; shl.b32 a, $10, 8; lop3.b32 c, c, n, e, 0xea;
        lop3.b32 b, b, m, c, 0xea; lop3.b32 $3, a, s, b, 0xea;
        shr.u32 b, $9, 4; lop3.b32 c, $13, n, e, 0xea;
        lop3.b32 b, b, m, c, 0xea; lop3.b32 $4, $9, s, b, 0xea;
        shr.u32 c, $13, 4; shl.b32 b, $9, 4; shl.b32 a, $9, 8; lop3.b32 c, c, n, e, 0xea;
        lop3.b32 b, b, m, c, 0xea; lop3.b32 $5, a, s, b, 0xea;
        shr.u32 c, $13, 8; shr.u32 b, $11, 4; lop3.b32 c, c, n, e, 0xea;
        lop3.b32 b, b, m, c, 0xea; lop3.b32 $6, $11, s, b, 0xea;
        shr.u32 c, $13, 12; shl.b32 b, $11, 4; shl.b32 a, $11, 8; lop3.b32 c, c, n, e, 0xea;
        lop3.b32 b, b, m, c, 0xea; lop3.b32 $7, a, s, b, 0xea;
        }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r",
        [even, odd, low],
        dtype=[gl.bfloat16] * 8,
        is_pure=True,
        pack=2,
    )
    # A thread has words of two outputs, 8 apart, side by side in registers. They give the first and the second neighbours of
    # four eights, of the one output and then of the other.
    first = gl.join(gl.join(n0, n1), gl.join(n2, n3))
    second = gl.join(gl.join(n4, n5), gl.join(n6, n7))
    parts = gl.join(first, second).reshape((OUTS // 16, 2, 8, 4, 2, 2, 2))
    return parts.permute((0, 6, 2, 5, 4, 3, 1)).reshape((OUTS, 32))


@gluon.jit
def _quarter(ring, place, QUARTER: gl.constexpr, HIGH: gl.constexpr, LOW: gl.constexpr):
    """A quarter of a step's weights, without exceptions: bfloat16 [outs, 32]."""
    words = ring.high.index(place).slice(8 * QUARTER, 8, dim=1).load(HIGH)
    even, odd = words.reshape((words.shape[0], 2, 4)).permute((0, 2, 1)).split()
    low = ring.low.index(place).slice(4 * QUARTER, 4, dim=1).load(LOW)
    return _widen(gl.convert_layout(even, LOW), gl.convert_layout(odd, LOW), low)


@gluon.jit
def _entry(lists, number):
    """An entry of the lists of exceptions, as every thread reads it."""
    return gl.max(lists.index(number).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


@gluon.jit
def _put(numbers, lists, first, ends, QUARTER: gl.constexpr):
    """A quarter's weights with its exceptions in place. first: the number of the step's list."""
    layout: gl.constexpr = numbers.type.layout
    out = gl.arange(0, numbers.shape[0], gl.SliceLayout(1, layout))
    column = gl.arange(0, 32, gl.SliceLayout(0, layout))
    places = out[:, None] * 128 + column[None, :] + 32 * QUARTER
    begin = 0 if QUARTER == 0 else ends >> (8 * QUARTER - 8) & 255
    for number in range(begin, ends >> 8 * QUARTER & 255):
        entry = _entry(lists, first + number + 1)
        value = (entry >> 16).to(gl.int16).to(gl.bfloat16, bitcast=True)
        numbers = gl.where(places == (entry & 0xFFFF), value, numbers)
    return numbers


@gluon.jit
def _weights(ring, lists, place, phase, layout: gl.constexpr, HIGH: gl.constexpr, LOW: gl.constexpr):
    """A step's weights as the matrix unit takes them from registers, once they are there: bfloat16 [outs, depth]."""
    OUTS: gl.constexpr = ring.high.shape[1]
    ENTRIES: gl.constexpr = ring.exceptions.shape[1]
    mbarrier.wait(ring.full.index(place), phase)
    # A byte for each quarter: how many exceptions it and those before it have.
    ends = _entry(lists, (place + 1) * ENTRIES - 1)
    one = _quarter(ring, place, 0, HIGH, LOW)
    two = _quarter(ring, place, 1, HIGH, LOW)
    three = _quarter(ring, place, 2, HIGH, LOW)
    four = _quarter(ring, place, 3, HIGH, LOW)
    if ends != 0:
        first = place * ENTRIES
        one = _put(one, lists, first, ends, 0)
        two = _put(two, lists, first, ends, 1)
        three = _put(three, lists, first, ends, 2)
        four = _put(four, lists, first, ends, 3)
    numbers = gl.join(gl.join(one, two), gl.join(three, four)).permute((0, 3, 2, 1)).reshape((OUTS, 128))
    return gl.convert_layout(numbers, gl.DotOperandLayout(0, layout, 2))


@gluon.jit
def _add_steps(acc, ring, lists, place, phase, steps, HIGH: gl.constexpr, LOW: gl.constexpr):
    """Add the products of so many steps to acc; also where the ring is afterwards."""
    PLACES: gl.constexpr = ring.full.shape[0]
    layout: gl.constexpr = acc.type.layout
    # The weights of a step are widened while those of the step before it are multiplied. They take turns in two sets of
    # registers, since the matrix unit still reads the other set.
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    even = gl.full((ring.high.shape[1], 128), 0.0, gl.bfloat16, OPERAND)
    odd = even
    acc = warpgroup_mma_init(acc)
    last = place
    for step in range(0, steps, 2):
        even = _weights(ring, lists, place, phase, layout, HIGH, LOW)
        acc, odd = warpgroup_mma_wait(0, deps=(acc, odd))
        mbarrier.arrive(ring.empty.index(last), count=1, pred=step > 0)
        acc = warpgroup_mma(even, ring.rows.index(place).permute((1, 0)), acc, is_async=True)
        last = place
        place, phase = next_place(place, phase, PLACES)
        if step + 1 < steps:
            odd = _weights(ring, lists, place, phase, layout, HIGH, LOW)
            acc, even = warpgroup_mma_wait(0, deps=(acc, even))
            mbarrier.arrive(ring.empty.index(last), count=1)
            acc = warpgroup_mma(odd, ring.rows.index(place).permute((1, 0)), acc, is_async=True)
            last = place
            place, phase = next_place(place, phase, PLACES)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(ring.empty.index(last), count=1, pred=steps > 0)
    return acc, place, phase


@gluon.jit
def _multiply(
    ring,
    work,
    scales,
    bias,
    out,
    picking,
    HIGH: gl.constexpr,
    LOW: gl.constexpr,
    TREE: gl.constexpr,
    TWO_VIEWS: gl.constexpr,
    GATED: gl.constexpr,
    SPLIT: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    PICKS: gl.constexpr,
):
    """Sum the units of a program, and store them or pick from them."""
    OUTS: gl.constexpr = ring.high.shape[1]
    ROWS: gl.constexpr = ring.rows.shape[1]
    COUNT: gl.constexpr = ring.exceptions.shape[0] * ring.exceptions.shape[1]
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, ROWS, 16])
    if HAS_REINTERPRET:
        lists = ring.exceptions.reinterpret(gl.int32, [COUNT, 1], FLAT)
    else:
        lists = ring.exceptions._reinterpret(gl.int32, [COUNT, 1], FLAT)
    grid = make_grid(work, OUTS, ROWS, TWO_VIEWS)
    place, phase = 0, 0
    for number in range(gl.program_id(0), grid.units, grid.programs):
        first = number % grid.parts * TREE
        acc = gl.zeros((OUTS, ROWS), gl.float32, layout)
        one, two, four = acc, acc, acc
        for leaf in range(TREE):
            steps = leaf_begin(first + leaf + 1, grid) - leaf_begin(first + leaf, grid)
            acc = gl.zeros((OUTS, ROWS), gl.float32, layout)
            acc, place, phase = _add_steps(acc, ring, lists, place, phase, steps, HIGH, LOW)
            acc, one, two, four = join_leaf(acc, leaf, one, two, four, TREE)
        acc = scale_outputs(acc, scales, unit_of(number, grid, OUTS, ROWS), work.num_outs)
        finish(acc, number, grid, bias, out, picking, GATED, SPLIT, HAS_BIAS, PICKS)


@gluon.jit(do_not_specialize=["num_rows", "parts", "units", "leaves", "first_leaf", "first_token"])
def _lossless_stream_kernel(
    high,
    low,
    exceptions,
    x,
    scales,
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
    parts,
    units,
    leaves,
    first_leaf,
    row_steps,
    first_token,
    OUTS: gl.constexpr,
    ROWS: gl.constexpr,
    DEPTH: gl.constexpr,
    PLACES: gl.constexpr,
    HIGH: gl.constexpr,
    LOW: gl.constexpr,
    TREE: gl.constexpr,
    TWO_VIEWS: gl.constexpr,
    GATED: gl.constexpr,
    SPLIT: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    PICKS: gl.constexpr,
    CHAINED: gl.constexpr,
):
    ring = Ring(
        gl.allocate_shared_memory(gl.int32, [PLACES, OUTS, DEPTH // 4], high.layout),
        gl.allocate_shared_memory(gl.int32, [PLACES, OUTS, DEPTH // 8], low.layout),
        gl.allocate_shared_memory(gl.int32, [PLACES, exceptions.block_type.shape[0]], exceptions.layout),
        gl.allocate_shared_memory(x.dtype, [PLACES, ROWS, DEPTH], x.layout),
        gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout()),
    )
    for i in gl.static_range(PLACES):
        mbarrier.init(ring.full.index(i), count=2)
        mbarrier.init(ring.empty.index(i), count=1)
    if CHAINED:
        gdc_launch_dependents()
    tree = gl.to_tensor(TREE)
    work = Work(num_ar, num_rows, num_outs, parts, tree, units, leaves, first_leaf)
    picking = Picking(temperatures, keys, out_wanted, values, indices, first_token)
    gl.warp_specialize(
        [
            (_multiply, (
                ring, work, scales, bias, out, picking, HIGH, LOW, TREE, TWO_VIEWS, GATED, SPLIT, HAS_BIAS, PICKS,
            )),
            (load_weights, (high, low, exceptions, ring, work, row_steps, ROWS, TWO_VIEWS)),
            (load_rows, (x, ring, work, TWO_VIEWS, CHAINED)),
        ],
        [1, 1],
        [24, 24],
    )  # fmt: skip


@cache
def words_layout(columns: int) -> gl.DistributedLinearLayout:
    """Which words of a quarter of a tile [outs, 4 or 8] a thread has: those whose numbers the matrix unit takes from it."""
    return gl.DistributedLinearLayout(
        reg_bases=[[8, 0]] if columns == 4 else [[8, 0], [0, 4]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[TILE_OUTS, columns],
    )


def streams(x: Tensor) -> bool:
    """Whether `launch` takes these rows x [rows, in_features]."""
    return x.shape[0] <= MOST_ROWS and x.dtype == torch.bfloat16 and has_warpgroup_mma()


def launch(
    x: Tensor,
    layer: LosslessLayer,
    out: Tensor,
    num_ar: Tensor | None,
    parts: int,
    picking: tuple[Tensor, ...] = (),
    inputs: Leaves | None = None,
    first_token: int = 0,
) -> None:
    """Compute `layer` into out; the arguments are those of `hopper.launch`."""
    rows, ins = x.shape
    outs, views = layer.outs, layer.scales.shape[0]
    row_tile = rows_of_tile(rows, 8, 16, 32, 64)
    inputs = inputs or Leaves.whole(ins, TILE_INS, 1)
    assert inputs.unit == TILE_INS and inputs.count % parts == 0, (inputs, parts)
    bias = layer.bias if out.dim() == 2 else None
    step_bytes = TILE_OUTS * TILE_INS * 3 // 2 + 4 * ENTRIES + 2 * row_tile * TILE_INS

    _lossless_stream_kernel[(multiprocessors(x.device),)](
        tiles_of(layer.high, TILE_OUTS, TILE_INS // 4),
        tiles_of(layer.low, TILE_OUTS, TILE_INS // 8),
        tiles_of(layer.exceptions.view(-1), ENTRIES),
        tiles_of(x, row_tile, TILE_INS),
        layer.scales,
        out if bias is None else bias,
        out,
        out if num_ar is None else num_ar,
        *(picking or 5 * (out,)),
        rows,
        outs,
        parts,
        inputs.units,
        inputs.total,
        inputs.first,
        ins // TILE_INS,
        first_token,
        OUTS=TILE_OUTS,
        ROWS=row_tile,
        DEPTH=TILE_INS,
        PLACES=RING_BYTES // step_bytes,
        HIGH=words_layout(8),
        LOW=words_layout(4),
        TREE=inputs.count // parts,
        TWO_VIEWS=views > 1,
        GATED=layer.interleaved,
        SPLIT=parts > 1,
        HAS_BIAS=bias is not None,
        PICKS=bool(picking),
        num_warps=4,
        maxnreg=REGISTERS,
        **chaining(),
    )
