"""The diffusion rows of a training pass: blocks at random anchors of every sequence.

The block at anchor n holds [x_n, MASK, ...] at positions n, n + 1, ...; its row at position i predicts token i + 1. It sees
AR keys of positions before n, and all rows of its own block. It never sees another block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

MaskRule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@cache
def _block_mask_maker() -> Callable[..., BlockMask]:
    """`create_block_mask`, compiled: it then makes a mask of tiles without holding the full mask of rows and keys in memory."""
    return torch.compile(create_block_mask)


@dataclass(frozen=True)
class DraftBlocks:
    """Blocks of `block_size` rows in a batch of sequences."""

    # int64 [batch, blocks]: the position of each block's first row.
    anchors: Tensor
    # int64 [batch, blocks]: live rows of each block. Serving drafts short blocks where long ones don't pay.
    lengths: Tensor
    # int64 [batch, blocks * block_size], as are the positions.
    tokens: Tensor
    positions: Tensor
    block_size: int
    # `visibility` for `flex_attention`, made once for all layers. None on a CPU, where that has no gradient.
    mask: BlockMask | None

    @property
    def live(self) -> Tensor:
        """Rows within their block's length: bool [batch, blocks, block_size]."""
        return torch.arange(self.block_size, device=self.lengths.device) < self.lengths[:, :, None]


def random_anchors(
    batch: int, anchors: int, length: int, block_size: int, generator: torch.Generator
) -> Tensor:
    """Distinct sorted positions int64 [batch, anchors] whose blocks lie within `length` (on the generator's device)."""
    order = torch.rand(batch, length - block_size + 1, generator=generator, device=generator.device)
    return order.topk(anchors, dim=1).indices.sort(1).values


def visibility(anchors: Tensor, lengths: Tensor, length: int, block_size: int) -> MaskRule:
    """The mask rule as `flex_attention` takes it: whether a row of a sequence sees a key. It is the same for all heads.

    anchors, lengths int64 [batch, blocks]. A row sees AR key k < `length` if k is before its block's anchor. It sees key
    `length` + r if row r is in its own block, among the first `lengths` rows. A row after these also sees itself, because a
    softmax needs at least one key.
    """

    def sees(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        block, other = row // block_size, key - length
        own = (other // block_size == block) & (other % block_size < lengths[batch, block])
        return torch.where(key < length, key < anchors[batch, block], own | (other == row))

    return sees


def draft_blocks(
    rows: Tensor, anchors: Tensor, lengths: Tensor, block_size: int, mask_token_id: int
) -> DraftBlocks:
    """Blocks at `anchors` of sequences `rows` int64 [batch, length]; `lengths` as in `DraftBlocks`."""
    positions = anchors[:, :, None] + torch.arange(block_size, device=rows.device)
    tokens = torch.full_like(positions, mask_token_id)
    tokens[:, :, 0] = rows.gather(1, anchors)
    mask = None
    if rows.is_cuda:
        rule = visibility(anchors, lengths, rows.shape[1], block_size)
        count = positions[0].numel()
        keys = rows.shape[1] + count
        mask = _block_mask_maker()(rule, len(rows), None, count, keys, device=rows.device)
    return DraftBlocks(anchors, lengths, tokens.flatten(1), positions.flatten(1), block_size, mask)
