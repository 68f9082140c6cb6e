"""The layers of `grouped_triton` for few rows on Hopper, in a kernel built like that of `hopper`.

A place of the ring holds a step: a tile of the weight, one of the input rows, and the scales of both. 4-bit numbers come out of
shared memory in the registers in which the matrix unit takes them (see `grouped.pack_words`), and are widened there. The sums are
those of `grouped_triton`, by the same instructions in the same order, so a row has the same bits in either.
"""

from functools import cache
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from orthrus.kernels.device import chaining, has_warpgroup_mma, multiprocessors
from orthrus.kernels.gluon_names import async_load
from orthrus.kernels.linear.hopper import MOST_ROWS
from orthrus.kernels.linear.stream import advance, first_step, make_grid, silu_mul, unit_of
from orthrus.kernels.linear.types import GroupedLayer

_DEPTH = 128
"""Inputs of a step."""
_OUTS = 64
"""Outputs of a tile: as many as one instruction computes."""
_RING_BYTES = 200_000
"""Bytes of the rings of all programs of a multiprocessor, which has 227 KB of shared memory."""
_BITS = (0, 4)
"""Of the weights that the kernel takes; 0 for FP8."""


class Ring(NamedTuple):
    """Tiles in shared memory, filled in turn."""

    weights: gl.shared_memory_descriptor  # [places, outs, bytes or words]
    rows: gl.shared_memory_descriptor  # [places, rows, depth]
    scales: gl.shared_memory_descriptor  # [places, outs]: those of the weights.
    # [places, at least outs or rows]: zero points of integers, or scales of FP8 rows.
    others: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor  # For each place a barrier: all of it has arrived.


@gluon.jit
def _fetch_weights(
    w,
    scales,
    zeros,
    ring,
    place,
    cursor,
    num_outs,
    group_steps,
    wanted,
    LOADED: gl.constexpr,
    DEPTH: gl.constexpr,
    BITS: gl.constexpr,
):
    """Ask for a step's tile of the weight and what belongs to it, and let the place's barrier wait for all of the step."""
    full = ring.full.index(place)
    mbarrier.expect(full, LOADED, pred=wanted)
    step = cursor.k // DEPTH
    tile = [cursor.weight_at, step * w.block_type.shape[1]]
    async_load(w, tile, full, ring.weights.index(place), pred=wanted)
    group = [step // group_steps * num_outs + cursor.weight_at]
    async_load(scales, group, full, ring.scales.index(place), pred=wanted)
    if BITS > 0:
        async_load(zeros, group, full, ring.others.index(place), pred=wanted)


@gluon.jit
def _fetch_rows(x, x_scales, ring, place, cursor, x_stride, wanted, DEPTH: gl.constexpr, BITS: gl.constexpr):
    """Ask for a step's tile of the input rows, and for their scales."""
    full = ring.full.index(place)
    async_load(x, [cursor.row_at, cursor.k], full, ring.rows.index(place), pred=wanted)
    if BITS == 0:
        group = [cursor.k // DEPTH * x_stride + cursor.row_at]
        async_load(x_scales, group, full, ring.others.index(place), pred=wanted)


@gluon.jit
def _widen(words, zeros):
    """Words of 4-bit numbers [outs, 16], and bfloat16 zero points [outs, 1] plus 128 -> the numbers less these [outs, 128]."""
    OUTS: gl.constexpr = words.shape[0]
    # 0x4300 is 128 in bfloat16, and a number in its low bits is added to it.
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
    # Two words side by side in registers give the first and the second neighbours of four eights each.
    low = gl.join(gl.join(n0, n1), gl.join(n2, n3))
    high = gl.join(gl.join(n4, n5), gl.join(n6, n7))
    parts = gl.join(low, high).reshape((OUTS, 2, 2, 4, 2, 2, 2))
    return parts.permute((0, 1, 6, 5, 4, 3, 2)).reshape((OUTS, 128))


@gluon.jit(do_not_specialize=["num_rows", "segments", "steps"])
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
    segments,
    group_steps,
    OUTS: gl.constexpr,
    ROWS: gl.constexpr,
    DEPTH: gl.constexpr,
    RING: gl.constexpr,
    BITS: gl.constexpr,
    WORDS: gl.constexpr,
    GATED: gl.constexpr,
    SPLIT: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    CHAINED: gl.constexpr,
    num_warps: gl.constexpr,
):
    # FP8 weights have no zero points, and integers no scales of rows: these rings are one.
    other = zeros if BITS > 0 else x_scales
    ring = Ring(
        gl.allocate_shared_memory(w.dtype, [RING, OUTS, w.block_type.shape[1]], w.layout),
        gl.allocate_shared_memory(x.dtype, [RING, ROWS, DEPTH], x.layout),
        gl.allocate_shared_memory(scales.dtype, [RING, OUTS], scales.layout),
        gl.allocate_shared_memory(other.dtype, [RING, other.block_type.shape[0]], other.layout),
        gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout()),
    )
    full = ring.full
    for i in gl.static_range(RING):
        mbarrier.init(full.index(i), count=1)
    if CHAINED:
        gdc_launch_dependents()
    # A segment is a leaf, of a tree that `add_rms_norm` sums.
    whole, first_leaf = steps * segments, gl.to_tensor(0)
    grid = make_grid(
        out, num_rows, num_outs, segments, gl.to_tensor(1), whole, segments, first_leaf, OUTS, ROWS, False
    )
    program = gl.program_id(0)
    total = gl.cdiv(gl.maximum(grid.units - program, 0), grid.programs) * steps
    LOADED: gl.constexpr = (
        w.block_type.nbytes + x.block_type.nbytes + scales.block_type.nbytes + other.block_type.nbytes
    )

    # The program's first steps: the weights before the input rows are there.
    first = first_step(program, grid, OUTS, ROWS, DEPTH)
    ahead = first
    for i in gl.static_range(RING):
        _fetch_weights(
            w, scales, zeros, ring, i, ahead, num_outs, group_steps, i < total, LOADED, DEPTH, BITS
        )
        ahead = advance(ahead, grid, OUTS, ROWS, DEPTH)
    if CHAINED:
        gdc_wait()
    ahead = first
    for i in gl.static_range(RING):
        _fetch_rows(x, x_scales, ring, i, ahead, x_stride, i < total, DEPTH, BITS)
        ahead = advance(ahead, grid, OUTS, ROWS, DEPTH)

    layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [num_warps, 1], [16, ROWS, 256 // x.dtype.primitive_bitwidth]
    )
    by_out: gl.constexpr = gl.SliceLayout(1, layout)
    by_row: gl.constexpr = gl.SliceLayout(0, layout)
    place, phase, done, free = 0, 0, 0, 0
    nothing = gl.zeros((OUTS, ROWS), gl.float32, layout)
    for number in range(program, grid.units, grid.programs):
        acc = gl.zeros((OUTS, ROWS), gl.float32, layout)
        for _ in range(steps):
            mbarrier.wait(full.index(place), phase)
            rows = ring.rows.index(place).permute((1, 0))
            scale = ring.scales.index(place).load(by_out).to(gl.float32)
            others = ring.others.index(place)
            if BITS == 0:
                part = warpgroup_mma(ring.weights.index(place), rows, nothing, use_acc=False, is_async=True)
                x_scale = others.slice(0, ROWS).load(by_row)
                part = warpgroup_mma_wait(0, deps=(part,)) * scale[:, None]
                acc += part * x_scale[None, :]
            else:
                words = ring.weights.index(place).load(WORDS)
                zero = others.slice(0, OUTS).load(gl.SliceLayout(1, WORDS)).to(gl.float32)
                numbers = _widen(words, (zero + 128.0).to(gl.bfloat16)[:, None])
                numbers = gl.convert_layout(numbers, gl.DotOperandLayout(0, layout, 2))
                part = warpgroup_mma(numbers, rows, nothing, use_acc=False)
                acc += part * scale[:, None]
            # All warps have read the place of the step before this one: the matrix unit has this step's tiles of all of them.
            if (done > 0) & (done + RING - 1 < total):
                _fetch_weights(
                    w, scales, zeros, ring, free, ahead, num_outs, group_steps, True, LOADED, DEPTH, BITS
                )
                _fetch_rows(x, x_scales, ring, free, ahead, x_stride, True, DEPTH, BITS)
                ahead = advance(ahead, grid, OUTS, ROWS, DEPTH)
            done += 1
            free = place
            place += 1
            if place == RING:
                place = 0
                phase ^= 1
        unit = unit_of(number, grid, OUTS, ROWS)
        row_index = unit.row_at + gl.arange(0, ROWS, by_row)
        live = row_index < unit.row_end
        out_at, width = unit.out_at, num_outs
        if HAS_BIAS:
            index = out_at + gl.arange(0, OUTS, by_out)
            acc += gl.load(bias + index, mask=index < num_outs, other=0.0).to(gl.float32)[:, None]
        result = acc
        if GATED:
            result = silu_mul(acc, OUTS, ROWS)
            out_at, width = out_at // 2, num_outs // 2
        index = out_at + gl.arange(0, result.shape[0], by_out)
        goal = row_index[None, :].to(gl.int64) * width + index[:, None]
        if SPLIT:
            goal += unit.part * num_rows.to(gl.int64) * num_outs
        gl.store(out + goal, result.to(out.dtype.element_ty), mask=live[None, :] & (index < width)[:, None])


@cache
def _words_layout(warps: int) -> gl.DistributedLinearLayout:
    """Which words of a tile [outs, 16] a thread has: those whose numbers the matrix unit takes from it."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 4], [0, 8], [8, 0]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16 << i, 0] for i in range(warps.bit_length() - 1)],
        block_bases=[],
        shape=[16 * warps, 16],
    )


def _tile_layout(block: list[int], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a tile lies in shared memory for the copy engine, and for the matrix unit where it takes it from there."""
    if len(block) == 1:
        return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=dtype.itemsize * 8, rank=1)
    dtypes = {
        torch.bfloat16: gl.bfloat16,
        torch.float16: gl.float16,
        torch.float8_e4m3fn: gl.float8e4nv,
        torch.int32: gl.int32,
    }
    return gl.NVMMASharedLayout.get_default_for(block, dtypes[dtype])


def _described(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    strides = [tensor.stride(0), 1] if tensor.dim() == 2 else [1]
    return TensorDescriptor(tensor, list(tensor.shape), strides, block, _tile_layout(block, tensor.dtype))


def streams(x: Tensor, layer: GroupedLayer, segments: int) -> bool:
    """Whether `launch` takes these rows x [rows, ins], bfloat16 or FP8."""
    steps = x.shape[1] // _DEPTH
    return (
        x.shape[0] <= MOST_ROWS
        and x.dtype in (torch.bfloat16, torch.float8_e4m3fn)
        and layer.bits in _BITS
        and layer.depth == _DEPTH
        and x.shape[1] % _DEPTH == 0
        and steps % segments == 0
        and has_warpgroup_mma()
    )


def launch(
    x: Tensor, layer: GroupedLayer, out: Tensor, segments: int, x_scales: Tensor | None = None
) -> None:
    """Compute `layer` into out; see `grouped_triton.launch`."""
    rows, ins = x.shape
    outs = layer.outs
    row_tile = 16 if rows <= 16 else 32 if rows <= 32 else 64
    width = _DEPTH // (8 if layer.bits == 4 else 1)
    scales = layer.scales.view(-1)
    zeros = scales if layer.zeros is None else layer.zeros.view(-1)
    row_scales = scales if x_scales is None else x_scales.view(-1)
    weight = _described(layer.numbers, [_OUTS, width])
    others = row_scales if layer.bits == 0 else zeros
    # The copy engine writes to multiples of 128 bytes.
    other_block = max(row_tile if layer.bits == 0 else _OUTS, 128 // others.itemsize)
    step_bytes = (
        _OUTS * width * layer.numbers.itemsize
        + row_tile * _DEPTH * x.itemsize
        + _OUTS * scales.itemsize
        + other_block * others.itemsize
    )
    # Of a multiprocessor. Of two, one can work on its numbers while the other's are multiplied; FP8 has less to be done on them.
    programs = 1 if layer.bits == 0 and row_tile == 64 else 2
    bias = layer.bias if segments == 1 else None
    _grouped_stream_kernel[(programs * multiprocessors(x.device),)](
        weight,
        _described(x, [row_tile, _DEPTH]),
        _described(scales, [_OUTS]),
        _described(zeros, [other_block]),
        _described(row_scales, [other_block]),
        out if bias is None else bias,
        out,
        rows,
        outs,
        0 if x_scales is None else x_scales.stride(0),
        ins // _DEPTH // segments,
        segments,
        layer.group_size // _DEPTH,
        OUTS=_OUTS,
        ROWS=row_tile,
        DEPTH=_DEPTH,
        RING=min(16, _RING_BYTES // programs // step_bytes),
        BITS=layer.bits,
        WORDS=_words_layout(4),
        GATED=layer.interleaved,
        SPLIT=segments > 1,
        HAS_BIAS=bias is not None,
        num_warps=4,
        **chaining(),
    )
