"""The FP8 kernels on a GPU at Qwen3-8B's shapes: near their reference, and batch-invariant."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from torch import Tensor

from orthrus.kernels import rounding_triton
from orthrus.kernels.device import has_fp8_mma
from orthrus.kernels.linear import fp8
from orthrus.kernels.linear.gpu import TritonWeight
from orthrus.kernels.linear.reference import DenseWeight
from orthrus.kernels.linear.weight import Parameters, pack_weight
from orthrus.kernels.rounding import Rounding, rounded
from orthrus.kernels.rows.sampling import gumbel_argmax, noise_keys
from tests.gpu.test_kernels import DEVICE, ROWS, error, int32, randn

pytestmark = pytest.mark.skipif(not has_fp8_mma(), reason="this GPU does not multiply FP8")


def views_of(*outs: int, ins: int, views: int = 1, bias: bool = False) -> list[list[Parameters]]:
    def projection(size: int, seed: int) -> Parameters:
        # Outputs and inputs of very different sizes.
        sizes = [torch.rand(n, device=DEVICE).mul_(4).exp2_() for n in (size, ins)]
        weight = {"weight": (randn(size, ins, seed=seed) * torch.outer(*sizes) * ins**-0.5 / 16).bfloat16()}
        return weight | ({"bias": randn(size, seed=seed + 50)} if bias else {})

    return [[projection(size, 10 * view + i) for i, size in enumerate(outs)] for view in range(views)]


def layer_of(
    *outs: int, ins: int, views: int = 1, bias: bool = False, gated: bool = False
) -> tuple[TritonWeight, DenseWeight]:
    """A layer in FP8, and the same rounded weights in float64. Of a gated layer, these are gate and up concatenated."""
    parameters = views_of(*outs, ins=ins, views=views, bias=bias)
    rounded = [torch.cat([fp8.round_rows(p["weight"].double()) for p in view]) for view in parameters]
    biases = [torch.cat([p["bias"] for p in view]) for view in parameters] if bias else None
    layer = pack_weight(parameters, "fp8", gated=gated)
    assert isinstance(layer, TritonWeight)
    assert layer.nbytes == views * sum(outs) * (ins + 4 + (2 if bias else 0))
    return layer, DenseWeight(tuple(rounded), None if biases is None else torch.stack(biases).double())


def rows_of(rows: int, ins: int) -> Tensor:
    # Not a seed of the weights: sums of products with one sign lose several percent, since the tensor cores keep few bits.
    return randn(rows, ins, seed=99) * torch.rand(rows, 1, device=DEVICE).mul_(6).exp2_().bfloat16()


def same(got: Tensor, expected: Tensor) -> bool:
    return torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


def exact_rows(x: Tensor) -> Tensor:
    """The inputs as the kernels multiply them: rounded, in float64."""
    return rounded(x.float(), fp8.UNSCALED).double()


@pytest.mark.parametrize("ins", [4096, 12288, 304])
@pytest.mark.parametrize("rounding", [Rounding(0.25), Rounding(64.0, words=True)])
def test_rows_are_rounded_to_the_numbers_of_the_reference(ins: int, rounding: Rounding) -> None:
    """Some are too large: they become the largest number of e4m3."""
    x = rows_of(70, ins)
    for part in (x, x[:, 16:]):
        assert same(rounding_triton.rounded(part, rounding), rounded(part.float(), rounding))


@pytest.mark.parametrize("rows", [1, 33, 100, 300, 600])
@pytest.mark.parametrize("rounding", [Rounding(0.25), Rounding(64.0, words=True)])
def test_results_are_stored_for_the_next_layer(rows: int, rounding: Rounding) -> None:
    layer, _ = layer_of(4096, ins=4096)
    gated, _ = layer_of(208, 208, ins=4096, gated=True)
    x, residual, norm = rows_of(rows, 4096), randn(rows, 4096, seed=2), randn(4096, seed=3)
    hidden, normed = layer.linear_add_rms_norm(x, residual, norm, 1e-6, rounding=rounding)
    plain = layer.linear_add_rms_norm(x, residual, norm, 1e-6)
    assert torch.equal(hidden, plain[0]) and same(normed, rounded(plain[1].float(), rounding))
    # This kernel does not round to bfloat16 first, so the last place may differ.
    wide, got = gated.linear_silu_mul(x), gated.linear_silu_mul(x, rounding=rounding)
    torch.testing.assert_close(got.float(), rounded(wide.float(), rounding).float(), rtol=0.13, atol=2**-8)


@pytest.mark.parametrize("rounding", [Rounding(0.25), Rounding(64.0, words=True)])
@pytest.mark.parametrize("sequences", [1, 20])
def test_attention_is_stored_for_the_next_layer(rounding: Rounding, sequences: int) -> None:
    """One sequence is divided among programs, and of 20 some are not."""
    from orthrus.kernels.attention import paged_attention
    from orthrus.kernels.bench import AttentionCase

    case = AttentionCase(sequences, 8, 1000, diffusion=True)
    plain, got = (paged_attention(case.qkv, *case.cache, case.plans[0], 0.1, how) for how in (None, rounding))
    torch.testing.assert_close(got.float(), rounded(plain.float(), rounding).float(), rtol=0.13, atol=2**-8)


@pytest.mark.parametrize(
    ("outs", "ins", "views", "bias"),
    [
        ((4096, 1024, 1024), 4096, 1, False),
        ((4096, 1024), 4096, 2, True),
        ((152_000,), 1024, 1, False),
        ((200, 72), 304, 1, True),
    ],
)
def test_linear_is_near_the_reference_and_batch_invariant(
    outs: tuple[int, ...], ins: int, views: int, bias: bool
) -> None:
    layer, exact = layer_of(*outs, ins=ins, views=views, bias=bias)
    x, num_ar = rows_of(1024, ins), int32(700)
    full = layer.linear(x, num_ar)
    for start in (0, 650, 924):
        part = slice(start, start + 100)
        split = int32(max(0, 700 - start))
        assert error(full[part], exact.linear(exact_rows(x[part]), split)) < 1e-2
    for rows in ROWS:
        for start in (0, 690, 1024 - rows):
            if start + rows > 1024:
                continue
            got = layer.linear(x[start : start + rows], int32(max(0, min(rows, 700 - start))))
            assert torch.equal(got, full[start : start + rows]), (rows, start)


@pytest.mark.parametrize("width", [12288, 200])
def test_gated_linear_is_near_the_reference_and_batch_invariant(width: int) -> None:
    layer, exact = layer_of(width, width, ins=4096, gated=True)
    x = randn(600, 4096, seed=99)
    full = layer.linear_silu_mul(x)
    assert error(full[:100], exact.linear_silu_mul(exact_rows(x[:100]))) < 1e-2
    for rows in ROWS:
        for start in (0, 600 - rows):
            assert torch.equal(layer.linear_silu_mul(x[start : start + rows]), full[start : start + rows])


@pytest.mark.parametrize(("outs", "ins"), [(4096, 4096), (4096, 12288)])
def test_residual_linear_is_near_the_reference_and_batch_invariant(outs: int, ins: int) -> None:
    layer, exact = layer_of(outs, ins=ins)
    x, residual, norm = rows_of(600, ins), randn(600, outs, seed=2), randn(outs, seed=3)
    full = layer.linear_add_rms_norm(x, residual, norm, 1e-6)
    exact_full = exact.linear_add_rms_norm(exact_rows(x[:100]), residual[:100].double(), norm.double(), 1e-6)
    for ours, other in zip(full, exact_full, strict=True):
        assert error(ours[:100], other) < 1e-2
    for rows in ROWS:
        for start in (0, 600 - rows):
            part = slice(start, start + rows)
            got = layer.linear_add_rms_norm(x[part], residual[part], norm, 1e-6)
            assert torch.equal(got[0], full[0][part]), (rows, start)
            assert torch.equal(got[1], full[1][part]), (rows, start)


@pytest.mark.parametrize("rows", [1, 33, 64, 100])
def test_picks_from_a_layer_are_those_from_its_outputs(rows: int) -> None:
    layer, _ = layer_of(20_010, ins=1024)
    x = randn(rows, 1024, seed=1)
    logits = layer.linear(x, out=torch.empty(rows, 20_010, device=DEVICE))
    temperatures = torch.arange(rows, device=DEVICE) % 3 * 0.7
    for seed in range(5):
        keys = torch.from_numpy(noise_keys([seed] * rows, range(rows))).to(DEVICE)
        expected, got = (torch.zeros(rows + 2, device=DEVICE, dtype=torch.int32) for _ in range(2))
        gumbel_argmax(logits, temperatures, keys, expected, int32(2))
        out = torch.zeros_like(logits)
        layer.linear_gumbel_argmax(x, out, int32(1), temperatures, keys, got, int32(2))
        assert torch.equal(got, expected) and torch.equal(out, logits), seed
