"""Layers whose inputs are divided among ranks: the tree of sums is the same, whichever ranks have its leaves."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from orthrus.kernels.leaves import Leaves
from orthrus.kernels.linear import Split, Weight, pack_weight
from orthrus.kernels.ranks import ONE_RANK, add_pairwise

OUTS, INS, LEAVES = 72, 1100, 8


def layer(leaves: Leaves, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()) -> Weight:
    views = [[{"weight": weight[:, leaves.begin : leaves.end].clone()}] for weight in weights]
    for [parameters], bias in zip(views, biases, strict=False):
        parameters["bias"] = bias.clone()
    return pack_weight(views, split=Split(ONE_RANK, leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exact_in_half", [True, False])
def test_sums_of_ranks_add_up_to_the_same_bits(dtype: torch.dtype, exact_in_half: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, INS, generator=generator) for rows in (OUTS, 9))
    if exact_in_half:
        weight = weight.half().float()
    weight, x = weight.to(dtype), x.to(dtype)
    whole = Leaves.whole(INS, 128, LEAVES)
    expected = layer(whole, [weight]).linear(x, out=torch.empty(9, OUTS))
    exact = x.double() @ weight.double().T
    assert (expected - exact).abs().max() < (1e-4 if dtype == torch.float32 else 0.5)
    for size in (2, 4, 8):
        each = LEAVES // size
        nodes = []
        for rank in range(size):
            own = Leaves(INS, 128, LEAVES, rank * each, each)
            part = layer(own, [weight])
            nodes.append(part.linear(x[:, own.begin : own.end], out=torch.empty(9, OUTS)))
        assert torch.equal(add_pairwise(nodes), expected)


def test_each_view_has_its_weight_and_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(OUTS, INS, generator=generator) for _ in range(2)]
    biases = [torch.randn(OUTS, generator=generator) for _ in range(2)]
    x = torch.randn(5, INS, generator=generator)
    both = layer(Leaves.whole(INS, 128, LEAVES), weights, biases)
    found = both.linear(x, torch.tensor([2], dtype=torch.int32))
    wanted = torch.cat([x[:2] @ weights[0].T + biases[0], x[2:] @ weights[1].T + biases[1]])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="one view of a layer has biases"):
        layer(Leaves.whole(INS, 128, LEAVES), weights, biases[:1])
