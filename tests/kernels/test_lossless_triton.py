"""The kernel of weights in 12 bits in Triton's interpreter: the bits of the kernel of the same weights in full."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from orthrus.kernels.leaves import Leaves
from orthrus.kernels.linear import triton
from orthrus.kernels.linear.lossless import pack_lossless
from orthrus.kernels.linear.types import DenseLayer, LinearTiles
from tests.kernels.interpreted import int32, interpreted, randn

pytestmark = interpreted

TILES = LinearTiles(64, 16, 128, warps=4, stages=2)


def layer_of(outs: int, ins: int, views: int = 1, gated: bool = False, exceptions: int = 0) -> DenseLayer:
    """A layer of bfloat16 weights; in its first tile so many of them are far from the others."""
    weights = (randn(views, outs, ins, seed=3) * 0.02).bfloat16()
    for number in range(exceptions):
        weights[0, number * 2 % 64, number * 37 % 128] = [3e-9, -700.0, 0.0, -0.0][number % 4]
    return DenseLayer(weights.unbind(), randn(views, outs, seed=5), gated)


def run(layer: DenseLayer, x: Tensor, parts: int = 1, num_ar: Tensor | None = None) -> list[Tensor]:
    """What the kernel gives for the layer in full and in 12 bits, in the dtype of x."""
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
def test_a_layer_has_the_bits_of_its_weights_in_full(exceptions: int) -> None:
    layer = layer_of(192, 640, exceptions=exceptions)
    full, packed = run(layer, randn(20, 640, seed=2))
    assert int(pack_lossless(layer).exceptions[0, 0, 0]) >= exceptions
    assert torch.equal(packed, full)
    exact = randn(20, 640, seed=2).double() @ layer.weights[0].double().T + layer.bias.double()
    assert float((packed - exact).norm() / exact.norm()) < 1e-6


def test_gated_layers_layers_of_two_views_and_parts_of_a_tree() -> None:
    x = randn(20, 512, seed=2)
    for layer, parts in ((layer_of(128, 512, 1, True, 5), 1), (layer_of(64, 512, 2, False, 5), 1)):
        full, packed = run(layer, x, parts, int32(7))
        assert torch.equal(packed, full)
    full, packed = run(layer_of(64, 512, 1, False, 5), x, 2)
    assert full.shape == (2, 20, 64) and torch.equal(packed, full)
