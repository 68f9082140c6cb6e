"""The start of a pass: token embeddings, the first layer's norm, and each row's rotary angles."""

import torch
import torch.nn.functional as F
from torch import Tensor

from orthrus.kernels.device import runs_triton
from orthrus.kernels.rows.rms_norm import rms_norm
from orthrus.kernels.rows.types import EmbeddedRows


def embed(
    tokens: Tensor,
    positions: Tensor,
    picks: Tensor,
    table: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
) -> EmbeddedRows:
    """Look up `tokens` [rows] in table [vocab_size, hidden_size] and norm them; look up `positions` [rows] in cos and sin.

    picks, int32: the picks of earlier passes. A token -1 - i stands for picks[i], so the host need not know it. The pick
    `NO_TOKEN` is looked up as token 0: the results of that row are not used.
    cos, sin [positions, head_dim / 2]: cosine and sine of the rotary angles.
    """
    if runs_triton(table):
        from orthrus.kernels.rows import embedding_triton

        return embedding_triton.embed(tokens, positions, picks, table, norm_weight, eps, cos, sin)
    if bool((tokens < 0).any()):
        tokens = torch.where(
            tokens < 0, picks[(-1 - tokens).clamp_(min=0)].to(tokens.dtype).clamp_(min=0), tokens
        )
    hidden = F.embedding(tokens, table)
    cos, sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    return EmbeddedRows(
        hidden, rms_norm(hidden, norm_weight, eps), torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    )
