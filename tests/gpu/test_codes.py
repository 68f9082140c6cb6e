"""Layers in 4-bit codes on a GPU, at Qwen3-8B's shapes: near float64, and batch-invariant."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from torch import Tensor
from torch.nn.functional import silu

from orthrus.kernels.device import has_warpgroup_mma
from orthrus.kernels.linear import Weight, pack_weight
from orthrus.kernels.linear.codes import round_to_codes
from orthrus.kernels.linear.fp8 import UNSCALED
from orthrus.kernels.linear.weight import Parameters
from orthrus.kernels.rounding import Rounding, rounded
from tests.gpu.test_kernels import DEVICE, ROWS, error, randn

pytestmark = pytest.mark.skipif(not has_warpgroup_mma(), reason="this GPU is not a Hopper GPU")


def layer_of(*outs: int, ins: int, bias: bool = False, gated: bool = False) -> tuple[Weight, Tensor, Tensor]:
    """A layer, its weight in float64, and its biases."""
    parts: list[Parameters] = [
        {"weight": randn(n, ins, seed=seed) * ins**-0.5}
        | ({"bias": randn(n, seed=seed + 50)} if bias else {})
        for seed, n in enumerate(outs)
    ]
    full = torch.cat([round_to_codes(part["weight"]).dequantised() for part in parts]).double()
    biases = torch.cat([part.get("bias", torch.zeros(len(part["weight"]), device=DEVICE)) for part in parts])
    layer = pack_weight([[dict(part) for part in parts]], "int4", gated=gated)
    return layer, full, biases.double()


def exact_inputs(x: Tensor) -> Tensor:
    """The inputs as the kernels multiply them: rounded, in float64."""
    return rounded(x.float(), UNSCALED).double()


@pytest.mark.parametrize(
    ("outs", "ins", "bias"),
    [((4096, 1024, 1024), 4096, False), ((4096,), 12288, True), ((200, 72), 384, True)],
)
def test_linear_is_near_the_reference_and_batch_invariant(
    outs: tuple[int, ...], ins: int, bias: bool
) -> None:
    layer, weight, biases = layer_of(*outs, ins=ins, bias=bias)
    x = randn(600, ins, seed=9)
    full = layer.linear(x)
    assert error(full[:200], exact_inputs(x[:200]) @ weight.T + biases) < 1e-2
    for rows in ROWS:
        for start in (0, 600 - rows) if rows <= 600 else ():
            got = layer.linear(x[start : start + rows])
            assert torch.equal(got, full[start : start + rows]), (rows, start)


@pytest.mark.parametrize("rounding", [None, Rounding(0.25)])
def test_gated_linear_is_batch_invariant(rounding: Rounding | None) -> None:
    layer, weight, _ = layer_of(12288, 12288, ins=4096, gated=True)
    x = randn(600, 4096, seed=9)
    full = layer.linear_silu_mul(x, rounding=rounding).float()
    gate, up = (exact_inputs(x[:100]) @ weight.T).chunk(2, 1)
    exact = silu(gate) * up
    assert error(full[:100], exact if rounding is None else rounded(exact, rounding).double()) < 2e-2
    for rows in ROWS:
        if rows <= 600:
            assert torch.equal(layer.linear_silu_mul(x[:rows], rounding=rounding).float(), full[:rows]), rows


@pytest.mark.parametrize(("outs", "ins"), [(4096, 4096), (4096, 12288)])
def test_residual_linear_is_batch_invariant_for_each_number_of_parts(outs: int, ins: int) -> None:
    layer, weight, _ = layer_of(outs, ins=ins)
    x, residual, norm = randn(600, ins, seed=9), randn(600, outs, seed=2), randn(outs, seed=3)
    # The number of rows decides how many parts the sum has.
    for numbers in ([rows for rows in ROWS if rows <= 64], [rows for rows in ROWS if 64 < rows <= 128]):
        most = numbers[-1]
        full = layer.linear_add_rms_norm(x[:most], residual[:most], norm, 1e-6)
        assert error(full[0], exact_inputs(x[:most]) @ weight.T + residual[:most].double()) < 1e-2
        for rows in numbers:
            got = layer.linear_add_rms_norm(x[:rows], residual[:rows], norm, 1e-6)
            assert torch.equal(got[0], full[0][:rows]) and torch.equal(got[1], full[1][:rows]), rows
    for rows in (200, 300, 512):
        hidden, _ = layer.linear_add_rms_norm(x[:rows], residual[:rows], norm, 1e-6)
        assert error(hidden, exact_inputs(x[:rows]) @ weight.T + residual[:rows].double()) < 1e-2
