"""Weights in 12 bits on a GPU: the same bits as with the weights in bfloat16, for any number of rows."""

import pytest
import torch
from torch import Tensor

from orthrus.kernels.linear import Weight, pack_weight

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPES = [(1024, 4096), (4096, 12288)]
ROWS = [(1, 7, 16), (17, 33), (64, 65, 100), (200, 512, 513, 700)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def weights_of(outs: int, ins: int, views: int) -> Tensor:
    """Weights as a trained layer has them, and some that are far from the others."""
    weights = (randn(views, outs, ins, seed=3) * 0.02).bfloat16()
    for number in range(20):
        weights[0, number * 2 % 64, number * 37 % 128] = [3e-9, -700.0, 0.0, -0.0, 2.0**-128][number % 5]
    return weights


@pytest.mark.parametrize("counts", ROWS)
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize(("outs", "ins"), SHAPES)
def test_every_operation_has_the_bits_of_bfloat16_weights(
    outs: int, ins: int, views: int, counts: tuple[int, ...]
) -> None:
    weights, bias = weights_of(outs, ins, views), randn(views, outs, seed=5).bfloat16()

    def pack(format: str, gated: bool = False) -> Weight:
        if gated:
            halves = weights[0].chunk(2)
            return pack_weight([[{"weight": half.clone()} for half in halves]], format, gated=True)
        given = [[{"weight": w.clone(), "bias": b}] for w, b in zip(weights, bias, strict=True)]
        return pack_weight(given, format)

    full, packed = pack("plain"), pack("lossless12")
    assert packed.nbytes < 0.77 * full.nbytes
    gated = [pack(format, gated=True) for format in ("plain", "lossless12")]
    norm = randn(outs, seed=6).bfloat16()
    for rows in counts:
        x, residual = randn(rows, ins, seed=rows).bfloat16(), randn(rows, outs, seed=rows + 1).bfloat16()
        num_ar = torch.tensor([rows // 3], dtype=torch.int32, device="cuda")
        results = [
            (weight.linear(x, num_ar), *weight.linear_add_rms_norm(x, residual, norm, 1e-6, num_ar))
            for weight in (full, packed)
        ]
        for number, (expected, found) in enumerate(zip(*results, strict=True)):
            assert torch.equal(found, expected), (rows, number)
        one, other = (weight.linear_silu_mul(x) for weight in gated)
        assert torch.equal(one, other), rows


def test_a_layer_written_out_in_bfloat16_has_every_bit() -> None:
    from orthrus.kernels.linear.lossless import pack_lossless, unpack_lossless
    from orthrus.kernels.linear.lossless_triton import widen_layer
    from orthrus.kernels.linear.types import DenseLayer

    weights = weights_of(1024, 4096, 2)
    packed = pack_lossless(DenseLayer(weights.unbind()))
    for layer in (widen_layer(packed), unpack_lossless(packed)):
        for found, weight in zip(layer.weights, weights, strict=True):
            assert torch.equal(found.view(torch.int16), weight.view(torch.int16))
