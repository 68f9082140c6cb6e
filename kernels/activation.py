"""SwiGLU's gate (Shazeer, 2020). On a GPU it is part of the linear layer before it."""

import torch.nn.functional as F
from torch import Tensor


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [rows, 2 * width] holds gate then up; returns silu(gate) * up [rows, width]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
