"""The linear kernel for any GPU and any number of rows.

Each output is one float32 sum over the inputs in order. If the result goes into the residual stream, there are few outputs, which
would leave a GPU idle. There the inputs are cut into segments, whose number depends on the weight's shape alone: each has a
sum of its own, and the sums are added in order. That order is the same for every tile shape here, and for one program that
walks over all segments as for several that take one each. So a row has the same bits alone, in a decode batch and in a
prefill chunk.

The operands are swapped. The matrix unit's M side has 64 places, which few rows would leave empty: so the weight is on that side,
and the rows are on its N side, which goes down to 8. All row counts use one instruction.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from orthrus.kernels.device import chaining
from orthrus.kernels.linear.tiles import choose_tiles, segment_length
from orthrus.kernels.linear.types import DenseLayer, LinearTiles


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
    SCALED: tl.constexpr,
):
    """Sum over inputs begin .. end: float32 [OUTS, ROWS]. Reading past the weight's inputs, outputs or rows gives zeros."""
    total = tl.zeros((OUTS, ROWS), tl.float32)
    for k in range(begin, end, DEPTH):
        weights = w.load([out_at, k])
        rows = x.load([row_at, k])
        if SCALED:
            # The matrix unit adds FP8 products with few bits: so each step's are added to the others outside it.
            total += tl.dot(weights, rows.T)
        else:
            total = tl.dot(weights, rows.T, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["num_rows", "segments"])
def _linear_kernel(
    w,
    x,
    w_scales,
    x_scales,
    bias,
    out,
    num_ar,
    num_rows,
    num_outs,
    segment,
    segments,
    OUTS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    TWO_VIEWS: tl.constexpr,
    GATED: tl.constexpr,
    SCALED: tl.constexpr,
    SPLIT: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    # Neighbouring programs share a weight tile over a band of row tiles: both stay in the L2 cache.
    BAND: tl.constexpr = 16
    tile = tl.program_id(0)
    split = num_rows
    if TWO_VIEWS:
        split = tl.load(num_ar)  # Uploaded before the pass: no kernel writes it.
    # Tiles never straddle the views. The grid has room for one row tile more than may be needed.
    ar_tiles = tl.cdiv(split, ROWS)
    row_tiles = ar_tiles + tl.cdiv(num_rows - split, ROWS)
    out_tiles = tl.cdiv(num_outs, OUTS)
    first = tile // (BAND * out_tiles) * BAND
    height = max(1, min(row_tiles - first, BAND))
    row_tile = first + tile % (BAND * out_tiles) % height
    out_at = tile % (BAND * out_tiles) // height * OUTS
    view = (row_tile >= ar_tiles).to(tl.int32) if TWO_VIEWS else 0
    row_at = row_tile * ROWS + view * (split - ar_tiles * ROWS)
    row_end = split + view * (num_rows - split)
    live = tile < row_tiles * out_tiles
    weight_at = view * num_outs + out_at
    begin = 0
    if SPLIT:
        begin = tl.program_id(1) * segment
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    if not live:
        return
    total = _sum(w, x, weight_at, row_at, begin, begin + segment, OUTS, ROWS, DEPTH, SCALED)
    if SCALED:
        index = out_at + tl.arange(0, OUTS)
        row = row_at + tl.arange(0, ROWS)
        w_scale = tl.load(w_scales + view * num_outs + index, mask=index < num_outs, other=0.0)[:, None]
        x_scale = tl.load(x_scales + row, mask=row < row_end, other=0.0)[None, :]
        total = total * w_scale * x_scale
    if not (SPLIT or WHOLE):
        tl.static_assert(
            not SCALED, "segments of FP8 weights have programs of their own: their bits are those of `hopper`"
        )
        for s in range(1, segments):
            total += _sum(w, x, weight_at, row_at, s * segment, (s + 1) * segment, OUTS, ROWS, DEPTH, SCALED)
    width = num_outs
    if HAS_BIAS:
        index = out_at + tl.arange(0, OUTS)
        offset = tl.load(bias + view * num_outs + index, mask=index < num_outs, other=0.0)
        total += offset.to(tl.float32)[:, None]
    if GATED:
        # Blocks of 8 outputs: gate, up, gate, ... (see `interleave`); a thread holds both of a pair.
        gate, up = tl.split(tl.reshape(total, (OUTS // 16, 2, 8, ROWS)).permute(0, 2, 3, 1))
        total = tl.reshape(gate / (1.0 + tl.exp(-gate)) * up, (OUTS // 2, ROWS))
        out_at, width = out_at // 2, num_outs // 2
    row_index = row_at + tl.arange(0, ROWS)
    out_index = out_at + tl.arange(0, total.shape[0])
    inside = (row_index < row_end)[None, :] & (out_index < width)[:, None]
    place = row_index[None, :].to(tl.int64) * width + out_index[:, None]
    if SPLIT:
        place += tl.program_id(1) * num_rows.to(tl.int64) * num_outs
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


def launch(
    x: Tensor,
    layer: DenseLayer,
    out: Tensor,
    num_ar: Tensor | None,
    segments: int,
    tiles: LinearTiles | None,
    x_scales: Tensor | None = None,
) -> None:
    """Compute `layer` into out: [rows, outs], or [segments, rows, outs] without the bias where segments are split.

    tiles: None for the usual ones. x_scales: those of FP8 rows, as `quantise_rows` gives them.
    """
    rows, ins = x.shape
    weight, views = layer.weights[0], len(layer.weights)
    outs = weight.shape[0]
    cut = tiles or choose_tiles(rows, outs, segments, x.dtype)
    split = cut.split and segments > 1
    row_tiles = triton.cdiv(rows, cut.rows) + (views > 1)
    bias = None if split else layer.bias
    scales = layer.scales
    _linear_kernel[(triton.cdiv(outs, cut.outs) * row_tiles, segments if split else 1)](
        # The views' weights are neighbours in memory. A tile that reads into the next view's does not store it.
        TensorDescriptor(weight, [views * outs, ins], [ins, 1], [cut.outs, cut.depth]),
        TensorDescriptor(x, [rows, ins], [x.stride(0), 1], [cut.rows, cut.depth]),
        out if scales is None else scales,
        out if x_scales is None else x_scales,
        out if bias is None else bias,
        out,
        out if num_ar is None else num_ar,
        rows,
        outs,
        segment_length(ins, segments),
        segments,
        OUTS=cut.outs,
        ROWS=cut.rows,
        DEPTH=cut.depth,
        TWO_VIEWS=views > 1,
        GATED=layer.interleaved,
        SCALED=scales is not None,
        SPLIT=split,
        WHOLE=segments == 1,
        HAS_BIAS=bias is not None,
        num_warps=cut.warps,
        num_stages=cut.stages,
        **chaining(),
    )
