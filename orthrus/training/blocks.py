"""The diffusion rows of a training pass: blocks at random anchors of every sequence.

The block at anchor n holds [x_n, MASK, ...] at positions n, n + 1, ...; its row at position i predicts token i + 1. It sees
AR keys of positions before n, and its own rows in both directions; never another block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DraftBlocks:
    """`tokens`, `positions` int64 [batch, anchors * block_size]; `mask` bool [batch, 1, rows, length + rows], see
    `TwoViewModel.diffuse`; `live` bool [batch, rows]: rows within their block's length."""

    tokens: Tensor
    positions: Tensor
    mask: Tensor
    live: Tensor


def random_anchors(
    batch: int, anchors: int, length: int, block_size: int, generator: torch.Generator
) -> Tensor:
    """Distinct sorted positions int64 [batch, anchors] whose blocks lie within `length` (on the generator's device)."""
    order = torch.rand(batch, length - block_size + 1, generator=generator, device=generator.device)
    return order.topk(anchors, dim=1).indices.sort(1).values


def draft_blocks(
    rows: Tensor, anchors: Tensor, lengths: Tensor, block_size: int, mask_token_id: int
) -> DraftBlocks:
    """Blocks at `anchors` int64 [batch, anchors] of sequences `rows` int64 [batch, length].

    lengths int64 [batch, anchors]: live rows of each block; serving drafts fewer rows than the block size when that is
    all that pays.
    """
    batch, count = anchors.shape
    device = rows.device
    offset = torch.arange(block_size, device=device)
    positions = (anchors[:, :, None] + offset).flatten(1)
    tokens = torch.full((batch, count, block_size), mask_token_id, dtype=torch.int64, device=device)
    tokens[:, :, 0] = rows.gather(1, anchors)
    live = (offset < lengths[:, :, None]).flatten(1)
    before = torch.arange(rows.shape[1], device=device) < anchors[:, :, None]
    block = torch.arange(count, device=device).repeat_interleave(block_size)
    # A row past its block's length still sees itself: a row that sees nothing has no softmax.
    itself = torch.eye(count * block_size, dtype=torch.bool, device=device)
    own = ((block[:, None] == block) & live[:, None, :]) | itself
    mask = torch.cat([before.repeat_interleave(block_size, 1), own], -1)
    return DraftBlocks(tokens.flatten(1), positions, mask[:, None], live)
