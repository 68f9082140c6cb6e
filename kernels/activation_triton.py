"""SwiGLU's gate on a GPU."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 1024


@triton.jit
def _silu_mul_kernel(gate_up, out, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = place < width
    gate = tl.load(gate_up + row * 2 * width + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(
        out + row * width + place, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=inside
    )


def silu_mul(gate_up: Tensor) -> Tensor:
    """`kernels.silu_mul` of contiguous gate_up, up to float32."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, device=gate_up.device, dtype=gate_up.dtype)
    _silu_mul_kernel[(rows, triton.cdiv(width, _COLUMNS))](gate_up, out, width, COLUMNS=_COLUMNS, num_warps=4)
    return out
