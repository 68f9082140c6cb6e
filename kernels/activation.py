"""SwiGLU's gate (Shazeer, 2020)."""

import torch.nn.functional as F
from torch import Tensor

from kernels.device import runs_triton


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [rows, 2 * width] holds gate then up; returns silu(gate) * up [rows, width]."""
    if runs_triton(gate_up):
        from kernels import activation_triton

        return activation_triton.silu_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
