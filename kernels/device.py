"""Which kernels a device can run, and how they are launched one after the other."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from orthrus.kernels.capabilities import has_wgmma, multiplies_fp8


def runs_triton(x: Tensor) -> bool:
    """Whether the Triton kernels take x. They take all tensors on a GPU except float64 ones."""
    return x.is_cuda and x.dtype != torch.float64


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to `device` without waiting for the work that is queued there.

    For a GPU it is first copied to page-locked memory, because a copy from other memory would wait.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@cache
def chaining() -> dict[str, Any]:
    """Launch arguments of every kernel of a pass: `CHAINED` and, if that is true, programmatic dependent launch.

    A chained kernel is launched while the kernel before it still runs. It first does what depends on no other kernel. Each of its
    programs then calls `gdc_wait`, before it touches anything that another kernel of the pass writes or reads. Programmatic
    dependent launch needs compute capability 9.0 or later.
    """
    chained = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return {"CHAINED": True, "launch_pdl": True} if chained else {"CHAINED": False}


@cache
def has_warpgroup_mma() -> bool:
    """Whether the GPU has Hopper's warpgroup MMA (wgmma)."""
    return torch.cuda.is_available() and has_wgmma(torch.cuda.get_device_capability())


@cache
def has_fp8_mma() -> bool:
    """Whether the GPU's tensor cores multiply FP8 numbers (e4m3)."""
    return torch.cuda.is_available() and multiplies_fp8(torch.cuda.get_device_capability())


@cache
def num_sms(device: torch.device) -> int:
    """Number of SMs of a GPU; 4 for a CPU, where Triton's interpreter runs programs one after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
