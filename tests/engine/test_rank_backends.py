"""Ranks that exchange through a library, as GPUs do that can't reach each other's memory: here on CPUs, through gloo."""

import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from orthrus.engine import Engine, EngineConfig
from orthrus.engine.rank_processes import HANG_SECONDS
from orthrus.kernels.ranks import RankError
from orthrus.kernels.ranks.collective import CollectiveRanks, pick_best_of_ranks
from orthrus.kernels.ranks.shared_memory import SharedBoxes
from orthrus.kernels.rows.types import NO_TOKEN
from orthrus.requests.request import Request, SamplingParams
from tests.checkpoints import make_checkpoint
from tests.ranks import engine_over, running_ranks

PROMPTS = [[5, 9, 2, 40, 7], [101, 3], list(range(30, 130))]
PARAMS = [
    SamplingParams(temperature=float(i > 0), seed=i, max_tokens=20, logprobs=1, ignore_eos=True)
    for i in range(3)
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("backends"),
        vocab_size=600,
        hidden_size=64,
        intermediate_size=600,
        heads=8,
        kv_heads=4,
        head_dim=64,
        noise=0.02,
        dtype=torch.bfloat16,
    )


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    gc.collect()
    assert not running_ranks()


def load(checkpoint: Path, size: int) -> Engine:
    """An engine of `size` ranks that exchange through gloo."""
    settings = {"model": str(checkpoint), "device": "cpu", "tensor_parallel_size": size, "sum_leaves": 4}
    config = EngineConfig.model_validate(settings | {"kv_cache_tokens": 1024, "adaptive_draft": False})
    return engine_over(config, "gloo" if size > 1 else None)


def test_ranks_that_exchange_through_a_library_give_the_bits_of_one(checkpoint: Path) -> None:
    found = []
    for size in (1, 2, 4):
        engine = load(checkpoint, size)
        results = [(c.token_ids, c.logprobs) for [c] in engine.generate(PROMPTS, PARAMS)]
        found.append((results, engine.stats.committed / engine.stats.cycles))
        del engine
        gc.collect()
    assert found[0][1] > 1.3
    assert found == [found[0]] * 3


def run_to_the_end(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


@pytest.mark.parametrize(
    ("sign", "said"), [(signal.SIGKILL, "killed by signal 9"), (signal.SIGSTOP, "stopped")]
)
def test_a_rank_that_ends_or_stops_ends_the_engine(checkpoint: Path, sign: signal.Signals, said: str) -> None:
    engine = load(checkpoint, 2)
    params = SamplingParams(temperature=0.0, max_tokens=500, ignore_eos=True)
    engine.submit(Request("long", [1, 2, 3], params))
    engine.step()
    [process] = running_ranks()
    assert process.pid is not None
    os.kill(process.pid, sign)
    begin = time.monotonic()
    with pytest.raises(RankError, match=rf"rank 1 .* {said}"):
        run_to_the_end(engine)
    assert time.monotonic() - begin < HANG_SECONDS + 1


class Alive:
    """`Processes` of ranks that are threads of this process."""

    def check(self) -> None:
        pass

    def tell(self, message: object) -> None:
        pass

    def watch(self, on_failure: Callable[[RankError], None]) -> None:
        pass


@pytest.mark.parametrize("size", [2, 4])
def test_the_best_token_of_all_ranks_is_picked(size: int) -> None:
    """The lowest among equals, and none where a score was no number. Picks are written where the pass says."""
    rows, each, block = 5, 96, 32
    scores = torch.randint(0, 40, (rows, size * each), generator=torch.Generator().manual_seed(0)).float()
    scores[1] = 7.0
    scores[2, each + 3] = float("inf")  # Stands for a score that is not a number.
    scores[3] = -float("inf")
    expected = scores.argmax(1).to(torch.int32)
    for row in (0, 4):
        expected[row] = int((scores[row] == scores[row].max()).nonzero()[0])
    expected[1], expected[2], expected[3] = 0, NO_TOKEN, 0
    shared = SharedBoxes.make(multiprocessing.get_context("forkserver"), size)

    def pick(rank: int) -> Tensor:
        ranks = CollectiveRanks(rank, shared, Alive(), "gloo")
        own = scores[:, rank * each : (rank + 1) * each].reshape(rows, each // block, block)
        values = own.amax(2)
        places = torch.where(own == values[:, :, None], torch.arange(block), block).amin(2)
        first = rank * each + block * torch.arange(each // block)
        picks = torch.full((rows + 3,), -7, dtype=torch.int32)
        pick_best_of_ranks(ranks, values, (first + places).int(), picks, torch.tensor([2]).int())
        return picks

    with ThreadPoolExecutor(size) as pool:
        for picks in pool.map(pick, range(size)):
            assert picks.tolist() == [-7, -7, *expected.tolist(), -7]
