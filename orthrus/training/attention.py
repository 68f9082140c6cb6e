"""Attention of the diffusion rows of a training pass: AR keys before a block's anchor, and the block's own rows.

The keys are the AR keys of the sequence, followed by those of the diffusion rows. A dense mask would have rows x (length +
rows) entries, nearly all of them false: 80 million for each sequence with the paper's 256 blocks of 32 rows. On CUDA,
`flex_attention` skips what is hidden, and its fused kernel stores no scores. On a CPU it has no gradient, so there the two
parts are computed separately, with rows x (length + block_size) scores.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from orthrus.training.blocks import DraftBlocks

KeysValues = tuple[Tensor, Tensor]


def draft_attention(query: Tensor, cache: KeysValues, own: KeysValues, blocks: DraftBlocks) -> Tensor:
    """Attention [batch, heads, rows, head_dim] of the rows of `blocks`, whose queries have the same shape.

    cache: the AR keys and values [batch, kv_heads, length, head_dim]; own: those of the blocks' rows
    [batch, kv_heads, rows, head_dim].
    """
    if blocks.mask is None:
        return _two_parts(query, cache, own, blocks)
    keys, values = (torch.cat(pair, 2) for pair in zip(cache, own, strict=True))
    attended: Tensor = flex_attention(query, keys, values, block_mask=blocks.mask, enable_gqa=True)
    return attended


def _two_parts(query: Tensor, cache: KeysValues, own: KeysValues, blocks: DraftBlocks) -> Tensor:
    (batch, heads, _, dim), (kv_heads, length) = query.shape, cache[0].shape[1:3]
    count, size = blocks.anchors.shape[1], blocks.block_size
    # Heads that share keys are treated as more rows of one head. All blocks share the AR keys; each has own keys.
    grouped = query.reshape(batch, kv_heads, -1, dim) * dim**-0.5
    per_block = (batch, kv_heads, heads // kv_heads, count, size)
    before = torch.arange(length, device=query.device) < blocks.anchors[:, :, None]
    itself = torch.eye(size, dtype=torch.bool, device=query.device)
    beside = blocks.live[:, :, None] | itself
    ar_scores = (grouped @ cache[0].mT).view(*per_block, length)
    own_keys, own_values = (t.reshape(batch, kv_heads, 1, count, size, dim) for t in own)
    own_scores = grouped.view(*per_block, dim) @ own_keys.mT
    scores = torch.cat(
        [
            ar_scores.masked_fill(~before[:, None, None, :, None], float("-inf")),
            own_scores.masked_fill(~beside[:, None, None], float("-inf")),
        ],
        -1,
    )
    ar_weights, own_weights = scores.softmax(-1).split([length, size], -1)
    attended = (ar_weights.reshape(*grouped.shape[:3], length) @ cache[1]).view(*per_block, dim)
    return (attended + own_weights @ own_values).reshape(query.shape)
