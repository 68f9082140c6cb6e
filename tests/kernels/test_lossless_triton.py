"""The Triton kernels of weights in 12 bits, in the interpreter: they give the bits of the same weights in bfloat16."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from orthrus.kernels import rounding_triton
from orthrus.kernels.leaves import Leaves
from orthrus.kernels.linear import triton
from orthrus.kernels.linear.gpu import TritonWeight
from orthrus.kernels.linear.lossless import PLANE_SCALE, first_plane, high_bytes, pack_lossless
from orthrus.kernels.linear.lossless_gpu import LosslessWeight
from orthrus.kernels.linear.lossless_triton import widen_layer
from orthrus.kernels.linear.reference import DenseWeight
from orthrus.kernels.linear.types import DenseLayer, LinearTiles
from orthrus.kernels.rounding import Rounding, rounded
from tests.kernels.interpreted import assert_near, int32, interpreted, randn

pytestmark = interpreted

TILES = LinearTiles(64, 16, 128, warps=4, stages=2)


def layer_of(outs: int, ins: int, views: int = 1, gated: bool = False, exceptions: int = 0) -> DenseLayer:
    """A layer of bfloat16 weights. In its first tile, `exceptions` of them are far from the others."""
    weights = (randn(views, outs, ins, seed=3) * 0.02).bfloat16()
    for number in range(exceptions):
        weights[0, number * 2 % 64, number * 37 % 128] = [3e-9, -700.0, 0.0, -0.0][number % 4]
    return DenseLayer(weights.unbind(), randn(views, outs, seed=5), gated)


def _bias(layer: DenseLayer) -> Tensor:
    assert layer.bias is not None
    return layer.bias.double()


def run(layer: DenseLayer, x: Tensor, parts: int = 1, num_ar: Tensor | None = None) -> list[Tensor]:
    """The kernel's results for the layer with weights in the dtype of x, and with weights in 12 bits."""
    full = DenseLayer(
        torch.stack([w.to(x.dtype) for w in layer.weights]).unbind(), layer.bias, layer.interleaved
    )
    results = []
    for given in (full, pack_lossless(layer)):
        shape = (
            (parts, x.shape[0], layer.outs) if parts > 1 else (x.shape[0], layer.outs >> layer.interleaved)
        )
        out = torch.empty(shape, dtype=torch.float32)
        inputs = Leaves.whole(x.shape[1], 128, 2 * parts)
        triton.launch(x, given, out, num_ar, parts, TILES, inputs=inputs)
        results.append(out)
    return results


@pytest.mark.parametrize("exceptions", [0, 1, 2, 3, 8, 9, 31])
def test_a_packed_layer_has_the_bits_of_the_unpacked_layer(exceptions: int) -> None:
    layer = layer_of(192, 640, exceptions=exceptions)
    full, packed = run(layer, randn(20, 640, seed=2))
    assert int(pack_lossless(layer).exceptions[0, 0, 0]) >= exceptions
    assert torch.equal(packed, full)
    exact = randn(20, 640, seed=2).double() @ layer.weights[0].double().T + _bias(layer)
    assert float((packed - exact).norm() / exact.norm()) < 1e-6


def test_gated_layers_two_views_and_split_k_have_the_same_bits() -> None:
    x = randn(20, 512, seed=2)
    for layer, parts in ((layer_of(128, 512, 1, True, 5), 1), (layer_of(64, 512, 2, False, 5), 1)):
        full, packed = run(layer, x, parts, int32(7))
        assert torch.equal(packed, full)
    full, packed = run(layer_of(64, 512, 1, False, 5), x, 2)
    assert full.shape == (2, 20, 64) and torch.equal(packed, full)


def test_widening_a_packed_layer_gives_its_weights() -> None:
    layer = layer_of(128, 384, views=2, exceptions=9)
    layer.weights[1][3, 7] = 2.0**-128  # A subnormal number.
    for found, weight in zip(widen_layer(pack_lossless(layer)).weights, layer.weights, strict=True):
        assert torch.equal(found.view(torch.int16), weight.view(torch.int16))


@pytest.mark.parametrize("rows", [1, 20, 60])
def test_operations_match_the_reference(rows: int) -> None:
    x, residual = randn(rows, 512, seed=2) / 8, randn(rows, 64, seed=4)
    layer = layer_of(64, 512, views=2, exceptions=5)
    packed = pack_lossless(layer)
    ours = LosslessWeight(packed.high, packed.low, packed.exceptions, packed.scales, packed.bias)
    assert ours.nbytes == packed.tensor_bytes
    theirs = DenseWeight(tuple(w.double() for w in layer.weights), _bias(layer))
    num_ar = int32(rows // 2)
    assert_near(ours.linear(x, num_ar), theirs.linear(x.double(), num_ar))
    norm = randn(64, seed=6)
    got = ours.linear_add_rms_norm(x, residual, norm, 1e-6, num_ar)
    exact = theirs.linear_add_rms_norm(x.double(), residual.double(), norm.double(), 1e-6, num_ar)
    for found, expected in zip(got, exact, strict=True):
        assert_near(found, expected)


def test_the_first_plane_multiplies_rows_in_the_order_of_its_words() -> None:
    x, layer = randn(20, 384, seed=2), layer_of(128, 384, exceptions=3)
    packed = pack_lossless(layer)
    rounding = Rounding(8.0, words=True)
    numbers = rounding_triton.rounded(x, rounding)
    assert torch.equal(
        high_bytes(numbers.view(torch.int32)), rounding_triton.rounded(x, Rounding(8.0)).view(torch.uint8)
    )
    assert torch.equal(
        high_bytes(rounded(x, rounding).view(torch.int32)), rounded(x, Rounding(8.0)).view(torch.uint8)
    )
    weights, scales = packed.high.view(torch.float8_e4m3fn), packed.scales * PLANE_SCALE / 8.0
    plane = TritonWeight(
        (weights,), packed.bias, False, scales, rounding=rounding, result_dtype=torch.float32
    )
    in_order = high_bytes(numbers.view(torch.int32)).view(torch.float8_e4m3fn).double() / 8.0
    exact = in_order @ first_plane(packed)[0].double().T + _bias(layer)
    assert_near(plane.linear(x, tiles=LinearTiles(64, 16, 128)), exact)
