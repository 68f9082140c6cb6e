"""The linear kernel for any GPU and any number of rows.

Each output is one float32 sum over the inputs in order. If the result goes into the residual stream, the inputs are cut into
leaves: each has a sum of its own, and these are added in a binary tree (see `tree`). Such a layer has few outputs, which would
leave a GPU idle. So several programs may take a part of its leaves each (split-K), and write nodes of the tree, which
`add_rms_norm` adds. The order of the sums is the same for every tile shape, and for every number of parts. So a row has the same
bits alone, in a decode batch and in a prefill chunk.

The operands are swapped. A tensor core instruction has M = 64, which few rows would not fill, but N can be as small as 8. So the
weight is on the M side, and the rows are on the N side. All numbers of rows use the same kind of instruction.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from orthrus.kernels.device import chaining
from orthrus.kernels.leaves import Leaves
from orthrus.kernels.linear.epilogue import store_tile
from orthrus.kernels.linear.lossless_triton import sum_lossless
from orthrus.kernels.linear.tiles import leaf_unit
from orthrus.kernels.linear.types import DenseLayer, LinearTiles, LosslessLayer
from orthrus.kernels.rounding import Rounding, stored_as


@triton.jit
def _sum(
    w,
    x,
    out_at,
    row_at,
    begin,
    end,
    OUTS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Sum over inputs begin .. end: float32 [OUTS, ROWS]. Reading past the weight's inputs, outputs or rows gives zeros."""
    total = tl.zeros((OUTS, ROWS), tl.float32)
    for k in range(begin, end, DEPTH):
        weights = w.load([out_at, k])
        rows = x.load([row_at, k])
        total = tl.dot(weights, rows.T, total, input_precision="ieee")
    return total


@triton.jit
def _leaf_begin(leaf, all_units, all_leaves, first_leaf, UNIT: tl.constexpr):
    """The first input of a leaf, counted from the rank's first leaf: see `Leaves`."""
    return ((first_leaf + leaf) * all_units // all_leaves - first_leaf * all_units // all_leaves) * UNIT


@triton.jit(do_not_specialize=["num_rows", "all_units", "all_leaves", "first_leaf"])
def _linear_kernel(
    w,
    w_low,
    exceptions,
    x,
    w_scales,
    bias,
    out,
    scratch,
    num_ar,
    num_rows,
    num_outs,
    steps,
    all_units,
    all_leaves,
    first_leaf,
    factor,
    OUTS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    TWO_VIEWS: tl.constexpr,
    GATED: tl.constexpr,
    SCALED: tl.constexpr,
    LOSSLESS: tl.constexpr,
    UNIT: tl.constexpr,
    PART_LEAVES: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IN_WORDS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """SCALED: whether the sums of outputs are multiplied by scales. LOSSLESS: whether the weights are in 12 bits. Then `w` has
    their first plane, and `w_low` the second."""
    # Neighbouring programs share a weight tile, over a band of row tiles. Both stay in the L2 cache.
    BAND: tl.constexpr = 16
    tile = tl.program_id(0)
    ar_rows = num_rows
    if TWO_VIEWS:
        ar_rows = tl.load(num_ar)  # Uploaded before the pass, so it may be read before `gdc_wait`.
    # Tiles never straddle the views. The grid has room for one row tile more than may be needed.
    ar_tiles = tl.cdiv(ar_rows, ROWS)
    row_tiles = ar_tiles + tl.cdiv(num_rows - ar_rows, ROWS)
    out_tiles = tl.cdiv(num_outs, OUTS)
    first = tile // (BAND * out_tiles) * BAND
    height = max(1, min(row_tiles - first, BAND))
    row_tile = first + tile % (BAND * out_tiles) % height
    out_at = tile % (BAND * out_tiles) // height * OUTS
    view = (row_tile >= ar_tiles).to(tl.int32) if TWO_VIEWS else 0
    row_at = row_tile * ROWS + view * (ar_rows - ar_tiles * ROWS)
    row_end = ar_rows + view * (num_rows - ar_rows)
    live = tile < row_tiles * out_tiles
    weight_at = view * num_outs + out_at
    first = 0
    if SPLIT:
        first = tl.program_id(1) * PART_LEAVES
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    if not live:
        return
    # Nodes of the tree that wait for their neighbour: of one leaf, and of two leaves. A node of four leaves waits in memory,
    # since there are registers for three tiles.
    total = tl.zeros((OUTS, ROWS), tl.float32)
    one, two = total, total
    held = tl.arange(0, OUTS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    held += (tl.program_id(1) * tl.num_programs(0) + tile).to(tl.int64) * (OUTS * ROWS)
    for leaf in range(first, first + PART_LEAVES):
        begin = _leaf_begin(leaf, all_units, all_leaves, first_leaf, UNIT)
        end = _leaf_begin(leaf + 1, all_units, all_leaves, first_leaf, UNIT)
        if LOSSLESS:
            total = sum_lossless(
                w, w_low, exceptions, x, weight_at, row_at, begin, end, steps, OUTS, ROWS, DEPTH
            )
        else:
            total = _sum(w, x, weight_at, row_at, begin, end, OUTS, ROWS, DEPTH)
        if PART_LEAVES > 1:
            if leaf % 2 == 0:
                one = total
            else:
                total = one + total
                if PART_LEAVES > 2:
                    if leaf % 4 == 1:
                        two = total
                    else:
                        total = two + total
                        if PART_LEAVES > 4:
                            if leaf % 8 == 3:
                                tl.store(scratch + held, total)
                                tl.debug_barrier()
                            else:
                                total = tl.load(scratch + held) + total
    if SCALED:
        index = out_at + tl.arange(0, OUTS)
        total *= tl.load(w_scales + view * num_outs + index, mask=index < num_outs, other=0.0)[:, None]
    if HAS_BIAS:
        index = out_at + tl.arange(0, OUTS)
        offset = tl.load(bias + view * num_outs + index, mask=index < num_outs, other=0.0)
        total += offset.to(tl.float32)[:, None]
    store_tile(
        total, out, row_at, row_end, out_at, num_rows, num_outs, factor, OUTS, ROWS, GATED, SPLIT, IN_WORDS
    )


def launch(
    x: Tensor,
    layer: DenseLayer | LosslessLayer,
    out: Tensor,
    num_ar: Tensor | None,
    parts: int,
    tiles: LinearTiles,
    inputs: Leaves | None = None,
    rounding: Rounding | None = None,
) -> None:
    """Write the result of `layer` to out: [rows, outs], or nodes of the tree [parts, rows, outs] without the bias.

    inputs: the leaves of the inputs; None for one leaf. rounding: how `out` stores the result if it is e4m3.
    """
    rows, ins = x.shape
    outs, scales = layer.outs, layer.scales
    factor, in_words = stored_as(rounding)
    lossless = isinstance(layer, LosslessLayer)
    views = layer.high.shape[0] // outs if isinstance(layer, LosslessLayer) else len(layer.weights)
    # The views' weights are contiguous in memory. A tile may read into the next view's weight, but does not store that.
    if isinstance(layer, LosslessLayer):
        weights = _tiles_of(layer.high, views * outs, ins // 4, tiles.outs, tiles.depth // 4)
        low = _tiles_of(layer.low, views * outs, ins // 8, tiles.outs, tiles.depth // 8)
        exceptions = layer.exceptions
    else:
        weights = low = _tiles_of(layer.weights[0], views * outs, ins, tiles.outs, tiles.depth)
        exceptions = out
    inputs = inputs or Leaves.whole(ins, leaf_unit(x.dtype), 1)
    split = out.dim() == 3
    row_tiles = triton.cdiv(rows, tiles.rows) + (views > 1)
    bias = None if split else layer.bias
    part_leaves = inputs.count // parts
    programs = triton.cdiv(outs, tiles.outs) * row_tiles
    scratch = out
    if part_leaves > 4:
        scratch = torch.empty(
            parts * programs * tiles.outs * tiles.rows, device=x.device, dtype=torch.float32
        )
    _linear_kernel[(programs, parts)](
        weights,
        low,
        exceptions,
        TensorDescriptor(x, [rows, ins], [x.stride(0), 1], [tiles.rows, tiles.depth]),
        out if scales is None else scales,
        out if bias is None else bias,
        out,
        scratch,
        out if num_ar is None else num_ar,
        rows,
        outs,
        ins // tiles.depth,
        inputs.units,
        inputs.total,
        inputs.first,
        factor,
        OUTS=tiles.outs,
        ROWS=tiles.rows,
        DEPTH=tiles.depth,
        TWO_VIEWS=views > 1,
        GATED=layer.interleaved,
        SCALED=scales is not None,
        LOSSLESS=lossless,
        UNIT=inputs.unit,
        PART_LEAVES=part_leaves,
        SPLIT=split,
        HAS_BIAS=bias is not None,
        IN_WORDS=in_words,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **chaining(),
    )


def _tiles_of(tensor: Tensor, outs: int, ins: int, tile_outs: int, tile_ins: int) -> TensorDescriptor:
    """A descriptor of memory [outs, ins] that begins where `tensor` does."""
    return TensorDescriptor(tensor, [outs, ins], [ins, 1], [tile_outs, tile_ins])
