"""For tests of Triton kernels in Triton's interpreter on the CPU, each against its plain PyTorch version.

The interpreter multiplies tiles with numpy, so bits are only compared between launches whose tiles have the same shape. tests/gpu
compares all shapes, in bfloat16 on tensor cores.
"""

import pytest
import torch

from orthrus.kernels.rows.sampling import noise_keys

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton compiles here: tests/gpu checks the kernels"
)

DTYPES = [torch.float16, torch.float32]
CPU = torch.device("cpu")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def assert_near(got: torch.Tensor, exact: torch.Tensor) -> None:
    """Relative Frobenius error within a few units of got's dtype."""
    error = (got.double() - exact.double()).norm() / exact.double().norm()
    assert error < 4 * torch.finfo(got.dtype).eps, error


def keys_of(seeds: list[int], positions: list[int]) -> torch.Tensor:
    return torch.from_numpy(noise_keys(seeds, positions))
