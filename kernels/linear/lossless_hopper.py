"""The linear kernel for few rows of weights in 12 bits on Hopper: three quarters of the bytes, and the bits of `hopper`.

The kernel is persistent and warp-specialized, with two ring buffers in shared memory. Their stages hold a step each: those of the
first, the *packed stages*, hold weights in 12 bits. Those of the second, the *wide stages*, hold bfloat16 weights and input rows.
One producer warp loads the packed stages, and another loads the input rows of the wide stages. Three warpgroups, the *wideners*,
take turns at the steps: each loads the two planes of a step's weights into registers, widens them to bfloat16 (see `lossless`),
stores them to a wide stage, and puts the exceptions in place. A consumer warpgroup multiplies what the wide stages hold.

The weights in the wide stages are those of the bfloat16 layer times a power of two for each output. At the end the sums are
divided by it, which changes no bit of their mantissas. They are summed in the order of `hopper`, by the same instructions.

Written in Gluon, Triton's language for explicit shared memory and copies. Gluon has no interpreter.
"""

from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents

from orthrus.kernels.device import chaining, has_warpgroup_mma, num_sms
from orthrus.kernels.gluon_names import in_rows
from orthrus.kernels.leaves import Leaves
from orthrus.kernels.linear.descriptors import tiles_of
from orthrus.kernels.linear.lossless_ring import LosslessRings, load_rows, load_weights
from orthrus.kernels.linear.stream import (
    Work,
    count_steps,
    leaf_begin,
    make_grid,
    next_stage,
    unit_of,
)
from orthrus.kernels.linear.stream_finish import Picking, finish, join_leaf, output_scales
from orthrus.kernels.linear.tiles import rows_of_tile
from orthrus.kernels.linear.types import LosslessLayer
from orthrus.kernels.lossless_sizes import ENTRIES, TILE_INS, TILE_OUTS

_MOST_ROWS = 128
"""Rows of the largest tile. For more rows weights would be widened several times, so the layer is written out in full first."""
_RING_BYTES = 227_000
"""Bytes of both rings."""
_WIDENERS = gl.constexpr(3)
"""Warpgroups that widen."""
_WIDENER_REGISTERS = gl.constexpr(88)
"""Registers per thread of these warpgroups."""
REGISTERS = 96
"""Registers per thread when a program begins, see `stream.REGISTERS`. These programs have more threads."""
_ENTRIES, _INS, _OUTS = gl.constexpr(ENTRIES), gl.constexpr(TILE_INS), gl.constexpr(TILE_OUTS)
WIDE_TILE = gl.NVMMASharedLayout.get_default_for([TILE_OUTS, TILE_INS], gl.bfloat16)


@gluon.jit
def _widen(even, odd, low):
    """A quarter of a step, 32 inputs: words of the first plane [outs, 4] for the first and the last 16, and of the second plane
    [outs, 4] -> bfloat16 [outs, 32]."""
    OUTS: gl.constexpr = low.shape[0]
    # s, m and n mask the sign, the exponent with the upper mantissa, and the lower mantissa (see `lossless`). e is `EXPONENT`.
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
    joined = gl.join(first, second).reshape((OUTS // 16, 2, 8, 4, 2, 2, 2))
    return joined.permute((0, 6, 2, 5, 4, 3, 1)).reshape((OUTS, 32))


@gluon.jit
def _quarter(rings, stage, QUARTER: gl.constexpr, HIGH: gl.constexpr, LOW: gl.constexpr):
    """A quarter of a step's weights, without exceptions: bfloat16 [outs, 32]."""
    words = rings.high.index(stage).slice(8 * QUARTER, 8, dim=1).load(HIGH)
    even, odd = words.reshape((words.shape[0], 2, 4)).permute((0, 2, 1)).split()
    low = rings.low.index(stage).slice(4 * QUARTER, 4, dim=1).load(LOW)
    return _widen(gl.convert_layout(even, LOW), gl.convert_layout(odd, LOW), low)


@gluon.jit
def _entry(lists, number):
    """An entry of the lists of exceptions, which every thread gets."""
    return gl.max(lists.index(number).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


@gluon.jit
def _put(tile, entry):
    """Put an exception in place in a tile of widened weights."""
    out, column = (entry & 0xFFFF) // _INS, entry & _INS - 1
    # The tile is stored in halves of 64 inputs. In each, runs of 8 inputs are swizzled by the output.
    at = column // 64 * (_OUTS * 64) + out * 64 + (column & 63 ^ (out & 7) * 8)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    value = (entry >> 16).to(gl.int16).to(gl.bfloat16, bitcast=True)
    # Indexed in two steps: with one long row, compiling the comparison of indices takes long.
    row = in_rows(tile, _OUTS, _INS).index(at // _INS)
    in_rows(row, _INS, 1).index(at % _INS).store(gl.full((1,), value, gl.bfloat16, layout))


@gluon.jit
def _widen_steps(
    rings, work, FIRST: gl.constexpr, HIGH: gl.constexpr, LOW: gl.constexpr, TWO_VIEWS: gl.constexpr
):
    """Run a widener: every `_WIDENERS`-th step of a program, from step `FIRST` on."""
    PACKED_STAGES: gl.constexpr = rings.packed_full.shape[0]
    WIDE_STAGES: gl.constexpr = rings.wide_full.shape[0]
    grid = make_grid(work, _OUTS, rings.rows.shape[1], TWO_VIEWS)
    lists = in_rows(rings.exceptions, PACKED_STAGES * _ENTRIES, 1)
    packed_stage, packed_phase, wide_stage, wide_phase = FIRST, 0, FIRST, 1
    for _ in range(FIRST, count_steps(gl.program_id(0), grid), _WIDENERS):
        mbarrier.wait(rings.packed_full.index(packed_stage), packed_phase)
        count = _entry(lists, packed_stage * _ENTRIES)
        one = _quarter(rings, packed_stage, 0, HIGH, LOW)
        two = _quarter(rings, packed_stage, 1, HIGH, LOW)
        three = _quarter(rings, packed_stage, 2, HIGH, LOW)
        four = _quarter(rings, packed_stage, 3, HIGH, LOW)
        joined = gl.join(gl.join(one, two), gl.join(three, four)).permute((0, 3, 2, 1))
        mbarrier.wait(rings.wide_empty.index(wide_stage), wide_phase)
        # One store, since a barrier follows each.
        rings.wide.index(wide_stage).store(joined.reshape((_OUTS, _INS)))
        for number in range(1, count + 1):
            _put(rings.wide.index(wide_stage), _entry(lists, packed_stage * _ENTRIES + number))
        fence_async_shared()
        mbarrier.arrive(rings.packed_empty.index(packed_stage), count=1)
        mbarrier.arrive(rings.wide_full.index(wide_stage), count=1)
        packed_stage, packed_phase = next_stage(packed_stage, packed_phase, PACKED_STAGES, _WIDENERS)
        wide_stage, wide_phase = next_stage(wide_stage, wide_phase, WIDE_STAGES, _WIDENERS)


@gluon.jit
def _multiply(
    rings,
    work,
    scales,
    bias,
    out,
    picking,
    PART_LEAVES: gl.constexpr,
    TWO_VIEWS: gl.constexpr,
    GATED: gl.constexpr,
    SPLIT: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    PICKS: gl.constexpr,
):
    """Run the consumer: sum the units of a program, and store the sums or pick from them."""
    OUTS: gl.constexpr = rings.high.shape[1]
    ROWS: gl.constexpr = rings.rows.shape[1]
    WIDE_STAGES: gl.constexpr = rings.wide_full.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, ROWS, 16])
    grid = make_grid(work, OUTS, ROWS, TWO_VIEWS)
    stage, phase, last = 0, 0, 0
    for number in range(gl.program_id(0), grid.units, grid.programs):
        first = number % grid.work.parts * PART_LEAVES
        acc = gl.zeros((OUTS, ROWS), gl.float32, layout)
        one, two, four = acc, acc, acc
        scale = output_scales(scales, unit_of(number, grid, OUTS, ROWS), work.num_outs, OUTS, layout)
        for leaf in range(PART_LEAVES):
            acc = gl.zeros((OUTS, ROWS), gl.float32, layout)
            steps = leaf_begin(first + leaf + 1, grid) - leaf_begin(first + leaf, grid)
            for step in range(steps):
                mbarrier.wait(rings.wide_full.index(stage), phase)
                acc = warpgroup_mma(
                    rings.wide.index(stage), rings.rows.index(stage).permute((1, 0)), acc, is_async=True
                )
                # Now the product of the previous step is complete, and its stage is empty.
                acc = warpgroup_mma_wait(1, deps=(acc,))
                mbarrier.arrive(rings.wide_empty.index(last), count=1, pred=step > 0)
                last = stage
                stage, phase = next_stage(stage, phase, WIDE_STAGES)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(rings.wide_empty.index(last), count=1, pred=steps > 0)
            acc, one, two, four = join_leaf(acc, leaf, one, two, four, PART_LEAVES)
        acc *= scale[:, None]
        finish(acc, number, grid, bias, out, picking, 1.0, GATED, SPLIT, HAS_BIAS, PICKS, False)


@gluon.jit(do_not_specialize=["num_rows", "parts", "all_steps", "all_leaves", "first_leaf", "first_token"])
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
    all_steps,
    all_leaves,
    first_leaf,
    row_steps,
    first_token,
    OUTS: gl.constexpr,
    ROWS: gl.constexpr,
    DEPTH: gl.constexpr,
    PACKED_STAGES: gl.constexpr,
    WIDE_STAGES: gl.constexpr,
    WIDE_TILE: gl.constexpr,
    HIGH: gl.constexpr,
    LOW: gl.constexpr,
    PART_LEAVES: gl.constexpr,
    TWO_VIEWS: gl.constexpr,
    GATED: gl.constexpr,
    SPLIT: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    PICKS: gl.constexpr,
    CHAINED: gl.constexpr,
):
    rings = LosslessRings(
        gl.allocate_shared_memory(gl.int32, [PACKED_STAGES, OUTS, DEPTH // 4], high.layout),
        gl.allocate_shared_memory(gl.int32, [PACKED_STAGES, OUTS, DEPTH // 8], low.layout),
        gl.allocate_shared_memory(
            gl.int32, [PACKED_STAGES, exceptions.block_type.shape[0]], exceptions.layout
        ),
        gl.allocate_shared_memory(gl.bfloat16, [WIDE_STAGES, OUTS, DEPTH], WIDE_TILE),
        gl.allocate_shared_memory(x.dtype, [WIDE_STAGES, ROWS, DEPTH], x.layout),
        gl.allocate_shared_memory(gl.int64, [PACKED_STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [PACKED_STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [WIDE_STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [WIDE_STAGES, 1], mbarrier.MBarrierLayout()),
    )
    for i in gl.static_range(PACKED_STAGES):
        mbarrier.init(rings.packed_full.index(i), count=1)
        mbarrier.init(rings.packed_empty.index(i), count=1)
    for i in gl.static_range(WIDE_STAGES):
        mbarrier.init(rings.wide_full.index(i), count=2)
        mbarrier.init(rings.wide_empty.index(i), count=1)
    if CHAINED:
        gdc_launch_dependents()
    part_leaves = gl.to_tensor(PART_LEAVES)
    work = Work(num_ar, num_rows, num_outs, parts, part_leaves, all_steps, all_leaves, first_leaf)
    picking = Picking(temperatures, keys, out_wanted, values, indices, first_token)
    gl.warp_specialize(
        [
            (_multiply, (
                rings, work, scales, bias, out, picking,
                PART_LEAVES, TWO_VIEWS, GATED, SPLIT, HAS_BIAS, PICKS,
            )),
            (_widen_steps, (rings, work, 0, HIGH, LOW, TWO_VIEWS)),
            (_widen_steps, (rings, work, 1, HIGH, LOW, TWO_VIEWS)),
            (_widen_steps, (rings, work, 2, HIGH, LOW, TWO_VIEWS)),
            (load_weights, (high, low, exceptions, rings, work, row_steps, ROWS, TWO_VIEWS)),
            (load_rows, (x, rings, work, TWO_VIEWS, CHAINED)),
        ],
        [4, 4, 4, 1, 1],
        [_WIDENER_REGISTERS, _WIDENER_REGISTERS, _WIDENER_REGISTERS, 24, 24],
    )  # fmt: skip


@cache
def words_layout(columns: int) -> gl.DistributedLinearLayout:
    """The words of a quarter of a tile [outs, 4 or 8] that a thread holds: those of its numbers in an operand of wgmma."""
    return gl.DistributedLinearLayout(
        reg_bases=[[8, 0]] if columns == 4 else [[8, 0], [0, 4]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[TILE_OUTS, columns],
    )


@cache
def num_stages(row_tile: int) -> tuple[int, int]:
    """Number of packed stages and of wide stages, for tiles of `row_tile` rows.

    With more wide stages, the wideners can go on while the consumer finishes a unit.

    The phase of an mbarrier has one bit. It tells a round of a stage from the previous round, but not from the one before that.
    So the previous round must be over when a widener waits for its next step i. This widener has done step i - `_WIDENERS`, so
    all steps up to i - `_WIDENERS` - wide_stages have been multiplied. The previous round of the packed stage was step
    i - packed_stages. It must be one of these steps, so packed_stages >= wide_stages + `_WIDENERS`. In the same way,
    wide_stages >= `_WIDENERS`.
    """
    packed_bytes = TILE_OUTS * TILE_INS * 3 // 2 + 4 * ENTRIES
    wide_bytes = 2 * (TILE_OUTS + row_tile) * TILE_INS

    def packed_stages(wide_stages: int) -> int:
        return (_RING_BYTES - wide_stages * wide_bytes) // packed_bytes

    wide_stages = max(count for count in range(1, 9) if packed_stages(count) >= count + _WIDENERS.value)
    assert wide_stages >= _WIDENERS.value, (row_tile, wide_stages)
    return packed_stages(wide_stages), wide_stages


def streams(x: Tensor) -> bool:
    """Whether `launch` takes these rows x [rows, in_features]."""
    return x.shape[0] <= _MOST_ROWS and x.dtype == torch.bfloat16 and has_warpgroup_mma()


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
    """Write the result of `layer` to out. The arguments are those of `hopper.launch`."""
    rows, ins = x.shape
    outs, views = layer.outs, layer.scales.shape[0]
    # With picks or many leaves in a part, the registers do not hold a tile of 128 rows.
    most_rows = 128 if not picking and (inputs is None or inputs.count <= 2 * parts) else 64
    row_tile = min(most_rows, rows_of_tile(rows, 8, 16, 32, 64, 128))
    inputs = inputs or Leaves.whole(ins, TILE_INS, 1)
    assert inputs.unit == TILE_INS and inputs.count % parts == 0, (inputs, parts)
    bias = layer.bias if out.dim() == 2 else None
    packed_stages, wide_stages = num_stages(row_tile)
    _lossless_stream_kernel[(num_sms(x.device),)](
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
        PACKED_STAGES=packed_stages,
        WIDE_STAGES=wide_stages,
        WIDE_TILE=WIDE_TILE,
        HIGH=words_layout(8),
        LOW=words_layout(4),
        PART_LEAVES=inputs.count // parts,
        TWO_VIEWS=views > 1,
        GATED=layer.interleaved,
        SPLIT=parts > 1,
        HAS_BIAS=bias is not None,
        PICKS=bool(picking),
        num_warps=4,
        maxnreg=REGISTERS,
        **chaining(),
    )
