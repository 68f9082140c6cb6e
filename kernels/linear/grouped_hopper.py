"""The layers of `grouped_triton` on Hopper: FP8 weights for few rows, and weights in 4 bits for any number of rows.

The kernel is persistent and warp-specialized. One producer warp loads weights into a ring buffer in shared memory, and another
loads input rows. Consumer warpgroups multiply them. A stage of the ring holds a step, which is two groups of 128 inputs. While
the tensor cores multiply one group, the numbers of the other are prepared.

FP8 weights have one consumer. The sums are those of `grouped_triton`, by the same instructions in the same order. So a row has
the same bits in both.

4-bit integers are loaded to the registers from which the tensor cores read them (see `integers.pack_words`), and widened there.
One consumer alone takes longer for this than the memory takes to send the numbers. So two take turns at the steps, and their sums
are added at the end of a unit; a sum with an odd number of steps has one. With two, the order is not that of `grouped_triton`. So
that a row has the same bits in every pass, all numbers of rows run here.

Written in Gluon, Triton's language for explicit shared memory and copies. Gluon has no interpreter.
"""

from functools import cache
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents

from orthrus.kernels.device import chaining, has_warpgroup_mma, num_sms
from orthrus.kernels.linear.descriptors import tiles_of
from orthrus.kernels.linear.grouped_ring import GroupedRing, load_rows, load_weights
from orthrus.kernels.linear.hopper import MOST_ROWS
from orthrus.kernels.linear.stream import REGISTERS, RING_BYTES, Work, make_grid, next_stage, num_steps
from orthrus.kernels.linear.stream_finish import finish
from orthrus.kernels.linear.tiles import rows_of_tile
from orthrus.kernels.linear.types import GroupedLayer

_DEPTH = 128
"""Inputs whose products the tensor cores sum, before the sum is multiplied by scales: here called a group."""
STEP = 2 * _DEPTH
"""Inputs of a step."""
_OUTS = 64
"""Outputs of a tile: M of one instruction of the tensor cores."""
_BITS = (0, 4)
"""Bits of the weights that the kernel takes; 0 for FP8."""
_TWO_CONSUMER_REGISTERS = 168
"""Registers per thread when a program with two consumers begins, see `stream.REGISTERS`. Such programs have more threads."""
_SECOND_REGISTERS = gl.constexpr(232)
"""Registers per thread of the second consumer."""
_SUMS = gl.SwizzledSharedLayout(2, 1, 8, [1, 0])
"""The layout of the sums that the second consumer leaves in shared memory. A thread stores two neighbours at a time."""


@gluon.jit
def _widen(words, zeros):
    """Words of 4-bit numbers [outs, 16], and bfloat16 zero points [outs, 1] plus 128 -> the numbers less these [outs, 128]."""
    OUTS: gl.constexpr = words.shape[0]
    # 0x4300 is 128 in bfloat16. Setting a number in its low bits adds the number to it.
    n0, n1, n2, n3, n4, n5, n6, n7 = gl.inline_asm_elementwise(
        """{
        .reg .b32 t;
        and.b32 t, $8, 0x000f000f; or.b32 t, t, 0x43004300; sub.rn.bf16x2 $0, t, $10;
        shr.u32 t, $8, 4; and.b32 t, t, 0x000f000f; or.b32 t, t, 0x43004300; sub.rn.bf16x2 $1, t, $10;
        shr.u32 t, $8, 8; and.b32 t, t, 0x000f000f; or.b32 t, t, 0x43004300; sub.rn.bf16x2 $2, t, $10;
        shr.u32 t, $8, 12; and.b32 t, t, 0x000f000f; or.b32 t, t, 0x43004300; sub.rn.bf16x2 $3, t, $10;
        and.b32 t, $9, 0x000f000f; or.b32 t, t, 0x43004300; sub.rn.bf16x2 $4, t, $10;
        shr.u32 t, $9, 4; and.b32 t, t, 0x000f000f; or.b32 t, t, 0x43004300; sub.rn.bf16x2 $5, t, $10;
        shr.u32 t, $9, 8; and.b32 t, t, 0x000f000f; or.b32 t, t, 0x43004300; sub.rn.bf16x2 $6, t, $10;
        shr.u32 t, $9, 12; and.b32 t, t, 0x000f000f; or.b32 t, t, 0x43004300; sub.rn.bf16x2 $7, t, $10;
        }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r",
        [words, zeros],
        dtype=[gl.bfloat16] * 8,
        is_pure=True,
        pack=2,
    )
    # Triton takes a result register to hold one number of each of two words. In fact it holds two neighbours of one word: in the
    # first four registers those of the first word, one register for each eight, and in the last four those of the second word.
    low = gl.join(gl.join(n0, n1), gl.join(n2, n3))
    high = gl.join(gl.join(n4, n5), gl.join(n6, n7))
    joined = gl.join(low, high).reshape((OUTS, 2, 2, 4, 2, 2, 2))
    return joined.permute((0, 1, 6, 5, 4, 3, 2)).reshape((OUTS, 128))


class Product(NamedTuple):
    """The product of a group, which the tensor cores may still be computing."""

    sums: gl.tensor  # [outs, rows]
    # Widened weights. Their registers must not be reused before the product is complete. Not used for FP8 weights.
    numbers: gl.tensor
    scale: gl.tensor  # [outs]
    row_scale: gl.tensor  # [rows]: the scales of FP8 rows. Not used for other rows.


@gluon.jit
def _start(ring, stage, nothing, HALF: gl.constexpr, WORDS: gl.constexpr, BITS: gl.constexpr):
    """Start the product of a group, the first (HALF = 0) or the second of a step."""
    layout: gl.constexpr = nothing.type.layout
    tile = 2 * stage + HALF
    rows = ring.rows.index(tile).permute((1, 0))
    scale = ring.scales.index(tile).load(gl.SliceLayout(1, layout)).to(gl.float32)
    others = ring.others.index(tile)
    numbers, row_scale = scale, scale
    ROUNDED: gl.constexpr = rows.dtype == gl.float8e4nv
    if ROUNDED:
        row_scale = others.slice(0, rows.shape[1]).load(gl.SliceLayout(0, layout))
    if BITS == 0:
        sums = warpgroup_mma(ring.weights.index(tile), rows, nothing, use_acc=False, is_async=True)
    else:
        words = ring.weights.index(stage).slice(16 * HALF, 16, dim=1).load(WORDS)
        zero = others.slice(0, words.shape[0]).load(gl.SliceLayout(1, WORDS)).to(gl.float32)
        numbers = _widen(words, (zero + 128.0).to(gl.bfloat16)[:, None])
        numbers = gl.convert_layout(numbers, gl.DotOperandLayout(0, layout, 2))
        sums = warpgroup_mma(numbers, rows, nothing, use_acc=False, is_async=True)
    return Product(sums, numbers, scale, row_scale)


@gluon.jit
def _add(acc, product, LATER: gl.constexpr, ROUNDED: gl.constexpr):
    """Wait for a product, multiply it by its scales, and add it to acc. LATER: how many later products may be incomplete."""
    sums, _ = warpgroup_mma_wait(LATER, deps=(product.sums, product.numbers))
    sums *= product.scale[:, None]
    if ROUNDED:
        sums *= product.row_scale[None, :]
    return acc + sums


@gluon.jit
def _multiply(
    ring,
    bias,
    out,
    work,
    NUMBER: gl.constexpr,
    CONSUMERS: gl.constexpr,
    OUTS: gl.constexpr,
    WORDS: gl.constexpr,
    BITS: gl.constexpr,
    GATED: gl.constexpr,
    SPLIT: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    """Run a consumer: sum every `CONSUMERS`-th step of a program's units, from step `NUMBER` on.

    Consumer 0 adds the sums of both, and stores them.
    """
    ROWS: gl.constexpr = ring.rows.shape[1]
    STAGES: gl.constexpr = ring.full.shape[0]
    ROUNDED: gl.constexpr = ring.rows.dtype == gl.float8e4nv
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [gl.num_warps(), 1], [16, ROWS, 256 // ring.rows.dtype.primitive_bitwidth]
    )
    grid = make_grid(work, OUTS, ROWS, False)
    stage, phase, sums_phase = NUMBER, 0, 0
    nothing = gl.zeros((OUTS, ROWS), gl.float32, layout)
    for number in range(gl.program_id(0), grid.units, grid.programs):
        acc = gl.zeros((OUTS, ROWS), gl.float32, layout)
        for _ in range(NUMBER, num_steps(number % grid.work.parts, grid), CONSUMERS):
            mbarrier.wait(ring.full.index(stage), phase)
            first = _start(ring, stage, nothing, 0, WORDS, BITS)
            second = _start(ring, stage, nothing, 1, WORDS, BITS)
            acc = _add(acc, first, 1, ROUNDED)
            acc = _add(acc, second, 0, ROUNDED)
            mbarrier.arrive(ring.empty.index(stage), count=1)
            stage, phase = next_stage(stage, phase, STAGES, CONSUMERS)
        if NUMBER == 1:
            mbarrier.wait(ring.sums_empty.index(0), sums_phase ^ 1)
            ring.sums.store(acc)
            mbarrier.arrive(ring.sums_full.index(0), count=1)
        else:
            if CONSUMERS == 2:
                mbarrier.wait(ring.sums_full.index(0), sums_phase)
                acc += ring.sums.load(layout)
                mbarrier.arrive(ring.sums_empty.index(0), count=1)
            finish(acc, number, grid, bias, out, None, 1.0, GATED, SPLIT, HAS_BIAS, False, False)
        sums_phase ^= 1


@gluon.jit(do_not_specialize=["num_rows", "parts", "steps"])
def _grouped_stream_kernel(
    w,
    x,
    scales,
    zeros,
    x_scales,
    bias,
    out,
    num_rows,
    num_outs,
    x_stride,
    steps,
    parts,
    OUTS: gl.constexpr,
    ROWS: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    GROUP_DEPTHS: gl.constexpr,
    BITS: gl.constexpr,
    WORDS: gl.constexpr,
    SUMS: gl.constexpr,
    GATED: gl.constexpr,
    SPLIT: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    CHAINED: gl.constexpr,
):
    # FP8 rows have scales, and integer weights have zero points. No layer has both, so they share a field of the ring.
    ROUNDED: gl.constexpr = x.dtype == gl.float8e4nv
    other = x_scales if ROUNDED else zeros
    TILES: gl.constexpr = 1 if BITS > 0 else 2
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    # A single consumer uses none of these three.
    sums, sums_full, sums_empty = full, full, full
    if CONSUMERS == 2:
        sums = gl.allocate_shared_memory(gl.float32, [OUTS, ROWS], SUMS)
        sums_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
        sums_empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
        mbarrier.init(sums_full.index(0), count=1)
        mbarrier.init(sums_empty.index(0), count=1)
    ring = GroupedRing(
        gl.allocate_shared_memory(w.dtype, [TILES * STAGES, OUTS, w.block_type.shape[1]], w.layout),
        gl.allocate_shared_memory(x.dtype, [2 * STAGES, ROWS, DEPTH], x.layout),
        gl.allocate_shared_memory(scales.dtype, [2 * STAGES, OUTS], scales.layout),
        gl.allocate_shared_memory(other.dtype, [2 * STAGES, other.block_type.shape[0]], other.layout),
        full,
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        sums,
        sums_full,
        sums_empty,
    )
    for i in gl.static_range(STAGES):
        mbarrier.init(ring.full.index(i), count=2)
        mbarrier.init(ring.empty.index(i), count=1)
    if CHAINED:
        gdc_launch_dependents()
    # Each part is one leaf of the tree that `add_rms_norm` sums.
    one, none = gl.to_tensor(1), gl.to_tensor(0)
    work = Work(num_rows, num_rows, num_outs, parts, one, steps, parts, none)
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (_multiply, (ring, bias, out, work, 0, 1, OUTS, WORDS, BITS, GATED, SPLIT, HAS_BIAS)),
                (load_weights, (w, scales, zeros, ring, work, GROUP_DEPTHS, OUTS, ROWS, BITS)),
                (load_rows, (x, x_scales, ring, work, x_stride, OUTS, ROWS, CHAINED)),
            ],
            [1, 1],
            [24, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (ring, bias, out, work, 0, 2, OUTS, WORDS, BITS, GATED, SPLIT, HAS_BIAS)),
                (_multiply, (ring, bias, out, work, 1, 2, OUTS, WORDS, BITS, GATED, SPLIT, HAS_BIAS)),
                (load_weights, (w, scales, zeros, ring, work, GROUP_DEPTHS, OUTS, ROWS, BITS)),
                (load_rows, (x, x_scales, ring, work, x_stride, OUTS, ROWS, CHAINED)),
            ],
            [4, 1, 1],
            [_SECOND_REGISTERS, 24, 24],
        )


@cache
def _words_layout(warps: int) -> gl.DistributedLinearLayout:
    """The words of a tile [outs, 16] that a thread holds: those of its numbers in an operand of wgmma."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 4], [0, 8], [8, 0]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16 << i, 0] for i in range(warps.bit_length() - 1)],
        block_bases=[],
        shape=[16 * warps, 16],
    )


def streams(x: Tensor, layer: GroupedLayer, parts: int) -> bool:
    """Whether `launch` takes these rows x [rows, ins], with the sum in `parts` parts."""
    return (
        (layer.bits == 4 or x.shape[0] <= MOST_ROWS)
        and x.dtype in (torch.bfloat16, torch.float8_e4m3fn)
        and layer.bits in _BITS
        and layer.depth == _DEPTH
        and x.shape[1] % (STEP * parts) == 0
        and has_warpgroup_mma()
    )


def launch(x: Tensor, layer: GroupedLayer, out: Tensor, parts: int, x_scales: Tensor | None = None) -> None:
    """Write the result of `layer` to out. The arguments are those of `grouped_triton.launch`."""
    rows, ins = x.shape
    integers = layer.bits > 0
    # The number of consumers divides the steps of a part, so each consumer always has the same stages. Otherwise a consumer could
    # wait for the next round of a stage before the other one has taken the current round, and the single phase bit of an mbarrier
    # can't tell these apart.
    consumers = gcd(2, ins // (STEP * parts)) if integers else 1
    row_tile = rows_of_tile(rows, 8, 16, 32, 64)
    scales = layer.scales.view(-1)
    scales_tile = tiles_of(scales, _OUTS)
    # TMA writes to multiples of 128 bytes.
    zeros_tile = tiles_of(layer.zeros.view(-1), 128) if layer.zeros is not None else scales_tile
    row_scales_tile = scales_tile if x_scales is None else tiles_of(x_scales.view(-1), max(32, row_tile))
    step_bytes = _OUTS * STEP * (0.5 if integers else 1) + 2 * (
        row_tile * _DEPTH * x.itemsize + _OUTS * scales.itemsize + 256
    )
    sums_bytes = (consumers - 1) * _OUTS * row_tile * 4
    stages = min(12, int((RING_BYTES - sums_bytes) // step_bytes))
    bias = layer.bias if out.dim() == 2 else None
    _grouped_stream_kernel[(num_sms(x.device),)](
        tiles_of(layer.numbers, _OUTS, STEP // 8 if integers else _DEPTH),
        tiles_of(x, row_tile, _DEPTH),
        scales_tile,
        zeros_tile,
        row_scales_tile,
        out if bias is None else bias,
        out,
        rows,
        layer.outs,
        0 if x_scales is None else x_scales.stride(0),
        ins // STEP,
        parts,
        OUTS=_OUTS,
        ROWS=row_tile,
        DEPTH=_DEPTH,
        STAGES=stages // consumers * consumers,
        CONSUMERS=consumers,
        GROUP_DEPTHS=layer.group_size // _DEPTH,
        BITS=layer.bits,
        WORDS=_words_layout(4),
        SUMS=_SUMS,
        GATED=layer.interleaved,
        SPLIT=parts > 1,
        HAS_BIAS=bias is not None,
        num_warps=4,
        maxnreg=REGISTERS if consumers == 1 else _TWO_CONSUMER_REGISTERS,
        **chaining(),
    )
