"""The kernel that merges the records of divided tiles, as split-KV attention needs it."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from orthrus.kernels.attention.items import DIVIDED_AT, NUM_DIVIDED, load_divided_row
from orthrus.kernels.attention.softmax import Records, initial, load, merge, result
from orthrus.kernels.attention.types import AttentionWork
from orthrus.kernels.device import chaining
from orthrus.kernels.rounding import Rounding, stored_as
from orthrus.kernels.rounding_triton import stored_place

_HEADS = 4
"""Heads of a program if there are many rows. Each has a warp. If there are few, a program has one head and so one warp."""
_FEW_ROWS = 32
"""Up to so many rows, the latency of loading records is the limit, and not the registers."""


@triton.jit
def _load_record(records, divided, i, heads, head, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """The i-th record of a divided row for some heads, in a tuple of one. Past its last record: the state before any key."""
    inside = head < tl.where(i < divided.num_records, heads, 0)
    return (load(records, (divided.record + i) * heads + head, inside, WIDTH, DIM),)


@triton.jit
def _merge_kernel(
    work,
    out,
    accs,
    tops,
    norms,
    heads,
    factor,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    BATCH: tl.constexpr,
    IN_WORDS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Merge the records of divided rows, HEADS heads of a row at a time: those of each span in order, then the spans."""
    if CHAINED:
        gdc_launch_dependents()
    num_divided, rows_at = tl.load(work + NUM_DIVIDED), tl.load(work + DIVIDED_AT)
    records = Records(accs, tops, norms)
    groups = tl.cdiv(heads, HEADS)
    dims = tl.arange(0, WIDTH)
    place = stored_place(dims, IN_WORDS)
    for unit in range(tl.program_id(0), num_divided * groups, tl.num_programs(0)):
        divided = load_divided_row(work + rows_at, unit // groups)
        span_ends = work + divided.span_ends_at
        head = unit % groups * HEADS + tl.arange(0, HEADS)
        span, total = initial(HEADS, WIDTH), initial(HEADS, WIDTH)
        if CHAINED:
            gdc_wait()
        for start in range(0, divided.num_records, BATCH):
            ends = tl.load(span_ends + start // 32) >> start % 32
            # The loads of a batch are in flight together. The records are merged in order.
            parts = _load_record(records, divided, start, heads, head, WIDTH, DIM)
            for i in tl.static_range(1, BATCH):
                parts = parts + _load_record(records, divided, start + i, heads, head, WIDTH, DIM)
            for i in tl.static_range(BATCH):
                span = merge(span, parts[i])
                if (ends >> i) & 1:
                    total = merge(total, span)
                    span = initial(HEADS, WIDTH)
        goal = (out + (divided.row * heads + head).to(tl.int64) * DIM)[:, None] + place[None, :]
        inside = head < heads
        value = result(total, inside, factor, out.dtype.element_ty)
        tl.store(goal, value, mask=inside[:, None] & (dims < DIM)[None, :])
    if CHAINED:
        gdc_wait()  # Programs without a row wait too: this launch must not finish before the previous one.


def merge_records(
    work: AttentionWork,
    out: Tensor,
    records: tuple[Tensor, Tensor, Tensor],
    rounding: Rounding | None,
    *,
    dim: int,
    width: int,
    programs: int,
) -> None:
    """Merge the records of divided rows, and write the results to out [rows, heads * dim].

    records: accs [records, dim], tops [records] and norms [records], as in `Records`. rounding: how `out` stores the results if
    it is e4m3. programs: the most to launch.
    """
    rows, heads = out.shape[0], out.shape[1] // dim
    few = rows <= _FEW_ROWS
    factor, in_words = stored_as(rounding)
    each = 1 if few else _HEADS
    _merge_kernel[(min(programs, rows * triton.cdiv(heads, each)),)](
        work.numbers,
        out,
        *records,
        heads,
        factor,
        DIM=dim,
        WIDTH=width,
        HEADS=each,
        IN_WORDS=in_words,
        # A warp merges all records of a head. The loads of so many are in flight together.
        BATCH=16 if few else 8,
        num_warps=each,
        **chaining(),
    )
