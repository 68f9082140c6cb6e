"""Root-mean-square norm over the last dimension (Zhang and Sennrich, 2019). On a GPU it is fused into the kernel before it."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, the mean in float32 or wider; shape and dtype of x.

    `weight` broadcasts against x, so that one call can norm heads that have different weights.
    """
    if x.dtype not in (torch.float32, torch.float64):
        return F.rms_norm(x, x.shape[-1:], None, eps).mul_(weight)
    # A pass on a CPU norms few rows, but 25 times or more. So the time depends on the number of operations.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = torch.addcmul(_constant(eps, x.dtype, x.device), norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return (x * scale).mul_(weight)


@lru_cache
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=device)
