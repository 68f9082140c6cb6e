"""SwiGLU's gate (Shazeer, 2020). On a GPU it is part of the linear layer before it."""

import torch
from torch import Tensor

_SERIAL = 32767
"""Elements up to which PyTorch does not share an operation out among threads.

What it vectorises and what it leaves to scalar code, which rounds exponentials otherwise, depends on where a
thread's share begins and ends. Below this a row is all of one thread, in one way.
"""


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [rows, 2 * width] holds gate then up; returns silu(gate) * up [rows, width]."""
    gate, up = gate_up.chunk(2, dim=-1)
    out = torch.empty_like(up, memory_format=torch.contiguous_format)
    count = max(1, _SERIAL // gate.shape[-1])
    for part, result in zip(gate.split(count), out.split(count), strict=True):
        torch.ops.aten.silu.out(part, out=result)
    return out.mul_(up)
