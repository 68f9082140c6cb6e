"""The linear kernel for weights that have a scale for each output of a group of inputs: fine-grained FP8, GPTQ and AWQ.

A step of the sum covers inputs of one group. The tensor cores sum its products. Then this sum is multiplied by the scales, and
added to the float32 sum of the steps before it. The steps and their order depend on the weight alone, so a row has the same bits
in any launch. Integers are converted to the dtype of the inputs, which holds an integer minus its zero point exactly. As in
`triton`, the weight is on the M side of the instruction. If the result goes into the residual stream, the sum is cut into parts,
and each part is one leaf (see `Leaves`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from orthrus.kernels.device import chaining
from orthrus.kernels.linear.epilogue import store_tile
from orthrus.kernels.linear.tiles import rows_of_tile
from orthrus.kernels.linear.types import GroupedLayer, LinearTiles


@triton.jit
def _unpack(words, OUTS: tl.constexpr, DEPTH: tl.constexpr, DTYPE: tl.constexpr):
    """Words of 4-bit numbers (see `integers.pack_words`) as the numbers plus a power of two whose mantissa holds them.

    Setting the low bits of that power of two is exact, and faster than a conversion. In float32 no power of two is added.
    """
    nibbles = tl.arange(0, 8) * 4
    numbers = tl.reshape((words[:, :, None] >> nibbles[None, None, :]) & 15, (OUTS, DEPTH // 32, 4, 2, 4))
    # From [outs, run of 32, word, neighbour, eight] to the order of the inputs.
    numbers = tl.reshape(tl.permute(numbers, (0, 1, 4, 2, 3)), (OUTS, DEPTH))
    if tl.bfloat16 == DTYPE:
        return (numbers | 0x4300).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    if tl.float16 == DTYPE:
        return (numbers | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True)
    return numbers.to(DTYPE)


@triton.jit
def _scales_of(scales, zeros, x_scales, step, out_at, row_at, num_outs, num_rows, x_stride, group_steps,
               OUTS: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """The scales of a step's outputs; their zero points, if the weights are integers; and the scales of FP8 rows."""
    index = out_at + tl.arange(0, OUTS)
    offset, live = step // group_steps * num_outs + index, index < num_outs
    scale = tl.load(scales + offset, mask=live, other=0.0).to(tl.float32)
    zero, x_scale = scale, tl.zeros((ROWS,), tl.float32)
    if tl.float8e4nv == DTYPE:
        row = row_at + tl.arange(0, ROWS)
        x_scale = tl.load(x_scales + step * x_stride + row, mask=row < num_rows, other=0.0)
    else:
        zero = tl.load(zeros + offset, mask=live, other=0).to(tl.float32)
    return scale, zero, x_scale


@triton.jit
def _products(w, x, zero, k, out_at, row_at,
              OUTS: tl.constexpr, DEPTH: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """The sum over one step, before it is scaled: float32 [OUTS, ROWS]."""
    # One chain of branches, since Triton compiles what follows a `return` in a branch, even where the branch is always taken.
    if BITS == 0:
        numbers = w.load([out_at, k])
    elif BITS == 4:
        base = 128.0 if tl.bfloat16 == DTYPE else 1024.0 if tl.float16 == DTYPE else 0.0
        numbers = _unpack(w.load([out_at, k // 8]), OUTS, DEPTH, DTYPE) - (zero + base).to(DTYPE)[:, None]
    else:
        numbers = w.load([out_at, k]).to(tl.float32).to(DTYPE) - zero.to(DTYPE)[:, None]
    return tl.dot(numbers, x.load([row_at, k]).T, input_precision="ieee")


@triton.jit(do_not_specialize=["num_rows"])
def _grouped_kernel(
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
    group_steps,
    part_steps,
    OUTS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    GATED: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """BITS: bits of the weight's integers; 0 for FP8. DTYPE: the inputs' dtype, in which the weights are multiplied."""
    # Neighbouring programs share a weight tile, over a band of row tiles. Both stay in the L2 cache.
    BAND: tl.constexpr = 16
    tile = tl.program_id(0)
    row_tiles = tl.cdiv(num_rows, ROWS)
    out_tiles = tl.cdiv(num_outs, OUTS)
    first = tile // (BAND * out_tiles) * BAND
    height = min(row_tiles - first, BAND)
    row_at = (first + tile % (BAND * out_tiles) % height) * ROWS
    out_at = tile % (BAND * out_tiles) // height * OUTS
    begin, end = 0, steps
    if SPLIT:
        begin = tl.program_id(1) * part_steps
        end = min(begin + part_steps, steps)
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros((OUTS, ROWS), tl.float32)
    # Scales are loaded one step ahead. They are used right after the product, where nothing else would hide the latency.
    scale, zero, x_scale = _scales_of(
        scales, zeros, x_scales, begin, out_at, row_at, num_outs, num_rows, x_stride, group_steps, OUTS, ROWS, DTYPE,
    )  # fmt: skip
    for step in range(begin, end):
        later = min(step + 1, end - 1)
        scale_ahead, zero_ahead, x_scale_ahead = _scales_of(
            scales, zeros, x_scales, later, out_at, row_at, num_outs, num_rows, x_stride, group_steps, OUTS, ROWS, DTYPE,
        )  # fmt: skip
        product = (
            _products(w, x, zero, step * DEPTH, out_at, row_at, OUTS, DEPTH, BITS, DTYPE) * scale[:, None]
        )
        total += product * x_scale[None, :] if tl.float8e4nv == DTYPE else product
        scale, zero, x_scale = scale_ahead, zero_ahead, x_scale_ahead
    if HAS_BIAS:
        index = out_at + tl.arange(0, OUTS)
        total += tl.load(bias + index, mask=index < num_outs, other=0.0).to(tl.float32)[:, None]
    store_tile(total, out, row_at, num_rows, out_at, num_rows, num_outs, 1.0, OUTS, ROWS, GATED, SPLIT, False)


_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float8_e4m3fn: tl.float8e4nv,
}


def grouped_tiles(rows: int) -> LinearTiles:
    """The usual tiles. Their depth is not used: a step has `GroupedLayer.depth` inputs, because that decides bits."""
    if rows <= 64:
        return LinearTiles(64, rows_of_tile(rows, 16, 32, 64), 128, warps=4, stages=5)
    if rows <= 128:
        return LinearTiles(64, 128, 128, warps=4, stages=4)
    return LinearTiles(128, 128, 128, warps=8, stages=3)


def launch(
    x: Tensor,
    layer: GroupedLayer,
    out: Tensor,
    parts: int,
    tiles: LinearTiles | None = None,
    x_scales: Tensor | None = None,
) -> None:
    """Write the result of `layer` to out: [rows, outs], or the sums of the parts [parts, rows, outs] without the bias.

    x [rows, ins]: in 16 bits or float32; or in FP8, with x_scales from `quantise_inputs`. tiles: None for the usual ones.
    """
    rows, ins = x.shape
    outs, depth, bits = layer.outs, layer.depth, layer.bits
    cut = tiles or grouped_tiles(rows)
    steps = triton.cdiv(ins, depth)
    bias = layer.bias if out.dim() == 2 else None
    numbers = layer.numbers
    grid = triton.cdiv(outs, cut.outs) * triton.cdiv(rows, cut.rows)
    _grouped_kernel[(grid, parts)](
        TensorDescriptor(
            numbers, list(numbers.shape), [numbers.shape[1], 1], [cut.outs, depth // (8 if bits == 4 else 1)]
        ),
        TensorDescriptor(x, [rows, ins], [x.stride(0), 1], [cut.rows, depth]),
        layer.scales,
        layer.scales if layer.zeros is None else layer.zeros,
        layer.scales if x_scales is None else x_scales,
        layer.scales if bias is None else bias,
        out,
        rows,
        outs,
        0 if x_scales is None else x_scales.stride(0),
        steps,
        layer.group_size // depth,
        triton.cdiv(steps, parts),
        OUTS=cut.outs,
        ROWS=cut.rows,
        DEPTH=depth,
        BITS=bits,
        DTYPE=_DTYPES[x.dtype],
        GATED=layer.interleaved,
        SPLIT=parts > 1,
        HAS_BIAS=bias is not None,
        num_warps=cut.warps,
        num_stages=cut.stages,
        **chaining(),
    )
