"""The start of a pass on a GPU: one program per row."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from orthrus.kernels.device import chaining
from orthrus.kernels.rows.types import EmbeddedRows


@triton.jit
def _embed_kernel(
    tokens,
    positions,
    picks,
    table,
    weight,
    cos,
    sin,
    hidden,
    normed,
    cos_rows,
    sin_rows,
    width,
    eps,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    CHAINED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.load(tokens + row).to(tl.int64)
    if token < 0:
        token = tl.maximum(tl.load(picks - 1 - token), 0).to(tl.int64)
    place = tl.arange(0, WIDTH)
    inside = place < width
    value = tl.load(table + token * width + place, mask=inside, other=0.0)
    tl.store(hidden + row * width + place, value, mask=inside)
    scale = tl.load(weight + place, mask=inside, other=0.0)
    value = value.to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value) / width + eps)
    # Rounded before the product with the weight, as in Qwen3's own code.
    tl.store(normed + row * width + place, value.to(hidden.dtype.element_ty) * scale, mask=inside)
    position = tl.load(positions + row).to(tl.int64)
    dims = tl.arange(0, HALF)
    half = dims < DIM // 2
    cosine = tl.load(cos + position * (DIM // 2) + dims, mask=half, other=0.0)
    sine = tl.load(sin + position * (DIM // 2) + dims, mask=half, other=0.0)
    first = row * DIM + dims
    tl.store(cos_rows + first, cosine, mask=half)
    tl.store(cos_rows + first + DIM // 2, cosine, mask=half)
    tl.store(sin_rows + first, -sine, mask=half)
    tl.store(sin_rows + first + DIM // 2, sine, mask=half)


def embed(
    tokens: Tensor,
    positions: Tensor,
    picks: Tensor,
    table: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
) -> EmbeddedRows:
    """`embed` (kernels/rows/embedding) of contiguous tensors, up to float32."""
    rows, width, dim = tokens.shape[0], table.shape[1], 2 * cos.shape[1]
    hidden, normed = (torch.empty(rows, width, device=table.device, dtype=table.dtype) for _ in range(2))
    cos_rows, sin_rows = (torch.empty(rows, 1, dim, device=table.device, dtype=cos.dtype) for _ in range(2))
    _embed_kernel[(rows,)](
        tokens,
        positions,
        picks,
        table,
        norm_weight,
        cos,
        sin,
        hidden,
        normed,
        cos_rows,
        sin_rows,
        width,
        eps,
        WIDTH=triton.next_power_of_2(width),
        DIM=dim,
        HALF=triton.next_power_of_2(dim // 2),
        num_warps=8,
        **chaining(),
    )
    return EmbeddedRows(hidden, normed, cos_rows, sin_rows)
