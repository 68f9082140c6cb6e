"""The gate of SwiGLU (Shazeer, 2020). On a GPU it is fused into the epilogue of the linear layer before it."""

import torch
from torch import Tensor

_SERIAL = 32767
"""Up to this number of elements, PyTorch runs an operation on one thread.

With several threads, the bounds of their shares decide which elements run in vector code and which in scalar code. Scalar code
rounds exponentials differently. On one thread a row is always computed in the same way.
"""


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [rows, 2 * width] holds gate then up; returns silu(gate) * up [rows, width]."""
    gate, up = gate_up.chunk(2, dim=-1)
    out = torch.empty_like(up, memory_format=torch.contiguous_format)
    count = max(1, _SERIAL // gate.shape[-1])
    for part, result in zip(gate.split(count), out.split(count), strict=True):
        torch.ops.aten.silu.out(part, out=result)
    return out.mul_(up)
