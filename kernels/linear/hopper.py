"""The linear layers of decode passes: few rows, so that time is that of reading the weights, which never stops.

As many programs as multiprocessors each go through a share of the weight tiles. A ring of tiles in shared memory is always being
filled: over the end of one tile's sum and the beginning of the next, and before the kernels ahead in the stream have finished,
because weights depend on nothing. Only then a program waits for its input rows. The sums are those of `kernels.linear.triton`, by
the same instructions in the same order, so that a row has the same bits in a decode pass and in a prefill chunk.

Written in Gluon, Triton's language for explicit shared memory and copies; there is no interpreter for it.
"""

from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.device import chaining, has_warpgroup_mma, multiprocessors
from kernels.linear.tiles import segment_length
from kernels.linear.types import DenseLayer
from kernels.rows.sampling_triton import nan_to_inf, perturb

MOST_ROWS = 64
_OUTS = 64
"""Outputs of a tile: one instruction's."""
_DEPTH = 128
"""Inputs of a step."""
_RING_BYTES = 200_000
"""Of a multiprocessor's 227 KB of shared memory."""


@gluon.jit
def _place(
    unit, split, ar_tiles, row_tiles, segments, num_rows, num_outs, OUTS: gl.constexpr, ROWS: gl.constexpr
):  # fmt: skip
    """Where a unit of work lies: first weight row, first output, first input row, the row after its last, segment."""
    segment = unit % segments
    tile = unit // segments
    row_tile = tile % row_tiles
    out_at = tile // row_tiles * OUTS
    diffusion = row_tile >= ar_tiles
    row_at = gl.where(diffusion, split + (row_tile - ar_tiles) * ROWS, row_tile * ROWS)
    row_end = gl.where(diffusion, num_rows, split)
    weight_at = out_at + gl.where(diffusion, num_outs, 0)
    return weight_at, out_at, row_at, row_end, segment


@gluon.jit
def _advance(
    unit, step, weight_at, row_at, k, programs, split, ar_tiles, row_tiles, segments, num_rows, num_outs, steps,
    OUTS: gl.constexpr, ROWS: gl.constexpr, DEPTH: gl.constexpr,
):  # fmt: skip
    """The step after this one: further along the inputs, or the first of the program's next unit."""
    step += 1
    k += DEPTH
    if step == steps:
        step = 0
        unit += programs
        weight_at, _, row_at, _, segment = _place(
            unit, split, ar_tiles, row_tiles, segments, num_rows, num_outs, OUTS, ROWS
        )
        k = segment * steps * DEPTH
    return unit, step, weight_at, row_at, k


@gluon.jit
def _best(logits, token, row, live, temperatures, keys, vocab):
    """The best of a tile's tokens for each row and the token, as `gumbel_argmax` picks. logits [tokens, rows]."""
    score = logits
    temperature = gl.load(temperatures + row, mask=live, other=0.0)
    if gl.max(temperature, 0) > 0.0:
        warm = (temperature > 0.0)[None, :]
        divisor = gl.where(temperature > 0.0, temperature, 1.0)[None, :]
        noisy = perturb(logits, divisor, keys, gl.where(live, row, 0)[None, :], token[:, None])
        score = gl.where(warm, noisy, logits)
    score = nan_to_inf(gl.where((token < vocab)[:, None], score, float("-inf")))
    best = gl.max(score, 0)
    return best, gl.min(gl.where(score == best[None, :], token[:, None], vocab - 1), 0)


@gluon.jit(do_not_specialize=["num_rows", "segments", "steps"])
def _stream_kernel(
    w,
    x,
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
    steps,
    segments,
    OUTS: gl.constexpr,
    ROWS: gl.constexpr,
    DEPTH: gl.constexpr,
    RING: gl.constexpr,
    TWO_VIEWS: gl.constexpr,
    GATED: gl.constexpr,
    SPLIT: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    PICKS: gl.constexpr,
    CHAINED: gl.constexpr,
    num_warps: gl.constexpr,
):
    w_ring = gl.allocate_shared_memory(w.dtype, [RING, OUTS, DEPTH], w.layout)
    x_ring = gl.allocate_shared_memory(x.dtype, [RING, ROWS, DEPTH], x.layout)
    full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(RING):
        mbarrier.init(full.index(i), count=1)
    if CHAINED:
        gdc_launch_dependents()
    loaded_bytes: gl.constexpr = (OUTS + ROWS) * DEPTH * w.dtype.primitive_bitwidth // 8

    split = num_rows
    if TWO_VIEWS:
        split = gl.load(num_ar)  # Uploaded before the pass: no kernel writes it.
    ar_tiles = gl.cdiv(split, ROWS)
    row_tiles = ar_tiles + gl.cdiv(num_rows - split, ROWS)
    units = row_tiles * gl.cdiv(num_outs, OUTS) * segments
    unit, programs = gl.program_id(0), gl.num_programs(0)
    total = gl.cdiv(gl.maximum(units - unit, 0), programs) * steps
    weight_at, _, row_at, _, segment = _place(
        unit, split, ar_tiles, row_tiles, segments, num_rows, num_outs, OUTS, ROWS
    )

    # Weights of the first steps, before the input rows are there.
    p_unit, p_step, p_weight, p_row, p_k = unit, 0, weight_at, row_at, segment * steps * DEPTH
    for i in gl.static_range(RING):
        wanted = i < total
        mbarrier.expect(full.index(i), loaded_bytes, pred=wanted)
        tma.async_copy_global_to_shared(w, [p_weight, p_k], full.index(i), w_ring.index(i), pred=wanted)
        p_unit, p_step, p_weight, p_row, p_k = _advance(
            p_unit, p_step, p_weight, p_row, p_k, programs, split, ar_tiles, row_tiles, segments, num_rows, num_outs,
            steps, OUTS, ROWS, DEPTH,
        )  # fmt: skip
    if CHAINED:
        gdc_wait()
    p_unit, p_step, p_weight, p_row, p_k = unit, 0, weight_at, row_at, segment * steps * DEPTH
    for i in gl.static_range(RING):
        tma.async_copy_global_to_shared(x, [p_row, p_k], full.index(i), x_ring.index(i), pred=i < total)
        p_unit, p_step, p_weight, p_row, p_k = _advance(
            p_unit, p_step, p_weight, p_row, p_k, programs, split, ar_tiles, row_tiles, segments, num_rows, num_outs,
            steps, OUTS, ROWS, DEPTH,
        )  # fmt: skip

    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, ROWS, 16])
    stage, phase, done, free = 0, 0, 0, 0
    for this in range(unit, units, programs):
        acc = gl.zeros((OUTS, ROWS), gl.float32, layout)
        for _ in range(steps):
            mbarrier.wait(full.index(stage), phase)
            acc = warpgroup_mma(w_ring.index(stage), x_ring.index(stage).permute((1, 0)), acc, is_async=True)
            # The product of the step before this one is complete: its place in the ring is free.
            acc = warpgroup_mma_wait(1, deps=(acc,))
            if (done > 0) & (done + RING - 1 < total):
                mbarrier.expect(full.index(free), loaded_bytes)
                tma.async_copy_global_to_shared(w, [p_weight, p_k], full.index(free), w_ring.index(free))
                tma.async_copy_global_to_shared(x, [p_row, p_k], full.index(free), x_ring.index(free))
                p_unit, p_step, p_weight, p_row, p_k = _advance(
                    p_unit, p_step, p_weight, p_row, p_k, programs, split, ar_tiles, row_tiles, segments, num_rows,
                    num_outs, steps, OUTS, ROWS, DEPTH,
                )  # fmt: skip
            done += 1
            free = stage
            stage += 1
            if stage == RING:
                stage = 0
                phase ^= 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        _, out_at, row_at, row_end, segment = _place(
            this, split, ar_tiles, row_tiles, segments, num_rows, num_outs, OUTS, ROWS
        )
        row_index = row_at + gl.arange(0, ROWS, gl.SliceLayout(0, layout))
        width = num_outs
        if HAS_BIAS:
            shift = gl.where(row_at >= split, num_outs, 0)
            index = out_at + gl.arange(0, OUTS, gl.SliceLayout(1, layout))
            offset = gl.load(bias + shift + index, mask=index < num_outs, other=0.0)
            acc += offset.to(gl.float32)[:, None]
        result = acc
        if GATED:
            # Blocks of 8: gate, up, gate, ... (see `interleave`); a thread holds both of a pair.
            gate, up = acc.reshape((OUTS // 16, 2, 8, ROWS)).permute((0, 2, 3, 1)).split()
            result = gl.convert_layout((gate / (1.0 + gl.exp(-gate)) * up).reshape((OUTS // 2, ROWS)), layout)
            out_at, width = out_at // 2, num_outs // 2
        index = out_at + gl.arange(0, result.shape[0], gl.SliceLayout(1, layout))
        inside = (row_index < row_end)[None, :] & (index < width)[:, None]
        stored = True
        if PICKS:
            stored = gl.load(out_wanted) != 0
            best, token = _best(result, index, row_index, row_index < row_end, temperatures, keys, width)
            tile = row_index * gl.cdiv(width, OUTS) + out_at // OUTS
            gl.store(values + tile, best, mask=row_index < row_end)
            gl.store(indices + tile, token, mask=row_index < row_end)
        if stored:
            place = row_index[None, :].to(gl.int64) * width + index[:, None]
            if SPLIT:
                place += segment * num_rows.to(gl.int64) * num_outs
            gl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


def num_tiles(outs: int) -> int:
    """Of a layer with so many outputs."""
    return -(-outs // _OUTS)


@cache
def _layout(block: tuple[int, int], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a tile lies in shared memory for both the copy engine and the matrix unit."""
    return gl.NVMMASharedLayout.get_default_for(
        list(block), gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    )


def streams(x: Tensor) -> bool:
    """Whether a layer of x [rows, in_features] is for `launch`."""
    return x.shape[0] <= MOST_ROWS and x.itemsize == 2 and has_warpgroup_mma()


def launch(
    x: Tensor,
    layer: DenseLayer,
    out: Tensor,
    num_ar: Tensor | None,
    segments: int,
    picking: tuple[Tensor, ...] = (),
) -> None:
    """Compute `layer` into out: [rows, outs], or [segments, rows, outs] without the bias where there are several.

    picking: to pick from the outputs, temperatures, noise keys and whether `out` is wanted at all, as
    `linear_gumbel_argmax` takes them; then where the best score of each of `num_tiles` tiles and its token go: float32 and int32
    [rows, tiles].
    """
    rows, ins = x.shape
    outs, views = layer.weights[0].shape[0], len(layer.weights)
    row_tile = 16 if rows <= 16 else 32 if rows <= 32 else 64
    bias = layer.bias if segments == 1 else None
    weight_block, row_block = (_OUTS, _DEPTH), (row_tile, _DEPTH)
    weight, last = layer.weights[0], [ins, 1]
    _stream_kernel[(multiprocessors(x.device),)](
        TensorDescriptor(
            weight, [views * outs, ins], last, list(weight_block), _layout(weight_block, x.dtype)
        ),
        TensorDescriptor(x, [rows, ins], [x.stride(0), 1], list(row_block), _layout(row_block, x.dtype)),
        out if bias is None else bias,
        out,
        out if num_ar is None else num_ar,
        *(picking or 5 * (out,)),
        rows,
        outs,
        segment_length(ins, segments) // _DEPTH,
        segments,
        OUTS=_OUTS,
        ROWS=row_tile,
        DEPTH=_DEPTH,
        RING=_RING_BYTES // ((_OUTS + row_tile) * _DEPTH * 2),
        TWO_VIEWS=views > 1,
        GATED=layer.interleaved,
        SPLIT=segments > 1,
        HAS_BIAS=bias is not None,
        PICKS=bool(picking),
        num_warps=4,
        **chaining(),
    )
