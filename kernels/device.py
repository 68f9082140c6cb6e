"""Which of a kernel's two versions runs, and how kernels follow one another on a GPU."""

from functools import cache
from typing import Any

import torch
from torch import Tensor


def runs_triton(x: Tensor) -> bool:
    """Whether x is for the Triton kernels. Everything on a GPU is, but float64, which no kernel here computes in."""
    return x.is_cuda and x.dtype != torch.float64


@cache
def chaining() -> dict[str, Any]:
    """Launch arguments of every kernel of a pass: `CHAINED` and, where it is true, programmatic dependent launch.

    A chained kernel is launched while the one before it runs, does what depends on nothing, and waits
    (`gdc_wait`, in every program, before it touches anything that another kernel of the pass writes or reads).
    From compute capability 9.0 on.
    """
    chained = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return {"CHAINED": True, "launch_pdl": True} if chained else {"CHAINED": False}


@cache
def has_warpgroup_mma() -> bool:
    """Whether kernels with Hopper's own matrix instructions run; later GPUs have others."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 4 on a CPU, where Triton's interpreter runs programs one after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
