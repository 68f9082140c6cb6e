"""Weight formats: one class, which is registered under a name, is a format that a whole model can run in."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from orthrus.cache.kv_cache import KVCache
from orthrus.kernels.linear import (
    OneViewWeight,
    Parameters,
    SplitViews,
    Weight,
    join_projections,
    pack_weight,
    weight_format,
)
from orthrus.kernels.linear.half import HalfWeight
from orthrus.kernels.linear.onednn import OneDnnWeight
from orthrus.kernels.linear.plain import interleave
from orthrus.kernels.linear.reference import DenseWeight, product
from orthrus.models.checkpoint import load_weights
from orthrus.models.families import load_config
from orthrus.models.forward import LayerParallelForward
from orthrus.plan import PassPlan, RowGroup, View

CPU = torch.device("cpu")


@weight_format("negated")
class NegatedWeight(OneViewWeight):
    """A weight that is stored with the opposite sign. Negating the result gives the same bits."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.bias = bias
        self._negated = -weight

    @classmethod
    def pack_view(cls, projections: Sequence[Parameters]) -> Self:
        return cls(*join_projections(projections))

    @property
    def nbytes(self) -> int:
        return self._negated.nbytes

    def product(self, x: Tensor) -> Tensor:
        return product(x, self._negated).neg_()


def logits(checkpoint: Path, weight_format: str) -> Tensor:
    """Logits of a pass of AR rows and a diffusion block, in float64, where "plain" multiplies by the weights as they are."""
    config = load_config(checkpoint)
    weights = load_weights(checkpoint, config, device=CPU, dtype=torch.float64)
    forward = LayerParallelForward(config, weights, weight_format)
    assert not [name for name in weights if "proj" in name], "packing takes the tensors out of the dictionary"
    forward.use_context(64)
    cache = KVCache.allocate(config, 4, 16, CPU, torch.float64)
    groups = [
        RowGroup(View.AR, [5, 6, 7], 0, [1], 0, 3),
        RowGroup(View.DIFFUSION, [8, *[config.mask_token_id or 0] * 3], 0, [2], 0, 4),
    ]
    plan = PassPlan.build(groups, page_size=16, heads_per_kv=forward.heads_per_kv, device=CPU)
    return forward.logits(forward.hidden_states(plan, cache, torch.zeros(1, dtype=torch.int32)))


def test_a_format_is_one_class_and_one_registration(tiny_orthrus: Path) -> None:
    expected = logits(tiny_orthrus, "plain")
    assert expected.std() > 0.01
    assert torch.equal(logits(tiny_orthrus, "negated"), expected)


def test_an_unknown_format_is_refused_and_known_ones_are_listed() -> None:
    with pytest.raises(ValueError, match=r"no weight format 'int3'; choose one of .*plain"):
        pack_weight([[{"weight": torch.eye(8)}]], "int3")


def views_of(*weights: Tensor) -> list[list[Parameters]]:
    return [[{"weight": weight}] for weight in weights]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_each_view_has_its_own_layout_and_nbytes() -> None:
    """float16 holds the AR view's weight exactly, but not the diffusion view's."""
    halves, others = torch.eye(64), torch.full((64, 64), 1 / 3)
    x, num_ar = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)), torch.tensor([2])
    both = pack_weight(views_of(halves, others))
    one, other = pack_weight(views_of(halves)), pack_weight(views_of(others))
    assert isinstance(both, SplitViews) and isinstance(one, HalfWeight) and isinstance(other, OneDnnWeight)
    assert (one.nbytes, other.nbytes, both.nbytes) == (64 * 64 * 2, 64 * 64 * 4, 64 * 64 * 6)
    assert torch.equal(both.linear(x, num_ar), torch.cat([one.linear(x[:2]), other.linear(x[2:])]))
    with pytest.raises(ValueError, match="needs num_ar"):
        both.linear(x)


def test_half_weights_refuse_what_float16_does_not_hold() -> None:
    with pytest.raises(ValueError, match="float16 does not hold this weight exactly"):
        HalfWeight.pack_view([{"weight": torch.full((8, 8), 1 / 3)}])


@pytest.mark.parametrize("format", ["plain", "negated"])
def test_projections_and_biases_are_concatenated_in_every_view(format: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def projection(outs: int) -> Parameters:
        weight, bias = (torch.randn(*shape, generator=generator) for shape in ((outs, 16), (outs,)))
        return {"weight": weight, "bias": bias}

    views = [[projection(outs) for outs in (8, 24)] for _ in range(2)]
    x = torch.randn(5, 16, generator=generator)
    parts = [
        torch.cat([x[rows] @ p["weight"].T + p["bias"] for p in view], 1)
        for view, rows in zip(views, (slice(0, 3), slice(3, 5)), strict=True)
    ]
    layer: Weight = pack_weight(views, format)
    assert not any(parameters for view in views for parameters in view)
    torch.testing.assert_close(layer.linear(x, torch.tensor([3])), torch.cat(parts))


def test_gate_and_up_alternate_with_their_biases() -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up = (
        {
            "weight": torch.randn(24, 16, generator=generator, dtype=torch.float64),
            "bias": torch.randn(24, generator=generator, dtype=torch.float64),
        }
        for _ in range(2)
    )
    x = torch.randn(5, 16, generator=generator, dtype=torch.float64)
    gates, ups = (x @ p["weight"].T + p["bias"] for p in (gate, up))
    layer = interleave([gate, up])
    assert not gate and not up
    assert layer.bias is not None and layer.bias.shape == (1, 48)
    got = DenseWeight(layer.weights, layer.bias, layer.interleaved).linear_silu_mul(x)
    torch.testing.assert_close(got, silu(gates) * ups)


def test_tensors_that_a_format_does_not_use_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'plain' does not use weight_scale"):
        pack_weight([[{"weight": torch.eye(8), "weight_scale": torch.ones(8)}]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("format", ["plain", "negated", "fp8"])
def test_a_bias_on_only_some_projections_is_refused(format: str, dtype: torch.dtype) -> None:
    with_bias = {"weight": torch.eye(8, dtype=dtype), "bias": torch.ones(8, dtype=dtype)}
    with pytest.raises(ValueError, match=r"1 of 2 projections of a layer have a bias"):
        pack_weight([[with_bias, {"weight": torch.eye(8, dtype=dtype)}]], format)


def test_a_bias_on_only_one_view_is_refused() -> None:
    views: list[list[Parameters]] = [
        [{"weight": torch.eye(8).double(), "bias": torch.ones(8).double()}],
        [{"weight": torch.eye(8).double()}],
    ]
    with pytest.raises(ValueError, match="one view of a layer has biases and the other has none"):
        pack_weight(views)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("format", ["plain", "negated", "fp8"])
def test_every_operation_gives_each_view_its_weight(format: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, *weights = (torch.randn(n, 16, generator=generator).to(dtype) for n in (5, 16, 16))
    both, num_ar = pack_weight(views_of(*[w.clone() for w in weights]), format), torch.tensor([2])
    ar, diffusion = (pack_weight(views_of(w.clone()), format) for w in weights)
    gated = torch.cat([ar.linear_silu_mul(x[:2]), diffusion.linear_silu_mul(x[2:])])
    assert torch.equal(both.linear_silu_mul(x, num_ar), gated)
    logits, wanted = torch.empty(5, 16, dtype=dtype), torch.ones(1, dtype=torch.int32)
    picks, none = torch.zeros(5, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    both.linear_gumbel_argmax(
        x, logits, wanted, torch.zeros(5), torch.zeros(5, 2, dtype=torch.int32), picks, none, num_ar
    )
    expected = torch.cat([ar.linear(x[:2]), diffusion.linear(x[2:])])
    assert torch.equal(logits, expected)
    assert picks.tolist() == expected.argmax(1).tolist()
