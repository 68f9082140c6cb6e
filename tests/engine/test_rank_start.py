"""While ranks load: if one ends or hangs, the start ends at once with an error that names it. A slow one is waited for."""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from orthrus.cache.kv_cache import KVCache
from orthrus.engine import Engine, EngineConfig, rank_processes
from orthrus.engine.rank_processes import HANG_SECONDS, start_ranks
from orthrus.engine.rank_worker import LoadWeights, SignsOfLife
from orthrus.kernels.ranks import RankError, Ranks
from orthrus.kernels.ranks.ranks import run_watched
from orthrus.models.checkpoint import open_weights
from orthrus.models.config import ModelConfig
from orthrus.models.families import load_config
from orthrus.models.forward import LayerParallelForward
from orthrus.models.shard import Shard
from orthrus.runner import registry
from orthrus.runner.eager import EagerRunner
from orthrus.runner.protocol import RunnerLimits
from orthrus.runner.registry import RUNNERS, RunnerEntry
from tests.checkpoints import make_checkpoint
from tests.ranks import running_ranks

NOT_WAITED = 60
"""More seconds than any of these starts may take."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("start"),
        vocab_size=600,
        hidden_size=64,
        intermediate_size=256,
        heads=4,
        kv_heads=2,
        head_dim=64,
        dtype=torch.bfloat16,
    )


@dataclass(frozen=True)
class LoadWith:
    """Calls `first`, and then loads a rank's weights."""

    first: Callable[[], object]
    load: LoadWeights

    def __call__(
        self, device: torch.device, dtype: str, *, shard: Shard, check: Callable[[], None]
    ) -> MutableMapping[str, Tensor]:
        self.first()
        return self.load(device, dtype, shard=shard, check=check)


def end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hang() -> None:
    """Sleep without letting any other thread of Python run."""
    ctypes.PyDLL(None).sleep(NOT_WAITED)


def compute() -> None:
    """Compute for longer than `HANG_SECONDS`, without letting any other thread of Python run."""
    # By the time that the CPU takes, because other processes may end meanwhile, and the rest then takes less.
    begin = time.thread_time()
    sum(range(10**7))
    count = int(10**7 * (HANG_SECONDS + 2.5) / (time.thread_time() - begin))
    begin = time.monotonic()
    sum(range(count))
    assert time.monotonic() - begin > HANG_SECONDS


@contextmanager
def started(
    checkpoint: Path, first: Callable[[], object]
) -> Iterator[tuple[EngineConfig, ModelConfig, Ranks]]:
    config = EngineConfig(
        model=str(checkpoint), device="cpu", tensor_parallel_size=2, sum_leaves=2, kv_cache_tokens=512
    )
    model = config.with_settings(load_config(checkpoint))
    with start_ranks(config, model, LoadWith(first, partial(open_weights, checkpoint, model))) as ranks:
        yield config, model, ranks


def start(checkpoint: Path, first: Callable[[], object]) -> Engine:
    with started(checkpoint, first) as (config, model, ranks):
        weights = open_weights(checkpoint, model, "cpu", shard=Shard(model, 0, 2), check=ranks.check)
        return Engine(config, model, weights, ranks=ranks)


def wait_in_vain(ranks: Ranks) -> None:
    end = time.monotonic() + NOT_WAITED
    while time.monotonic() < end:
        ranks.check()
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("first", "said"),
    [
        (end, "rank 1 of the model has ended: killed by signal 9"),
        (stop, "rank 1 of the model has stopped"),
        (hang, "rank 1 of the model has stopped"),
    ],
)
def test_a_rank_that_fails_while_it_loads_ends_the_start(
    checkpoint: Path, first: Callable[[], object], said: str
) -> None:
    """Whatever rank 0 does meanwhile: it reads its own weights, waits for other ranks, or waits for a library."""
    with started(checkpoint, first) as (_, model, ranks):
        with pytest.raises(RankError, match=said):
            wait_in_vain(ranks)
        with pytest.raises(RankError, match=said):
            ranks.least(0)
        with pytest.raises(RankError, match=said):
            dict(open_weights(checkpoint, model, "cpu", shard=Shard(model, 0, 2), check=ranks.check))


def test_nothing_waits_for_ranks_that_have_been_ended(checkpoint: Path) -> None:
    """An interrupted start leaves a thread behind that loads or waits for the others. Its next check ends it."""
    with pytest.raises(KeyboardInterrupt), started(checkpoint, int) as (_, model, ranks):
        raise KeyboardInterrupt
    with pytest.raises(RankError, match="have been ended"):
        wait_in_vain(ranks)
    weights = open_weights(checkpoint, model, "cpu", shard=Shard(model, 0, 2), check=ranks.check)
    with pytest.raises(RankError, match="have been ended"):
        dict(weights)


class StuckRunner(EagerRunner):
    """Fails or waits as it is built, where a runner of GPUs runs the first passes and captures graphs.

    Rank 0 waits as it would for its GPU, without checking the other ranks.
    """

    fail: Callable[[], object]
    begun: float
    """When rank 0 began to wait."""

    @staticmethod
    def build(forward: LayerParallelForward, cache: KVCache, limits: RunnerLimits) -> "StuckRunner":
        if forward.ranks.rank:
            StuckRunner.fail()
        StuckRunner.begun = time.monotonic()
        threading.Event().wait(NOT_WAITED)
        raise AssertionError("nobody waits for so long")


def use_stuck_runner(fail: Callable[[], object]) -> None:
    """In the process of the rank that fails: see `StuckRunner`."""
    StuckRunner.fail = staticmethod(fail)
    RUNNERS.insert(0, STUCK)


STUCK = RunnerEntry(f"{__name__}:StuckRunner", fits=lambda device, dtype: True)
NOTICED = 5
"""Most seconds until the failure of a rank is noticed."""


@pytest.mark.parametrize(
    ("fail", "said"),
    [
        (end, "rank 1 of the model has ended: killed by signal 9"),
        (stop, "rank 1 of the model has stopped"),
    ],
)
def test_a_rank_that_fails_while_passes_are_captured_ends_the_start(
    checkpoint: Path, fail: Callable[[], object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 names the failed rank within seconds, although it waits for its own GPU meanwhile."""
    monkeypatch.setattr(registry, "RUNNERS", [STUCK])
    threads = torch.get_num_threads()
    with pytest.raises(RankError, match=said):
        start(checkpoint, partial(use_stuck_runner, fail))
    assert time.monotonic() - StuckRunner.begun < NOTICED
    # The thread that still waits is left behind, and holds the ranks. But their processes have ended.
    assert not running_ranks()
    assert torch.get_num_threads() == threads


def test_a_rank_that_loads_slowly_is_waited_for(checkpoint: Path) -> None:
    [[completion]] = start(checkpoint, compute).generate([[1, 2, 3]])
    assert completion.token_ids


def test_watched_work_that_waits_for_a_failed_rank_is_left_behind(tmp_path: Path) -> None:
    """With a file store, as GPUs use it to find each other's memory."""
    store = FileStore(str(tmp_path / "store"), 2)
    store.set_timeout(timedelta(seconds=NOT_WAITED))
    begin, looks = time.monotonic(), 0

    def check() -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            raise RankError("rank 1 has ended")

    with pytest.raises(RankError, match="rank 1 has ended"):
        run_watched(lambda: store.get("from rank 1"), check)
    assert time.monotonic() - begin < NOT_WAITED / 4
    store.set("from rank 1", "here")
    assert run_watched(lambda: store.get("from rank 1"), check) == b"here"
    with pytest.raises(ValueError, match="what the work raises"):
        run_watched(lambda: exec("raise ValueError('what the work raises')"), check)


def test_what_watched_work_made_is_freed_once_its_error_is_handled() -> None:
    """A model that does not fit takes no memory until the next garbage collection."""
    made: list[weakref.ref[Tensor]] = []

    def fail() -> None:
        model = torch.zeros(1)
        made.append(weakref.ref(model))
        raise ValueError("it does not fit")

    gc.disable()
    try:
        with contextlib.suppress(ValueError):
            run_watched(fail, lambda: None)
        end = time.monotonic() + NOTICED  # The thread may still be about to end.
        while made[0]() is not None:
            assert time.monotonic() < end
            time.sleep(0.001)
    finally:
        gc.enable()


def test_a_rank_that_never_begins_ends_the_start_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_processes, "_MAX_MISSED_AT_START", 3)
    context = multiprocessing.get_context("forkserver")
    ours, _ = context.Pipe()
    process = context.Process(target=time.sleep, args=(NOT_WAITED,), daemon=True)
    process.start()
    try:
        watch = rank_processes._Watch([rank_processes._Rank(1, process, ours)], SignsOfLife.make(2), tmp_path)
        watch.check()
        for _ in range(rank_processes._MAX_MISSED + 1):
            watch._check_beats()
        with pytest.raises(RankError, match="rank 1 of the model has stopped"):
            watch.check()
    finally:
        process.kill()
        process.join()
