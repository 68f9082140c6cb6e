"""Moving draft blocks to their positions, once the device knows how many of the drafts before them are right.

A block may be launched before the host knows the picks of the previous pass. That pass verifies drafts, and the block begins with
the pick after the last right draft. The host plans the block as if as many drafts as possible were right. Before the block's pass
begins, the device moves the block back by one position for each draft that was not right. Behind a tree of drafts, the block also
gets the pages of the group of the last right draft.
"""

import torch
from torch import Tensor

from orthrus.kernels.attention.moving_blocks import FIELDS, Fields, last_right
from orthrus.kernels.attention.work_list import HEADER, ITEM, offset
from orthrus.kernels.device import runs_triton


def place_blocks(
    blocks: Tensor,
    count: int,
    picks: Tensor,
    tokens: Tensor,
    positions: Tensor,
    noise_keys: Tensor,
    work: Tensor,
) -> None:
    """Move the draft blocks of a pass. All tensors are int32.

    blocks: `block_list` of `count` blocks. picks: the runner's picks.
    The other tensors are those of the pass, and are changed in place. tokens, positions [rows]. noise_keys [rows with logits, 2].
    work: its work list, of which the items' `unseen` and the block tables change.
    """
    if runs_triton(blocks):
        from orthrus.kernels.attention import place_blocks_triton

        place_blocks_triton.place_blocks(blocks, count, picks, tokens, positions, noise_keys, work)
        return
    items = work[HEADER.itemsize // 4 :][: int(work[0]) * (ITEM.itemsize // 4)].view(-1, ITEM.itemsize // 4)
    for numbers in blocks[: FIELDS * count].view(-1, FIELDS).tolist():
        block = Fields(*numbers)
        behind = blocks[block.drafts_at :].tolist()
        drafts = behind[: block.num_drafts]
        picked = picks[block.first_pick :][: block.num_drafts + 1].tolist()
        last, right = last_right(drafts, behind[block.num_drafts :] if block.num_pages else None, picked)
        missing = block.furthest - right
        tokens[block.first_row] = -1 - (block.first_pick + last + 1)
        positions[block.first_row : block.first_row + block.num_rows] -= missing
        keys = blocks[block.keys_at :][: 2 * (block.furthest + block.num_logits)].view(-1, 2)
        noise_keys[block.first_logit : block.first_logit + block.num_logits] = keys[
            right : right + block.num_logits
        ]
        own = items[:, offset(ITEM, "first_row")]
        inside = (own >= block.first_row) & (own < block.first_row + block.num_rows)
        items[:, offset(ITEM, "unseen")] += torch.where(inside, missing, 0).to(torch.int32)
        if block.num_pages:
            group = behind[2 * block.num_drafts + last] if last >= 0 else 0
            pages = behind[3 * block.num_drafts + group * block.num_pages :][: block.num_pages]
            for table_at in items[inside, offset(ITEM, "table_at")].unique().tolist():
                first = table_at + block.first_page
                work[first : first + block.num_pages] = torch.tensor(pages, dtype=torch.int32)
