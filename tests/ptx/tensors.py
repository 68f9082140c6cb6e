"""What the cases have in common: random tensors, and the comparison with a reference."""

import torch
from torch import Tensor

from orthrus.kernels.rounding import Rounding, rounded


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def unset(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """NaN everywhere, so that `check` sees what was not written."""
    return torch.full(shape, float("nan"), dtype=dtype)


def check_stored(got: Tensor, exact: Tensor, rounding: Rounding) -> None:
    """got: e4m3 numbers, NaN where nothing was written. A number that is almost halfway between two may become either of them."""
    check(got.float(), rounded(exact, rounding).float(), 0.02)


def check(got: Tensor, exact: Tensor, tolerance: float = 4e-3) -> None:
    """tolerance: of the error's norm as a share of the exact result's. The default is the rounding to bfloat16."""
    assert not got.isnan().any(), f"{int(got.isnan().sum())} of {got.numel()} numbers were not written"
    error = ((got.double() - exact.double()).norm() / exact.double().norm()).item()
    assert error < tolerance, error


def gated(outs: Tensor) -> Tensor:
    """silu(gate) * up of outputs that are those of the gate and of up in turn, eight of each."""
    gate, up = outs.unflatten(-1, (-1, 2, 8)).unbind(-2)
    return (torch.nn.functional.silu(gate) * up).flatten(-2)
