"""Row-invariant linear layers on a GPU.

Each output is one float32 sum over the inputs in order. Where the result goes straight into a residual stream, few outputs would
leave a GPU idle, and the inputs are cut into segments whose number depends on the weight's shape alone: a sum for each, then
the sums in order. That tree is the same for every tile shape here, and whether a program walks over all segments or several
programs take one each, so a row has the same bits alone, in a decode batch and in a prefill chunk. Operands are swapped:
the weight is always on the matrix unit's M side, whose tile (64) few rows would leave empty, and the rows are on its N side,
which goes down to 8. One instruction for all row counts.
"""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.device import chaining
from kernels.linear import hopper as linear_stream
from kernels.rows.sampling_triton import gumbel_argmax, pick_best
from kernels.workspace import empty

if TYPE_CHECKING:
    from kernels.linear.weight import PackedLinear

_SEGMENT_UNIT = 128
"""Segment lengths are multiples of it: every tile's depth divides it."""
_SHORTEST_SEGMENT = 1024
_MOST_SEGMENTS = 4
_FULL_GRID = 128
"""Programs that keep the memory of a GPU with 132 multiprocessors busy."""


@cache
def num_segments(out_features: int, in_features: int) -> int:
    """Segments of the inputs of a layer whose result goes into the residual stream: enough to fill a GPU at one row."""
    segments = 1
    while (
        segments < _MOST_SEGMENTS
        and segments * triton.cdiv(out_features, 64) < _FULL_GRID
        and in_features // (2 * segments) >= _SHORTEST_SEGMENT
    ):
        segments *= 2
    return segments


@dataclass(frozen=True)
class LinearTiles:
    """How a launch is cut up: outputs, rows and depth (inputs per step) of a tile. Nothing here changes a bit of the result.

    split: segments get programs of their own.
    """

    outs: int
    rows: int
    depth: int
    split: bool = False
    warps: int = 4
    stages: int = 4


@triton.jit
def _sum(w, x, out_at, row_at, begin, end, OUTS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Sum over inputs begin .. end: float32 [OUTS, ROWS]. Reading past the weight's inputs, outputs or rows gives zeros."""
    total = tl.zeros((OUTS, ROWS), tl.float32)
    for k in range(begin, end, DEPTH):
        weights = w.load([out_at, k])
        rows = x.load([row_at, k])
        total = tl.dot(weights, rows.T, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["num_rows", "segments"])
def _linear_kernel(
    w,
    x,
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
    total = _sum(w, x, weight_at, row_at, begin, begin + segment, OUTS, ROWS, DEPTH)
    if not (SPLIT or WHOLE):
        for s in range(1, segments):
            total += _sum(w, x, weight_at, row_at, s * segment, (s + 1) * segment, OUTS, ROWS, DEPTH)
    width = num_outs
    if HAS_BIAS:
        index = out_at + tl.arange(0, OUTS)
        offset = tl.load(bias + view * num_outs + index, mask=index < num_outs, other=0.0)
        total += offset.to(tl.float32)[:, None]
    if GATED:
        # Blocks of 8 outputs: gate, up, gate, ... (`pack_gated_linear`); a thread holds both of a pair.
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


@triton.jit
def _add_rms_norm_kernel(
    x,
    bias,
    residual,
    weight,
    hidden,
    normed,
    num_ar,
    width,
    plane,
    eps,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TWO_VIEWS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Add a layer's segments (or its finished result, PARTS 1), then the residual, then the norm: one program per row."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, WIDTH)
    inside = place < width
    scale = tl.load(weight + place, mask=inside, other=0.0)
    if CHAINED:
        gdc_launch_dependents()
        # The residual was last touched many weights ago: it is fetched from memory while the layer ahead still runs, not when
        # the next one's weights queue there. Only into the L2 cache, since other kernels may still be writing it.
        sector = tl.minimum(tl.arange(0, WIDTH // 16) * 16, width - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [residual + row * width + sector],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        gdc_wait()
    dtype = hidden.dtype.element_ty
    before = tl.load(residual + row * width + place, mask=inside, other=0.0)
    total = tl.load(x + row * width + place, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(x + part * plane + row * width + place, mask=inside, other=0.0)
    if HAS_BIAS:
        shift = place
        if TWO_VIEWS:
            shift += tl.where(row >= tl.load(num_ar), width, 0)
        total += tl.load(bias + shift, mask=inside, other=0.0).to(tl.float32)
    value = (total.to(dtype).to(tl.float32) + before.to(tl.float32)).to(dtype)
    tl.store(hidden + row * width + place, value, mask=inside)
    value = value.to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value) / width + eps)
    # Rounded before the weight, as Qwen3's own code does.
    tl.store(normed + row * width + place, value.to(dtype) * scale, mask=inside)


def choose_tiles(rows: int, out_features: int, segments: int, dtype: torch.dtype) -> LinearTiles:
    """Tiles for a launch, by its row count and weight. out_features: of one view; of a gated layer, gate and up together."""
    if dtype == torch.float32:
        # Without a matrix unit, and only for checks: small enough to keep in registers.
        return LinearTiles(64, 16, 32, segments > 1, 4, 2)
    few = segments > 1
    if rows <= 64:
        return LinearTiles(64, 16 if rows <= 16 else 32 if rows <= 32 else 64, 128, few, 4, 4)
    if rows <= 128:
        if out_features <= 8192:
            return (
                LinearTiles(64, 128, 64, True, 4, 6) if few else LinearTiles(64, 128, 128, warps=4, stages=4)
            )
        # As many programs on a multiprocessor as take all tiles of a gated layer at once; the head has enough for any.
        return LinearTiles(64 if out_features <= 65536 else 128, 128, 64, few, 4, 3)
    if rows <= 256:
        if few:
            return LinearTiles(64, 128, 128, warps=4, stages=4)
        return LinearTiles(128, 128, 64, warps=4, stages=5 if out_features <= 65536 else 3)
    if few:
        return LinearTiles(128, 128, 64, warps=8, stages=4)
    if out_features > 65536:
        return LinearTiles(256, 128, 64, warps=8, stages=4)
    return LinearTiles(128, 256, 64, warps=8, stages=3)


def linear(
    x: Tensor,
    layer: "PackedLinear",
    num_ar: Tensor | None = None,
    out: Tensor | None = None,
    *,
    tiles: LinearTiles | None = None,
) -> Tensor:
    """`kernels.linear` for float16, bfloat16 and float32; any number of rows. tiles: for tests and measurements.

    Raises ValueError if a row of x is not a multiple of 16 bytes, which the GPU's copy engine needs.
    """
    if out is None:
        out = empty((x.shape[0], layer.weights[0].shape[0]), x.dtype, x.device)
    _launch(x, layer, out, num_ar, tiles, 1)
    return out


def linear_silu_mul(x: Tensor, layer: "PackedLinear", *, tiles: LinearTiles | None = None) -> Tensor:
    """`kernels.linear_silu_mul`, as `linear`; gate and up are rounded only after they have met."""
    outs = layer.weights[0].shape[0] // 2
    out = empty((x.shape[0], outs), x.dtype, x.device)
    _launch(x, layer, out, None, tiles, 1)
    return out


def linear_add_rms_norm(
    x: Tensor,
    layer: "PackedLinear",
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    num_ar: Tensor | None = None,
    *,
    tiles: LinearTiles | None = None,
    segments: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`kernels.linear_add_rms_norm`, as `linear`. tiles, segments: for tests and measurements."""
    rows, outs = residual.shape
    segments = segments or num_segments(outs, x.shape[1])
    if tiles is None and not linear_stream.streams(x):
        tiles = choose_tiles(rows, outs, segments, x.dtype)
    parts = segments if tiles is None or tiles.split else 1
    if parts > 1:
        out = empty((parts, rows, outs), torch.float32, x.device)
    else:
        out = empty((rows, outs), x.dtype, x.device)
    _launch(x, layer, out, num_ar, tiles, segments)
    return add_rms_norm(out, residual, norm_weight, eps, layer.bias if parts > 1 else None, num_ar)


def linear_gumbel_argmax(
    x: Tensor,
    layer: "PackedLinear",
    logits: Tensor,
    wanted: Tensor,
    temperatures: Tensor,
    keys: Tensor,
    picks: Tensor,
    first_pick: Tensor,
) -> None:
    """`kernels.linear_gumbel_argmax`: with few rows, each tile of outputs is picked from before it is stored, if it is."""
    if not linear_stream.streams(x):
        linear(x, layer, out=logits)
        gumbel_argmax(logits, temperatures, keys, picks, first_pick)
        return
    pick_best(*best_of_tiles(x, layer, logits, wanted, temperatures, keys), picks, first_pick)


def best_of_tiles(
    x: Tensor, layer: "PackedLinear", logits: Tensor, wanted: Tensor, temperatures: Tensor, keys: Tensor
) -> tuple[Tensor, Tensor]:
    """`sampling_triton.best_of_blocks` of a layer's outputs, for rows that `linear_stream` takes: see `linear_gumbel_argmax`."""
    shape = x.shape[0], linear_stream.num_tiles(logits.shape[1])
    values = torch.empty(shape, device=x.device, dtype=torch.float32)
    indices = torch.empty(shape, device=x.device, dtype=torch.int32)
    _launch(x, layer, logits, None, None, 1, (temperatures, keys, wanted, values, indices))
    return values, indices


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    bias: Tensor | None = None,
    num_ar: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """hidden = residual + x + bias, and its RMS norm: both [rows, width].

    x [rows, width], or float32 [segments, rows, width] to be added in order; bias [views, width].
    """
    rows, width = residual.shape
    hidden, normed = (empty((rows, width), residual.dtype, residual.device) for _ in range(2))
    _add_rms_norm_kernel[(rows,)](
        x,
        x if bias is None else bias,
        residual,
        norm_weight,
        hidden,
        normed,
        x if num_ar is None else num_ar,
        width,
        rows * width,
        eps,
        WIDTH=triton.next_power_of_2(width),
        PARTS=x.shape[0] if x.dim() == 3 else 1,
        HAS_BIAS=bias is not None,
        TWO_VIEWS=bias is not None and bias.shape[0] > 1,
        # So many that a thread has all it reads on its way at once: with more to read, the compiler saves registers and waits
        # for one part after the other. By the width alone, which the order of the norm's sum depends on.
        num_warps=min(32, max(4, triton.next_power_of_2(width) // 128)),
        **chaining(),
    )
    return hidden, normed


def _launch(
    x: Tensor,
    layer: "PackedLinear",
    out: Tensor,
    num_ar: Tensor | None,
    tiles: LinearTiles | None,
    segments: int,
    picking: tuple[Tensor, ...] = (),
) -> None:
    """Compute `layer` into out: [rows, outs], or [segments, rows, outs] without the bias. picking: see `linear_stream.launch`."""
    rows, ins = x.shape
    if ins * x.itemsize % 16:
        raise ValueError(
            f"a linear layer with {ins} inputs of {x.dtype} can't run on a GPU: its rows must be multiples of 16 bytes"
        )
    segment = triton.cdiv(triton.cdiv(ins, segments), _SEGMENT_UNIT) * _SEGMENT_UNIT
    if tiles is None and linear_stream.streams(x):
        linear_stream.launch(x, layer, out, num_ar, segments, segment, picking)
        return
    weight, views = layer.weights[0], len(layer.weights)
    outs = weight.shape[0]
    cut = tiles or choose_tiles(rows, outs, segments, x.dtype)
    split = cut.split and segments > 1
    row_tiles = triton.cdiv(rows, cut.rows) + (views > 1)
    bias = None if split else layer.bias
    _linear_kernel[(triton.cdiv(outs, cut.outs) * row_tiles, segments if split else 1)](
        # The views' weights lie one behind the other; a tile that reads into the next view's does not store it.
        TensorDescriptor(weight, [views * outs, ins], [ins, 1], [cut.outs, cut.depth]),
        TensorDescriptor(x, [rows, ins], [x.stride(0), 1], [cut.rows, cut.depth]),
        out if bias is None else bias,
        out,
        out if num_ar is None else num_ar,
        rows,
        outs,
        segment,
        segments,
        OUTS=cut.outs,
        ROWS=cut.rows,
        DEPTH=cut.depth,
        TWO_VIEWS=views > 1,
        GATED=layer.interleaved,
        SPLIT=split,
        WHOLE=segments == 1,
        HAS_BIAS=bias is not None,
        num_warps=cut.warps,
        num_stages=cut.stages,
        **chaining(),
    )
