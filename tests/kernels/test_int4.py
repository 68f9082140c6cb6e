"""The format "int4": what it rounds to, what it keeps in FP8, and parts of a sum."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from orthrus.kernels.int4_sizes import GROUP, INT4_BYTES
from orthrus.kernels.leaves import Leaves
from orthrus.kernels.linear import Parameters, Split, dense, pack_weight
from orthrus.kernels.linear.gptq import quantise_gptq
from orthrus.kernels.linear.integers import round_to_integers
from orthrus.kernels.ranks import ONE_RANK
from tests.kernels.interpreted import assert_near, interpreted, randn

pack = partial(pack_weight, format="int4")


def projection(outs: int, ins: int, seed: int = 0) -> Parameters:
    return {"weight": randn(outs, ins, seed=seed) * 0.1, "bias": randn(outs, seed=seed + 100)}


def by_gptq(x: Tensor, projections: list[Parameters]) -> Tensor:
    """The layer with the weights that a GPTQ checkpoint would hold, in float64."""
    weights = [dense(quantise_gptq(p["weight"], 4, GROUP))["weight"].double() for p in projections]
    return torch.cat(
        [x.double() @ w.T + p["bias"].double() for w, p in zip(weights, projections, strict=True)], 1
    )


@pytest.mark.parametrize(
    "split", [None, Split(ONE_RANK, Leaves.whole(384, 128, 2))], ids=["whole", "in leaves"]
)
def test_a_layer_multiplies_what_gptq_would_store(split: Split | None) -> None:
    """It has more outputs than are rounded at once."""
    one, x = projection(1080, 384), randn(5, 384, seed=7)
    layer = pack([[dict(one)]], split=split)
    assert_near(layer.linear(x), by_gptq(x, [one]))


def test_gate_and_up_meet_after_rounding() -> None:
    both, x = [projection(72, 256, seed) for seed in (1, 2)], randn(5, 256, seed=7)
    gate, up = by_gptq(x, both).chunk(2, 1)
    assert_near(pack([[dict(p) for p in both]], gated=True).linear_silu_mul(x), silu(gate) * up)


def test_a_head_is_kept_in_fp8() -> None:
    one, x = projection(300, 200), randn(5, 200, seed=7)
    for split in (None, Split(ONE_RANK)):
        fp8 = pack_weight([[dict(one)]], "fp8", head=True, split=split)
        assert torch.equal(pack([[dict(one)]], head=True, split=split).linear(x), fp8.linear(x))


def test_inputs_that_are_no_whole_groups_are_refused() -> None:
    with pytest.raises(ValueError, match=r"200 inputs .* multiple of 128"):
        pack([[projection(72, 200)]])


@interpreted
def test_the_kernel_takes_what_the_memory_plan_counts_and_leaves_the_bias_of_a_part_to_the_sum() -> None:
    from orthrus.kernels.linear import grouped_triton
    from orthrus.kernels.linear.grouped import integer_layer

    one, x = projection(72, 256), randn(5, 256, seed=7)
    rounded = [round_to_integers(one["weight"], 4, GROUP)]
    assert integer_layer(rounded, None, False).nbytes == 72 * 256 * INT4_BYTES
    layer = integer_layer(rounded, one["bias"], False)
    part = torch.empty(1, 5, 72)
    grouped_triton.launch(x, layer, part, 1)
    exact = by_gptq(x, [one])
    assert_near(part[0], exact - one["bias"].double())
    assert_near(layer.linear(x), exact)
