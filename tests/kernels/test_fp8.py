"""The FP8 format: its rounding, how near a layer is to the unrounded one, and batch invariance."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from orthrus.kernels.linear import Parameters, fp8_block, pack_weight
from orthrus.kernels.linear.fp8 import quantise_rows, round_rows
from orthrus.kernels.rounding import Rounding, rounded
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


@pytest.mark.parametrize("factor", [1.0, 64.0])
def test_a_layer_takes_rows_that_are_stored_for_it(factor: float) -> None:
    layer = pack_weight([[projection(72, 304, 1)]], "fp8").with_factor(factor)
    assert layer.rounding == Rounding(factor)
    x = randn(20, 304, seed=7)
    stored = rounded(x, layer.rounding)
    assert stored.dtype == torch.float8_e4m3fn
    assert torch.equal(layer.linear(stored), layer.linear(x))
    # The factor brings rows of tiny numbers into the range of e4m3, and layers give back their size.
    exact = x.double() @ projection(72, 304, 1)["weight"].double().T
    small = layer.linear(x * 2**-10) - projection(72, 304, 1)["bias"]
    assert relative_error(small * 2**10, exact) < (0.05 if factor == 64.0 else 1.0)


def test_operations_store_their_results_for_the_next_layer() -> None:
    rounding = Rounding(4.0)
    gated = pack_weight([[projection(72, 304, 1), projection(72, 304, 2)]], gated=True)
    x, residual, norm = randn(20, 304, seed=7) / 8, randn(20, 72, seed=8), randn(72, seed=9)
    assert torch.equal(
        gated.linear_silu_mul(x, rounding=rounding).float(),
        rounded(gated.linear_silu_mul(x), rounding).float(),
    )
    layer = pack_weight([[projection(72, 304, 3)]])
    hidden, normed = layer.linear_add_rms_norm(x, residual, norm, 1e-6, rounding=rounding)
    same, plain = layer.linear_add_rms_norm(x, residual, norm, 1e-6)
    assert torch.equal(hidden, same) and torch.equal(normed.float(), rounded(plain, rounding).float())


def test_too_large_numbers_become_the_largest() -> None:
    x = torch.tensor([[1e6, -1e6, 500.0, 1.0]])
    assert rounded(x, Rounding(1.0)).tolist() == [[448.0, -448.0, 448.0, 1.0]]
    assert rounded(x, None) is x and rounded(x, Rounding(None)) is x


@interpreted
def test_the_kernels_round_rows_as_the_reference_does() -> None:
    """tests/gpu compares numbers to the bit."""
    from orthrus.kernels import rounding_triton
    from orthrus.kernels.linear.add_rms_norm import add_rms_norm

    x, residual, norm = randn(5, 304), randn(5, 304, seed=1), randn(304, seed=2)
    for rounding in (Rounding(16.0), Rounding(16.0, words=True)):
        assert near(rounding_triton.rounded(x[:, 16:], rounding), rounded(x[:, 16:], rounding))
        _, normed = add_rms_norm(x, residual, norm, 1e-6, rounding=rounding)
        assert near(normed, rounded(add_rms_norm(x, residual, norm, 1e-6)[1], rounding))


def near(got: Tensor, expected: Tensor) -> bool:
    """Whether e4m3 numbers differ by one unit of the last place at most, but for the few whose carry the interpreter loses."""
    assert got.dtype == expected.dtype == torch.float8_e4m3fn
    return bool(torch.isclose(got.float(), expected.float(), rtol=0.13, atol=2**-9).float().mean() > 0.95)


@interpreted
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("words", [False, True])
def test_the_kernel_for_any_rows_multiplies_numbers_and_scales(gated: bool, words: bool) -> None:
    from orthrus.kernels import rounding_triton
    from orthrus.kernels.linear.fp8 import quantise_layer
    from orthrus.kernels.linear.gpu import TritonWeight
    from orthrus.kernels.linear.reference import DenseWeight

    layer = quantise_layer([[projection(80, 304, 1), projection(80, 304, 2)]], gated)
    rounding = Rounding(1.0)
    kernel = TritonWeight(
        layer.weights,
        layer.bias,
        layer.interleaved,
        layer.scales,
        rounding=rounding,
        result_dtype=torch.float32,
    ).with_factor(32.0)
    assert kernel.rounding == Rounding(32.0)
    x = randn(20, 304, seed=7) / 8
    numbers = rounding_triton.rounded(x, kernel.rounding)
    assert layer.scales is not None and layer.bias is not None
    weight = layer.weights[0].double() * layer.scales[0].double()[:, None]
    exact = DenseWeight((weight,), layer.bias.double(), gated)
    rows = numbers.double() / 32.0
    expected = exact.linear_silu_mul(rows) if gated else exact.linear(rows)
    got = kernel.linear_silu_mul(x) if gated else kernel.linear(x)
    assert relative_error(got, expected) < 1e-5
    assert torch.equal(kernel.linear_silu_mul(numbers) if gated else kernel.linear(numbers), got)
    if gated:
        stored = Rounding(4.0, words)
        assert near(kernel.linear_silu_mul(x, rounding=stored), rounded(got, stored))


@interpreted
def test_a_layer_in_full_stores_its_results_for_a_layer_in_fp8() -> None:
    """As where one layer of drafts can't be packed, and the next one is."""
    from orthrus.kernels.linear.gpu import TritonWeight
    from orthrus.kernels.linear.plain import interleave

    layer = interleave([projection(80, 304, 1), projection(80, 304, 2)])
    kernel = TritonWeight(layer.weights, layer.bias, layer.interleaved)
    x, rounding = randn(20, 304, seed=7) / 8, Rounding(4.0, words=True)
    assert near(kernel.linear_silu_mul(x, rounding=rounding), rounded(kernel.linear_silu_mul(x), rounding))


@interpreted
@pytest.mark.parametrize("dim", [16, 24])
@pytest.mark.parametrize("words", [False, True])
def test_attention_stores_its_results_for_the_next_layer(words: bool, dim: int) -> None:
    """Of a divided row, whose parts are merged, and of a row that is not divided.

    The order of words does not fit into heads of 24 numbers. Then the next layer rounds its inputs itself.
    """
    from orthrus.kernels.attention import AttentionGroup, AttentionPlan, AttentionWork
    from orthrus.kernels.attention import gpu as attention
    from orthrus.kernels.attention.work_list import plan_work

    groups = (AttentionGroup(0, 1, 300, [1, 2, 3, 4, 5], False), AttentionGroup(1, 2, 20, [6], False))
    qkv, keys, values = randn(3, 6, dim), randn(2, 7, 64, dim, seed=1), randn(2, 7, 64, dim, seed=2)
    numbers = plan_work(groups, tile_rows=8, shared=False, programs=4, capacity=64)
    plan = AttentionPlan(groups, 64, 1, qkv.device, AttentionWork(torch.from_numpy(numbers), 64))
    plain = attention.paged_attention(qkv, keys, values, plan, 0.25)
    rounding = Rounding(8.0, words)
    found = attention.paged_attention(qkv, keys, values, plan, 0.25, rounding)
    if words and dim == 24:
        assert torch.equal(found, plain)
    else:
        assert near(found, rounded(plain, rounding))
