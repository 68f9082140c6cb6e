"""The FP8 format: its rounding, how near a layer is to the unrounded one, and batch invariance."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from orthrus.kernels.linear import Parameters, fp8_block, pack_weight
from orthrus.kernels.linear.fp8 import quantise_rows, round_rows
from tests.kernels.interpreted import interpreted, randn


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def test_every_row_has_a_scale_that_brings_its_largest_number_to_448() -> None:
    """Rows of very different sizes, and one of zeros. Packing rounds the outputs of a weight in the same way."""
    x = randn(6, 300) * torch.tensor([1e-4, 1.0, 0.0, 1e4, 1e-4, 1.0])[:, None]
    numbers, scales = quantise_rows(x)
    assert numbers.dtype == torch.float8_e4m3fn and numbers.shape == x.shape and scales.shape == (6,)
    assert scales[2] == 1
    torch.testing.assert_close(scales[[0, 1, 3]] * 448, x[[0, 1, 3]].abs().amax(1))
    # 3 bits of mantissa: half a unit of the last place is 1/16 of the number or less, down to the smallest normal number.
    smallest = 2**-6 * scales[:, None]
    assert ((round_rows(x) - x).abs() <= torch.maximum(x.abs(), smallest) / 16 * 1.001).all()
    assert torch.equal(round_rows(x[1:2]), round_rows(x)[1:2])


def test_a_row_of_tiny_numbers_gives_no_nan() -> None:
    x = torch.zeros(2, 256)
    x[0, 3], x[1, 200] = 1e-37, 1e-44
    for numbers, scales in (quantise_rows(x), fp8_block.quantise_inputs(x)):
        assert numbers.float().isfinite().all() and scales.isfinite().all()


def projection(outs: int, ins: int, seed: int) -> Parameters:
    return {"weight": randn(outs, ins, seed=seed), "bias": randn(outs, seed=seed + 100)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_near_the_unrounded_one(dtype: torch.dtype) -> None:
    """Several projections with biases. Packing leaves the tensors themselves as they are."""
    projections = [projection(outs, 300, seed) for seed, outs in enumerate((200, 72))]
    projections = [{key: value.to(dtype) for key, value in p.items()} for p in projections]
    copies = [{key: value.clone() for key, value in p.items()} for p in projections]
    layer = pack_weight([[dict(p) for p in projections]], "fp8")
    assert all(torch.equal(p[key], c[key]) for p, c in zip(projections, copies, strict=True) for key in p)
    x = randn(20, 300, seed=7, dtype=dtype)
    exact = torch.cat([x.double() @ p["weight"].double().T + p["bias"].double() for p in projections], 1)
    got = layer.linear(x)
    assert got.dtype == dtype
    assert 0.01 < relative_error(got, exact) < 0.05
    for rows in (slice(0, 1), slice(3, 19)):
        assert torch.equal(layer.linear(x[rows]), got[rows])


def test_a_gated_layer_is_near_the_unrounded_one() -> None:
    gate, up = (projection(72, 300, seed) for seed in (1, 2))
    x = randn(20, 300, seed=7) / 8
    gates, ups = (x @ p["weight"].T + p["bias"] for p in (gate, up))
    layer = pack_weight([[dict(gate), dict(up)]], "fp8", gated=True)
    assert relative_error(layer.linear_silu_mul(x), silu(gates) * ups) < 0.06


@interpreted
def test_the_kernels_round_rows_as_the_reference_does() -> None:
    """Scales, and rounding in the norm. The interpreter loses carries when it rounds numbers, so tests/gpu compares those."""
    from orthrus.kernels.linear import fp8_triton
    from orthrus.kernels.linear.add_rms_norm import add_rms_norm

    x = randn(5, 300)
    x[2] = 0
    assert torch.equal(fp8_triton.quantise_rows(x[:, 4:])[1], quantise_rows(x[:, 4:])[1])
    _, normed = add_rms_norm(x, randn(5, 300, seed=1), randn(300, seed=2), 1e-6, rounded="rows")
    assert isinstance(normed, fp8_triton.RoundedRows)
    assert fp8_triton.quantise_rows(normed)[0] is normed.numbers
    assert type(normed[1:3]) is Tensor, "a part of the rows is not rounded yet"
    alone = fp8_triton.quantise_rows(normed[:])
    for made, later in zip((normed.numbers, normed.scales), alone, strict=True):
        assert torch.equal(made.float(), later.float())


@interpreted
@pytest.mark.parametrize("gated", [False, True])
def test_the_kernel_for_any_rows_multiplies_numbers_and_scales(gated: bool) -> None:
    from orthrus.kernels.linear import fp8_triton
    from orthrus.kernels.linear.fp8 import quantise_layer
    from orthrus.kernels.linear.gpu import TritonWeight
    from orthrus.kernels.linear.reference import DenseWeight

    layer = quantise_layer([[projection(72, 304, 1), projection(72, 304, 2)]], gated)
    kernel = TritonWeight(layer.weights, layer.bias, layer.interleaved, layer.scales)
    x = randn(20, 304, seed=7) / 8
    numbers, scales = fp8_triton.quantise_rows(x)
    assert layer.scales is not None and layer.bias is not None
    weight = layer.weights[0].double() * layer.scales[0].double()[:, None]
    exact = DenseWeight((weight,), layer.bias.double(), gated)
    rows = numbers.double() * scales.double()[:, None]
    got = kernel.linear_silu_mul(x) if gated else kernel.linear(x)
    assert relative_error(got, exact.linear_silu_mul(rows) if gated else exact.linear(rows)) < 1e-5
