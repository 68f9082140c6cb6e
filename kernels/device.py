"""Which of a kernel's two versions runs."""

import torch
from torch import Tensor


def runs_triton(x: Tensor) -> bool:
    """Whether x is for the Triton kernels. Everything on a GPU is, but float64, which no kernel here computes in."""
    return x.is_cuda and x.dtype != torch.float64
