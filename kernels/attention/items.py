"""Reading the work list and walking over an item's keys, for kernels in Triton and in Gluon."""

from typing import NamedTuple

import triton
import triton.language as tl

from orthrus.kernels.attention import segments
from orthrus.kernels.attention.work_list import DIVIDED_ROW, HEADER, ITEM, DividedRow, Item, offset


class Keys(NamedTuple):
    """The keys of an item: first those in the cache, then those of its diffusion block."""

    begin: tl.tensor  # First position in the cache.
    end: tl.tensor  # End position in the cache, exclusive.
    cached_steps: tl.tensor  # Steps for the keys in the cache.
    steps: tl.tensor  # Steps for all keys.
    first_span: tl.tensor  # The first position at or after `begin` where a span begins.


class Walk(NamedTuple):
    """How far a kernel has come in an item's keys."""

    here: tl.tensor  # Position of the next step's first key. It also advances over the keys of a block.
    segment: tl.tensor  # The segment of this key.
    segment_end: tl.tensor  # Where that segment ends; 0 for a block, which is one segment.


SPAN = tl.constexpr(segments.SPAN)
_HEADER_SIZE = tl.constexpr(HEADER.itemsize // 4)
_ITEM_SIZE = tl.constexpr(ITEM.itemsize // 4)
NUM_ITEMS = tl.constexpr(offset(HEADER, "num_items"))
NUM_SHARED = tl.constexpr(offset(HEADER, "num_shared"))
NUM_DIVIDED = tl.constexpr(offset(HEADER, "num_divided"))
DIVIDED_AT = tl.constexpr(offset(HEADER, "divided_at"))
_FIRST_ROW = tl.constexpr(offset(ITEM, "first_row"))
_NUM_ROWS = tl.constexpr(offset(ITEM, "num_rows"))
_TABLE_AT = tl.constexpr(offset(ITEM, "table_at"))
_FIRST_SEGMENT = tl.constexpr(offset(ITEM, "first_segment"))
_END_SEGMENT = tl.constexpr(offset(ITEM, "end_segment"))
_NUM_KEYS = tl.constexpr(offset(ITEM, "num_keys"))
_WRITES_FROM = tl.constexpr(offset(ITEM, "writes_from"))
_BLOCK_ROW = tl.constexpr(offset(ITEM, "block_row"))
_BLOCK_ROWS = tl.constexpr(offset(ITEM, "block_rows"))
_CAUSAL = tl.constexpr(offset(ITEM, "causal"))
_RECORD = tl.constexpr(offset(ITEM, "record"))
_NUM_RECORDS = tl.constexpr(offset(ITEM, "num_records"))
_UNSEEN = tl.constexpr(offset(ITEM, "unseen"))
_DIVIDED_SIZE = tl.constexpr(DIVIDED_ROW.itemsize // 4)
_DIVIDED_ROW = tl.constexpr(offset(DIVIDED_ROW, "row"))
_DIVIDED_RECORD = tl.constexpr(offset(DIVIDED_ROW, "record"))
_DIVIDED_NUM_RECORDS = tl.constexpr(offset(DIVIDED_ROW, "num_records"))
_SPAN_ENDS_AT = tl.constexpr(offset(DIVIDED_ROW, "span_ends_at"))


@triton.jit
def load_item(work, index):
    """Item number `index` of the list, as an `Item` of scalar tensors."""
    item = work + _HEADER_SIZE + index * _ITEM_SIZE
    return Item(
        tl.load(item + _FIRST_ROW),
        tl.load(item + _NUM_ROWS),
        tl.load(item + _TABLE_AT),
        tl.load(item + _FIRST_SEGMENT),
        tl.load(item + _END_SEGMENT),
        tl.load(item + _NUM_KEYS),
        tl.load(item + _WRITES_FROM),
        tl.load(item + _BLOCK_ROW),
        tl.load(item + _BLOCK_ROWS),
        tl.load(item + _CAUSAL),
        tl.load(item + _RECORD),
        tl.load(item + _NUM_RECORDS),
        tl.load(item + _UNSEEN),
    )


@triton.jit
def load_divided_row(rows, index):
    """Number `index` of the divided rows that begin at `rows`: a `DividedRow` of scalar tensors."""
    row = rows + index * _DIVIDED_SIZE
    return DividedRow(
        tl.load(row + _DIVIDED_ROW),
        tl.load(row + _DIVIDED_RECORD),
        tl.load(row + _DIVIDED_NUM_RECORDS),
        tl.load(row + _SPAN_ENDS_AT),
    )


@triton.jit
def segment_start(index):
    """`segments.segment_start`."""
    near, middle = index * 128, 1024 + (index - 8) * 512
    far, farther = 8192 + (index - 22) * 1024, 32768 + (index - 46) * 2048
    return tl.where(index < 22, tl.where(index < 8, near, middle), tl.where(index < 46, far, farther))


@triton.jit
def item_keys(item, STEP: tl.constexpr):
    """The keys of the item, in steps of STEP keys."""
    begin, end = segment_start(item.first_segment), tl.minimum(segment_start(item.end_segment), item.num_keys)
    cached = tl.cdiv(tl.maximum(end - begin, 0), STEP)
    return Keys(begin, end, cached, cached + tl.cdiv(item.block_rows, STEP), tl.cdiv(begin, SPAN) * SPAN)


@triton.jit
def start_walk(item, keys):
    """The walk before an item's first step."""
    segment_end = tl.where(keys.cached_steps > 0, segment_start(item.first_segment + 1), 0)
    return Walk(keys.begin, item.first_segment, segment_end)


@triton.jit
def next_segment(walk, keys, step):
    """The walk in the segment that begins after step number `step`."""
    segment = walk.segment + 1
    segment_end = tl.where(step + 1 < keys.cached_steps, segment_start(segment + 1), 0)
    return Walk(walk.here, segment, segment_end)


@triton.jit
def take_step(walk, keys, step, STEP: tl.constexpr):
    """The walk after step number `step`, and whether a segment ends with it."""
    here = walk.here + STEP
    ends = (step + 1 == keys.steps) | (step + 1 == keys.cached_steps) | (here == walk.segment_end)
    return Walk(here, walk.segment, walk.segment_end), ends


@triton.jit
def ends_record(walk, keys, step):
    """Whether the segment that ends at step number `step` also ends a record. walk: the walk after that step.

    Up to `first_span` every segment ends a record. From there on every span does. A diffusion block belongs to the last span in
    the cache.
    """
    ends_span = (walk.here % SPAN == 0) & (step + 1 != keys.cached_steps)
    return (step + 1 == keys.steps) | (walk.here <= keys.first_span) | ends_span
