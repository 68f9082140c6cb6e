"""The kernel after a layer whose result goes into the residual stream: sum of split-K parts and ranks, residual, RMS norm."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from orthrus.kernels.device import chaining
from orthrus.kernels.linear.blocks_triton import RoundedGroups, empty_groups, round_groups
from orthrus.kernels.ranks.peer_memory import PeerMemory
from orthrus.kernels.ranks.peer_triton import exchange_row
from orthrus.kernels.rounding import Rounding, is_fixed, stored_as
from orthrus.kernels.rounding_triton import stored_place, stored_value
from orthrus.kernels.workspace import empty


@triton.jit(do_not_specialize=["rank", "box_rows", "scale_stride"])
def _add_rms_norm_kernel(
    x,
    bias,
    residual,
    weight,
    hidden,
    normed,
    numbers,
    scales,
    num_ar,
    boxes,
    flags,
    counts,
    status,
    rank,
    box_rows,
    width,
    plane,
    scale_stride,
    factor,
    eps,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    RANKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TWO_VIEWS: tl.constexpr,
    IN_WORDS: tl.constexpr,
    GROUPED: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Add the parts of a layer's sum (PARTS 1: its finished result) and the residual, then norm the sum; one program per row.

    With several ranks, each first adds its own parts. Then the sums of the ranks are added.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    scale = tl.load(weight + column, mask=inside, other=0.0)
    if CHAINED:
        gdc_launch_dependents()
        # The residual was evicted from the L2 cache since it was written. It is prefetched while the layer before still runs, and
        # before the loads of the next layer's weights. It is not loaded yet, because other kernels may still be writing it.
        sector = tl.minimum(tl.arange(0, WIDTH // 16) * 16, width - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [residual + row * width + sector],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        gdc_wait()
    dtype = hidden.dtype.element_ty
    before = tl.load(residual + row * width + column, mask=inside, other=0.0)
    total = tl.load(x + row * width + column, mask=inside, other=0.0)
    # Parts are nodes of the tree of leaves: see `tree`.
    if PARTS > 1:
        total += tl.load(x + plane + row * width + column, mask=inside, other=0.0)
    if PARTS > 2:
        second = tl.load(x + 2 * plane + row * width + column, mask=inside, other=0.0)
        total += second + tl.load(x + 3 * plane + row * width + column, mask=inside, other=0.0)
    if RANKS > 1:
        total = exchange_row(
            total, boxes, flags, counts, status, row, column, inside, box_rows, width, rank, RANKS
        )
    if HAS_BIAS:
        shift = column
        if TWO_VIEWS:
            shift += tl.where(row >= tl.load(num_ar), width, 0)
        total += tl.load(bias + shift, mask=inside, other=0.0).to(tl.float32)
    value = (total.to(dtype).to(tl.float32) + before.to(tl.float32)).to(dtype)
    tl.store(hidden + row * width + column, value, mask=inside)
    value = value.to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value) / width + eps)
    # Rounded before the product with the weight, as in Qwen3's own code.
    value = value.to(dtype) * scale
    goal = normed + row * width + stored_place(column, IN_WORDS)
    tl.store(goal, stored_value(value, factor, normed.dtype.element_ty), mask=inside)
    if GROUPED:
        groups = value.to(tl.float32).reshape((WIDTH // 128, 128))
        number, group_scales = round_groups(groups)
        tl.store(numbers + row * width + column, number.reshape((WIDTH,)), mask=inside)
        group = tl.arange(0, WIDTH // 128)
        tl.store(scales + group * scale_stride + row, group_scales, mask=group * 128 < width)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    bias: Tensor | None = None,
    num_ar: Tensor | None = None,
    rounding: Rounding | None = None,
    peers: PeerMemory | None = None,
) -> tuple[Tensor, Tensor]:
    """hidden = residual + x + bias, and its RMS norm, stored as `rounding` says: both [rows, width].

    x [rows, width], or float32 [parts, rows, width]: one, two or four nodes of a tree of sums.
    bias [views, width]. num_ar: see `Weight.linear`, for a bias of two views.
    peers: the memory of the ranks that have the rest of the sum; x is float32 then. None if the sum is complete.
    """
    parts = x.shape[0] if x.dim() == 3 else 1
    assert parts in (1, 2, 4), "other numbers of parts are not added in the order of the tree"
    exchange = (
        (x,) * 4 if peers is None else (peers.sums.boxes, peers.sums.flags, peers.sums.counts, peers.status)
    )
    rows, width = residual.shape
    factor, in_words = stored_as(rounding)
    grouped = rounding is not None and rounding.factor is None
    hidden = empty((rows, width), residual.dtype, residual.device)
    dtype = torch.float8_e4m3fn if is_fixed(rounding) else residual.dtype
    normed = empty((rows, width), dtype, residual.device)
    numbers, scales = empty_groups(rows, width, residual.device) if grouped else (normed, normed)
    _add_rms_norm_kernel[(rows,)](
        x,
        x if bias is None else bias,
        residual,
        norm_weight,
        hidden,
        normed,
        numbers,
        scales,
        x if num_ar is None else num_ar,
        *exchange,
        0 if peers is None else peers.rank,
        rows if peers is None else peers.sums.rows,
        width,
        rows * width,
        scales.stride(0),
        factor,
        eps,
        WIDTH=triton.next_power_of_2(width),
        PARTS=parts,
        RANKS=1 if peers is None else peers.size,
        HAS_BIAS=bias is not None,
        TWO_VIEWS=bias is not None and bias.shape[0] > 1,
        IN_WORDS=in_words,
        GROUPED=grouped,
        # With so many warps, all loads of a thread are in flight at once. With more loads per thread, the compiler would save
        # registers and wait for one after the other. The number depends on the width alone, because it decides the order of the
        # norm's sum.
        num_warps=min(32, max(4, triton.next_power_of_2(width) // 128)),
        **chaining(),
    )
    return hidden, RoundedGroups.of(normed, numbers, scales) if grouped else normed
