"""Moving draft blocks on a GPU: one program per block."""

import triton
import triton.language as tl
from torch import Tensor

from orthrus.kernels.attention.moving_blocks import FIELDS
from orthrus.kernels.attention.work_list import HEADER, ITEM, offset

_FIELDS = tl.constexpr(FIELDS)
_HEADER_SIZE = tl.constexpr(HEADER.itemsize // 4)
_ITEM_SIZE = tl.constexpr(ITEM.itemsize // 4)
_NUM_ITEMS = tl.constexpr(offset(HEADER, "num_items"))
_FIRST_ROW = tl.constexpr(offset(ITEM, "first_row"))
_UNSEEN = tl.constexpr(offset(ITEM, "unseen"))
_BLOCK = 128


@triton.jit
def _place_kernel(blocks, picks, tokens, positions, noise_keys, work, BLOCK: tl.constexpr):
    block = blocks + tl.program_id(0) * _FIELDS
    first_row, num_rows = tl.load(block), tl.load(block + 1)
    first_logit, num_logits = tl.load(block + 2), tl.load(block + 3)
    first_pick, num_drafts = tl.load(block + 4), tl.load(block + 5)
    drafts = blocks + tl.load(block + 6)
    right = num_drafts
    for at in range(0, num_drafts, BLOCK):
        place = at + tl.arange(0, BLOCK)
        inside = place < num_drafts
        draft = tl.load(drafts + place, mask=inside, other=0)
        pick = tl.load(picks + first_pick + place, mask=inside, other=0)
        right = tl.minimum(right, tl.min(tl.where(draft != pick, place, num_drafts)))
    missing = num_drafts - right
    tl.store(tokens + first_row, -1 - (first_pick + right))
    for at in range(0, num_rows, BLOCK):
        place = at + tl.arange(0, BLOCK)
        inside = place < num_rows
        position = tl.load(positions + first_row + place, mask=inside, other=0)
        tl.store(positions + first_row + place, position - missing, mask=inside)
    for at in range(0, 2 * num_logits, BLOCK):
        place = at + tl.arange(0, BLOCK)
        inside = place < 2 * num_logits
        key = tl.load(drafts + num_drafts + 2 * right + place, mask=inside, other=0)
        tl.store(noise_keys + 2 * first_logit + place, key, mask=inside)
    num_items = tl.load(work + _NUM_ITEMS)
    for at in range(0, num_items, BLOCK):
        place = at + tl.arange(0, BLOCK)
        item = work + _HEADER_SIZE + place * _ITEM_SIZE
        row = tl.load(item + _FIRST_ROW, mask=place < num_items, other=-1)
        inside = (row >= first_row) & (row < first_row + num_rows)
        unseen = tl.load(item + _UNSEEN, mask=inside, other=0)
        tl.store(item + _UNSEEN, unseen + missing, mask=inside)


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
