"""The Triton kernels of the linear layers in the interpreter: near float64, and batch-invariant."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from orthrus.kernels.linear.gpu import TritonWeight
from orthrus.kernels.linear.reference import DenseWeight
from orthrus.kernels.linear.tiles import num_parts
from orthrus.kernels.linear.types import LinearTiles
from tests.kernels.interpreted import DTYPES, assert_near, int32, interpreted, keys_of, randn

pytestmark = interpreted


def layer_of(
    outs: int, ins: int, views: int = 1, bias: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[TritonWeight, DenseWeight]:
    """A layer in dtype, whose views are contiguous in memory, and the same numbers in float64."""
    weights = torch.stack([randn(outs, ins, seed=100 + v, dtype=dtype) for v in range(views)])
    offsets = randn(views, outs, seed=200, dtype=dtype) if bias else None
    exact = DenseWeight(weights.double().unbind(), None if offsets is None else offsets.double())
    return TritonWeight(weights.unbind(), offsets), exact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outs", "ins", "bias"), [(72, 296, True), (200, 136, False)])
def test_linear_is_the_product(outs: int, ins: int, bias: bool, dtype: torch.dtype) -> None:
    """Sizes that no tile divides, a bias, and more row tiles than a band has."""
    layer, exact = layer_of(outs, ins, bias=bias, dtype=dtype)
    x = randn(260, ins, seed=2, dtype=dtype)
    expected = exact.linear(x.double())
    tiles = LinearTiles(64, 16, 128, stages=2)
    full = layer.linear(x, tiles=tiles)
    assert_near(full, expected)
    assert_near(layer.linear(x, tiles=LinearTiles(128, 32, 64)), expected)
    wide = torch.empty(260, outs)
    assert layer.linear(x, out=wide) is wide
    assert_near(wide, expected.float())
    for rows in (slice(0, 1), slice(3, 4), slice(3, 19)):
        assert torch.equal(layer.linear(x[rows], tiles=tiles), full[rows])


@pytest.mark.parametrize("num_ar", [0, 1, 16, 19, 40])
def test_rows_below_num_ar_use_the_first_view(num_ar: int) -> None:
    layer, exact = layer_of(136, 96, views=2, bias=True)
    x = randn(40, 96, seed=2)
    got = layer.linear(x, int32(num_ar), tiles=LinearTiles(64, 16, 32))
    assert_near(got, exact.linear(x.double(), int32(num_ar)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_silu_mul_matches_its_reference(dtype: torch.dtype) -> None:
    layer, exact = (replace(layer, interleaved=True) for layer in layer_of(2 * 72, 200, dtype=dtype))
    x = randn(20, 200, seed=2, dtype=dtype) / 8
    got = layer.linear_silu_mul(x)
    assert_near(got, exact.linear_silu_mul(x.double()))
    gate, up = (exact.weights[0].unflatten(0, (-1, 2, 8))[:, i].flatten(0, 1) for i in (0, 1))
    plain = DenseWeight((torch.cat([gate, up]),)).linear_silu_mul(x.double())
    assert_near(got, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("ins", "leaves", "views", "bias"), [(1064, 2, 2, True), (2048, 4, 1, False), (96, 1, 2, True)]
)
def test_linear_add_rms_norm_has_one_tree(
    ins: int, leaves: int, views: int, bias: bool, dtype: torch.dtype
) -> None:
    """The bits are the same if programs share the leaves, and if one program sums them all."""
    layer, exact = layer_of(72, ins, views, bias, dtype)
    x, residual, norm = (randn(*s, seed=i, dtype=dtype) for i, s in enumerate([(20, ins), (20, 72), (72,)]))
    num_ar = int32(7)
    expected = exact.linear_add_rms_norm(x.double(), residual.double(), norm.double(), 1e-6, num_ar)

    def run(split: bool, rows: slice = slice(0, 20)) -> tuple[torch.Tensor, torch.Tensor]:
        return layer.linear_add_rms_norm(
            x[rows], residual[rows], norm, 1e-6, num_ar, tiles=LinearTiles(64, 16, 128, split), leaves=leaves
        )  # fmt: skip

    split = run(True)
    for got, other, walked, few in zip(split, expected, run(False), run(True, slice(0, 9)), strict=True):
        assert_near(got, other)
        assert torch.equal(walked, got)
        assert torch.equal(few, got[:9])


def test_parts_fill_the_gpu() -> None:
    shapes = [(4096, 4096), (4096, 12288), (1024, 2048), (5120, 25600), (8192, 29568)]
    assert [num_parts(*shape) for shape in shapes] == [2, 2, 2, 2, 1]
    assert [num_parts(2560, ins, unit=256) for ins in (9728, 9728 + 256, 10240)] == [2, 1, 4]


def test_linear_refuses_rows_that_tma_cannot_load() -> None:
    with pytest.raises(ValueError, match="50 inputs"):
        layer_of(8, 50)[0].linear(randn(4, 50))


def test_picks_from_a_layer_are_those_from_its_outputs() -> None:
    weight, x = randn(700, 48) * 2, randn(3, 48, seed=1)
    temperatures, keys = torch.tensor([0.0, 0.7, 1.3]), keys_of([1, 2, 3], [5, 6, 7])
    results = []
    for layer in (TritonWeight((weight,)), DenseWeight((weight,))):
        logits, picks = torch.zeros(3, 700), torch.zeros(5, dtype=torch.int32)
        layer.linear_gumbel_argmax(x, logits, int32(1), temperatures, keys, picks, int32(2))
        results.append((logits, picks))
    assert torch.equal(results[0][1], results[1][1])
    assert_near(results[0][0], results[1][0])
    assert results[1][1][2] == (x[0] @ weight.T).argmax()
