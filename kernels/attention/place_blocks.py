"""Moving draft blocks to where they belong, once the device knows how many drafts before them are right.

A block may be launched before the host knows what the pass before it picked. That pass verifies drafts, and the block begins
with its pick behind the last right draft. The host plans the block for the furthest place: as if all drafts were right. Before
the pass begins, its numbers are corrected on the device, by as many positions as drafts were not right.
"""

import torch
from torch import Tensor

from orthrus.kernels.attention.moving_blocks import FIELDS
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
    """Correct a pass for the drafts that were right. All tensors are int32.

    blocks: `block_list` of `count` blocks. picks: the runner's. tokens, positions: of the pass, [rows]. noise_keys: of its rows
    that need logits, [rows, 2]. work: its work list, whose items get their `unseen`.
    """
    if runs_triton(blocks):
        from orthrus.kernels.attention import place_blocks_triton

        place_blocks_triton.place_blocks(blocks, count, picks, tokens, positions, noise_keys, work)
        return
    items = work[HEADER.itemsize // 4 :][: int(work[0]) * (ITEM.itemsize // 4)].view(-1, ITEM.itemsize // 4)
    for fields in blocks[: FIELDS * count].view(-1, FIELDS).tolist():
        first_row, num_rows, first_logit, num_logits, first_pick, num_drafts, drafts_at, _ = fields
        drafts = blocks[drafts_at : drafts_at + num_drafts]
        wrong = (drafts != picks[first_pick : first_pick + num_drafts]).nonzero().flatten()
        right = int(wrong[0]) if len(wrong) else num_drafts
        tokens[first_row] = -1 - (first_pick + right)
        positions[first_row : first_row + num_rows] -= num_drafts - right
        keys = blocks[drafts_at + num_drafts :][: 2 * (num_drafts + num_logits)].view(-1, 2)
        noise_keys[first_logit : first_logit + num_logits] = keys[right : right + num_logits]
        own = items[:, offset(ITEM, "first_row")]
        inside = (own >= first_row) & (own < first_row + num_rows)
        items[:, offset(ITEM, "unseen")] += torch.where(inside, num_drafts - right, 0).to(torch.int32)
