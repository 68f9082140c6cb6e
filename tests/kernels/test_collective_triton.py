"""Layers of ranks that exchange tensors through a library have the bits of one rank. Kernels run in Triton's interpreter."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from orthrus.kernels.leaves import Leaves
from orthrus.kernels.linear import Split
from orthrus.kernels.linear.gpu import TritonWeight
from orthrus.kernels.linear.types import LinearTiles
from orthrus.kernels.ranks import ONE_RANK, RankError, Ranks
from tests.kernels.interpreted import int32, interpreted, keys_of, randn

pytestmark = interpreted

SIZE, LEAVES, INS, TOKENS = 2, 4, 1024, 704


class InTurn(Ranks):
    """One of several ranks that run one after the other. All run twice: only in the second run are all ranks' tensors known."""

    def __init__(self, rank: int, given: dict[int, Tensor]) -> None:
        self.rank, self.size, self._given = rank, SIZE, given

    def exchange(self, own: Tensor) -> list[Tensor]:
        self._given[self.rank] = own.clone()
        return [self._given.get(rank, own) for rank in range(SIZE)]

    def tell(self, message: object) -> None:
        pass

    def check(self) -> None:
        pass

    def watch(self, on_failure: Callable[[RankError], None]) -> None:
        pass


def test_sums_of_ranks_are_added_in_the_order_of_the_tree() -> None:
    weight, x = randn(72, INS, seed=1), randn(20, INS, seed=2)
    residual, norm, bias = randn(20, 72, seed=3), randn(72, seed=4), randn(1, 72, seed=5)
    given: dict[int, Tensor] = {}

    def run(ranks: Ranks, split: bool) -> tuple[Tensor, Tensor]:
        each = LEAVES // ranks.size
        leaves = Leaves(INS, 128, LEAVES, ranks.rank * each, each)
        own = slice(leaves.begin, leaves.end)
        layer = TritonWeight((weight[:, own].contiguous(),), bias, split=Split(ranks, leaves))
        tiles = LinearTiles(64, 16, 128, split)
        return layer.linear_add_rms_norm(x[:, own].contiguous(), residual, norm, 1e-6, tiles=tiles)

    for split in (True, False):
        expected = run(ONE_RANK, split)
        for _ in range(2):
            found = [run(InTurn(rank, given), split) for rank in range(SIZE)]
        for hidden, normed in found:
            assert torch.equal(hidden, expected[0]) and torch.equal(normed, expected[1])


def test_picks_over_all_ranks_are_those_of_one_rank() -> None:
    weight, x = randn(TOKENS, 48) * 2, randn(6, 48, seed=1)
    temperatures, keys = torch.tensor([0.0, 0.7, 1.3] * 2), keys_of([*range(6)], [*range(5, 11)])
    given: dict[int, Tensor] = {}

    def run(ranks: Ranks) -> Tensor:
        each = TOKENS // ranks.size
        split = Split(ranks, first_output=ranks.rank * each)
        layer = TritonWeight((weight[split.first_output :][:each].contiguous(),), split=split)
        picks = torch.zeros(8, dtype=torch.int32)
        layer.linear_gumbel_argmax(x, torch.zeros(6, each), int32(1), temperatures, keys, picks, int32(2))
        return picks

    for _ in range(2):
        found = [run(InTurn(rank, given)) for rank in range(SIZE)]
    expected = run(ONE_RANK)
    assert all(torch.equal(picks, expected) for picks in found)
    assert max(expected) >= TOKENS // SIZE > min(expected[2:]), "each rank has some of the best"
