"""The linear kernel for few rows on Hopper. It takes as long as reading the weights, so it always keeps loads in flight.

The kernel is persistent: one program runs on each SM, and goes through its share of the weight's tiles. It loads tiles by TMA
into a ring buffer in shared memory, ahead of their multiplication. The loads continue while the sum of one tile ends and the next
begins. They begin before earlier kernels of the stream have finished (programmatic dependent launch), because weights depend on
no kernel. Only the loads of input rows wait for those kernels. The sums are those of `triton`, by the same instructions in the
same order. So a row has the same bits in a decode pass and in a prefill chunk.

`stream` divides the work among programs, and has the ring buffer.

Written in Gluon, Triton's language for explicit shared memory and copies. Gluon has no interpreter.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents

from orthrus.kernels.device import chaining, has_warpgroup_mma, num_sms
from orthrus.kernels.leaves import Leaves
from orthrus.kernels.linear.descriptors import tiles_of
from orthrus.kernels.linear.stream import (
    RING_BYTES,
    DenseRing,
    Work,
    count_steps,
    fetch_rows,
    fetch_weights,
    fill_ring,
    leaf_begin,
    make_grid,
    next_step,
    unit_of,
)
from orthrus.kernels.linear.stream_finish import Picking, finish, join_leaf, output_scales
from orthrus.kernels.linear.tiles import rows_of_tile
from orthrus.kernels.linear.types import DenseLayer
from orthrus.kernels.rounding import Rounding, stored_as

MOST_ROWS = 64
_OUTS = 64
"""Outputs of a tile: M of one instruction of the tensor cores."""
_STEP_BYTES = 256
"""Bytes of the inputs of a step: 128 inputs of 16 bits, or 256 of FP8."""


@gluon.jit(do_not_specialize=["num_rows", "parts", "all_steps", "all_leaves", "first_leaf", "first_token"])
def _stream_kernel(
    w,
    x,
    w_scales,
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
    first_token,
    factor,
    OUTS: gl.constexpr,
    ROWS: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
    PART_LEAVES: gl.constexpr,
    TWO_VIEWS: gl.constexpr,
    GATED: gl.constexpr,
    SCALED: gl.constexpr,
    SPLIT: gl.constexpr,
    WHOLE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    PICKS: gl.constexpr,
    IN_WORDS: gl.constexpr,
    CHAINED: gl.constexpr,
    num_warps: gl.constexpr,
):
    w_ring = gl.allocate_shared_memory(w.dtype, [STAGES, OUTS, DEPTH], w.layout)
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES, ROWS, DEPTH], x.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ring = DenseRing(w_ring, x_ring, full)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    if CHAINED:
        gdc_launch_dependents()
    part_leaves = gl.to_tensor(PART_LEAVES)
    work = Work(num_ar, num_rows, num_outs, parts, part_leaves, all_steps, all_leaves, first_leaf)
    grid = make_grid(work, OUTS, ROWS, TWO_VIEWS)
    program = gl.program_id(0)
    total = gl.cdiv(gl.maximum(grid.units - program, 0), grid.programs) * all_steps
    if WHOLE == 0:
        total = count_steps(program, grid)
    ahead = fill_ring(w, x, ring, grid, total, OUTS, ROWS, DEPTH, CHAINED)

    # One instruction of the tensor cores takes 32 bytes of the inputs.
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [num_warps, 1], [16, ROWS, 256 // w.dtype.primitive_bitwidth]
    )
    picking = Picking(temperatures, keys, out_wanted, values, indices, first_token)
    stage, phase, done, empty = 0, 0, 0, 0
    for number in range(program, grid.units, grid.programs):
        first = number % grid.work.parts * PART_LEAVES
        acc = gl.zeros((OUTS, ROWS), gl.float32, layout)
        # Nodes of the tree that wait for their neighbour: of one leaf, of two, of four.
        one, two, four = acc, acc, acc
        if SCALED:
            unit = unit_of(number, grid, OUTS, ROWS)
            scale = output_scales(w_scales, unit, num_outs, OUTS, layout)
        for leaf in range(PART_LEAVES):
            acc = gl.zeros((OUTS, ROWS), gl.float32, layout)
            for _ in range(leaf_begin(first + leaf + 1, grid) - leaf_begin(first + leaf, grid)):
                mbarrier.wait(full.index(stage), phase)
                weights, rows = w_ring.index(stage), x_ring.index(stage).permute((1, 0))
                acc = warpgroup_mma(weights, rows, acc, is_async=True)
                # Now the product of the previous step is complete, and its stage is empty.
                acc = warpgroup_mma_wait(1, deps=(acc,))
                if (done > 0) & (done + STAGES - 1 < total):
                    fetch_weights(w, ring, empty, ahead, True)
                    fetch_rows(x, ring, empty, ahead, True)
                    ahead = next_step(ahead, grid, OUTS, ROWS, DEPTH)
                done += 1
                empty = stage
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
            acc = warpgroup_mma_wait(0, deps=(acc,))
            acc, one, two, four = join_leaf(acc, leaf, one, two, four, PART_LEAVES)
        if SCALED:
            acc *= scale[:, None]
        finish(acc, number, grid, bias, out, picking, factor, GATED, SPLIT, HAS_BIAS, PICKS, IN_WORDS)


def num_tiles(outs: int) -> int:
    """Number of tiles of a layer with `outs` outputs."""
    return -(-outs // _OUTS)


def streams(x: Tensor) -> bool:
    """Whether `launch` takes these rows x [rows, in_features]."""
    return x.shape[0] <= MOST_ROWS and x.itemsize <= 2 and has_warpgroup_mma()


def launch(
    x: Tensor,
    layer: DenseLayer,
    out: Tensor,
    num_ar: Tensor | None,
    parts: int,
    picking: tuple[Tensor, ...] = (),
    inputs: Leaves | None = None,
    rounding: Rounding | None = None,
    first_token: int = 0,
) -> None:
    """Write the result of `layer` to out: [rows, outs], or nodes of the tree [parts, rows, outs] without bias if parts > 1.

    picking: empty, or five tensors for picking from the outputs. The temperatures, the noise keys, and whether `out` is wanted
    are those of `Weight.linear_gumbel_argmax`. The best score of each tile (float32) and its token (int32) are written to the
    other two, both [rows, num_tiles].
    inputs: the leaves of the inputs, whose unit is this kernel's step; None for one leaf. rounding: how `out` stores the result
    if it is e4m3. first_token: the token of the first output, if tokens are picked.
    """
    rows, ins = x.shape
    outs, views = layer.weights[0].shape[0], len(layer.weights)
    row_tile = rows_of_tile(rows, 16, 32, 64)
    depth = _STEP_BYTES // x.itemsize
    inputs = inputs or Leaves.whole(ins, depth, 1)
    assert inputs.unit == depth and inputs.count % parts == 0, (inputs, parts)
    bias = layer.bias if out.dim() == 2 else None
    scales = layer.scales
    factor, in_words = stored_as(rounding)
    _stream_kernel[(num_sms(x.device),)](
        tiles_of(layer.weights[0], _OUTS, depth, rows=views * outs),
        tiles_of(x, row_tile, depth),
        out if scales is None else scales,
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
        first_token,
        factor,
        OUTS=_OUTS,
        ROWS=row_tile,
        DEPTH=depth,
        STAGES=RING_BYTES // ((_OUTS + row_tile) * _STEP_BYTES),
        PART_LEAVES=inputs.count // parts,
        TWO_VIEWS=views > 1,
        GATED=layer.interleaved,
        SCALED=scales is not None,
        SPLIT=parts > 1,
        WHOLE=parts == 1 and inputs.count == inputs.total,
        HAS_BIAS=bias is not None,
        PICKS=bool(picking),
        IN_WORDS=in_words,
        num_warps=4,
        **chaining(),
    )
