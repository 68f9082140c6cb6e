"""Moving draft blocks on a GPU: one program per block."""

import triton
import triton.language as tl
from torch import Tensor

from orthrus.kernels.attention.moving_blocks import FIELDS, MOST_NODES
from orthrus.kernels.attention.work_list import HEADER, ITEM, offset

_FIELDS = tl.constexpr(FIELDS)
_HEADER_SIZE = tl.constexpr(HEADER.itemsize // 4)
_ITEM_SIZE = tl.constexpr(ITEM.itemsize // 4)
_NUM_ITEMS = tl.constexpr(offset(HEADER, "num_items"))
_FIRST_ROW = tl.constexpr(offset(ITEM, "first_row"))
_TABLE_AT = tl.constexpr(offset(ITEM, "table_at"))
_UNSEEN = tl.constexpr(offset(ITEM, "unseen"))
_BLOCK = MOST_NODES


@triton.jit
def _last_of_chain(drafts, num_drafts, picks, BLOCK: tl.constexpr):
    """The index of the last right draft of a chain; -1 if the first is wrong."""
    right = num_drafts
    for at in range(0, num_drafts, BLOCK):
        place = at + tl.arange(0, BLOCK)
        inside = place < num_drafts
        draft = tl.load(drafts + place, mask=inside, other=0)
        pick = tl.load(picks + place, mask=inside, other=0)
        right = tl.minimum(right, tl.min(tl.where(draft != pick, place, num_drafts)))
    return right - 1


@triton.jit
def _last_of_tree(drafts, num_drafts, picks, BLOCK: tl.constexpr):
    """The index of the last right draft of a tree, -1 if there is none; and how many are right."""
    place = tl.arange(0, BLOCK)
    inside = place < num_drafts
    draft = tl.load(drafts + place, mask=inside, other=0)
    parent = tl.load(drafts + num_drafts + place, mask=inside, other=-2)
    pick = tl.load(picks + 1 + parent, mask=inside, other=0)
    # A draft that differs from the pick after its parent can't be right.
    parent = tl.where(draft == pick, parent, -2)
    last, right = -1, 0
    found = tl.max(tl.where(parent == -1, place, -1))
    while found >= 0:
        last, right = found, right + 1
        found = tl.max(tl.where(parent == last, place, -1))
    return last, right


@triton.jit
def _place_kernel(blocks, picks, tokens, positions, noise_keys, work, BLOCK: tl.constexpr):
    block = blocks + tl.program_id(0) * _FIELDS
    first_row, num_rows = tl.load(block), tl.load(block + 1)
    first_logit, num_logits = tl.load(block + 2), tl.load(block + 3)
    first_pick, num_drafts = tl.load(block + 4), tl.load(block + 5)
    drafts, furthest = blocks + tl.load(block + 6), tl.load(block + 7)
    keys = blocks + tl.load(block + 8)
    first_page, num_pages = tl.load(block + 9), tl.load(block + 10)
    if num_pages > 0:
        last, right = _last_of_tree(drafts, num_drafts, picks + first_pick, BLOCK)
    else:
        last = _last_of_chain(drafts, num_drafts, picks + first_pick, BLOCK)
        right = last + 1
    missing = furthest - right
    tl.store(tokens + first_row, -1 - (first_pick + last + 1))
    for at in range(0, num_rows, BLOCK):
        place = at + tl.arange(0, BLOCK)
        inside = place < num_rows
        position = tl.load(positions + first_row + place, mask=inside, other=0)
        tl.store(positions + first_row + place, position - missing, mask=inside)
    for at in range(0, 2 * num_logits, BLOCK):
        place = at + tl.arange(0, BLOCK)
        inside = place < 2 * num_logits
        key = tl.load(keys + 2 * right + place, mask=inside, other=0)
        tl.store(noise_keys + 2 * first_logit + place, key, mask=inside)
    group = tl.load(drafts + 2 * num_drafts + last, mask=(num_pages > 0) & (last >= 0), other=0)
    pages = drafts + 3 * num_drafts + group * num_pages
    num_items = tl.load(work + _NUM_ITEMS)
    for at in range(0, num_items, BLOCK):
        place = at + tl.arange(0, BLOCK)
        item = work + _HEADER_SIZE + place * _ITEM_SIZE
        row = tl.load(item + _FIRST_ROW, mask=place < num_items, other=-1)
        inside = (row >= first_row) & (row < first_row + num_rows)
        unseen = tl.load(item + _UNSEEN, mask=inside, other=0)
        tl.store(item + _UNSEEN, unseen + missing, mask=inside)
        table = work + tl.load(item + _TABLE_AT, mask=inside, other=0) + first_page
        for page in range(num_pages):
            tl.store(table + page, tl.zeros_like(row) + tl.load(pages + page), mask=inside)


def place_blocks(
    blocks: Tensor,
    count: int,
    picks: Tensor,
    tokens: Tensor,
    positions: Tensor,
    noise_keys: Tensor,
    work: Tensor,
) -> None:
    """See `place_blocks` (kernels/attention/place_blocks)."""
    _place_kernel[(count,)](blocks, picks, tokens, positions, noise_keys, work, BLOCK=_BLOCK, num_warps=4)
