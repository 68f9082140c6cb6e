"""The process of every rank except rank 0. It loads its part of the model, and runs the passes that rank 0 sends."""

import itertools
import logging
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Protocol

import torch
from torch import Tensor

from orthrus.engine.config import EngineConfig
from orthrus.engine.passes import LoadedModel
from orthrus.engine.sizing import choose_device
from orthrus.errors import ConfigError
from orthrus.kernels.ranks import RankError, Ranks
from orthrus.kernels.ranks.collective import Backend, CollectiveRanks
from orthrus.kernels.ranks.shared_memory import Processes, SharedBoxes, SharedMemoryRanks
from orthrus.models.checkpoint import with_own_head
from orthrus.models.config import ModelConfig
from orthrus.models.shard import Shard
from orthrus.schedules.protocol import load_schedule
from orthrus.schedules.registry import SCHEDULES

logger = logging.getLogger(__name__)

BEAT_SECONDS = 0.5
"""The time between two heartbeats of a rank."""


class LoadWeights(Protocol):
    """Loads a rank's part of the weights. Must be picklable."""

    def __call__(
        self, device: torch.device, dtype: str, *, shard: Shard, check: Callable[[], None]
    ) -> MutableMapping[str, Tensor]:
        """As `orthrus.models.checkpoint.open_weights`."""
        ...


@dataclass(frozen=True)
class SignsOfLife:
    """The heartbeats of the ranks, in shared memory."""

    beats: Tensor
    """int64 [ranks]: a number that each rank raises every `BEAT_SECONDS`."""
    loaded: Tensor
    """bool [ranks]: which ranks are ready for passes."""

    @staticmethod
    def make(size: int) -> "SignsOfLife":
        """For `size` ranks, none of which has begun."""
        beats, loaded = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.bool)
        return SignsOfLife(beats.share_memory_(), loaded.share_memory_())


@dataclass(frozen=True)
class RankSetup:
    """The arguments of the process of a rank."""

    rank: int
    config: EngineConfig
    model: ModelConfig
    """The whole model."""
    load: LoadWeights
    shared: SharedBoxes
    backend: Backend | None
    """See `make_ranks`."""
    signs: SignsOfLife
    threads: int
    """For a model on a CPU: how many threads the rank may use."""


def rank_device(device: str, rank: int) -> torch.device:
    """The device of a rank: the GPUs that the process sees, in order, or the CPU."""
    chosen = choose_device(device)
    return torch.device("cuda", rank) if chosen.type == "cuda" else chosen


def check_devices(config: EngineConfig) -> None:
    """Raise ConfigError if this process does not see the GPUs that `config` asks for."""
    size = config.tensor_parallel_size
    if size == 1 or choose_device(config.device).type != "cuda":
        return
    if config.dtype == "float64":
        raise ConfigError(
            f"dtype float64 runs on one GPU only: set it to bfloat16, or tensor_parallel_size {size} to 1"
        )
    if torch.cuda.device_count() < size:
        raise ConfigError(
            f"tensor_parallel_size {size} needs {size} GPUs of one host, and this process sees {torch.cuda.device_count()}: "
            "lower it, or give the replica more GPUs (ray_actor_options.num_gpus)"
        )


def choose_backend(config: EngineConfig) -> Backend | None:
    """The library that the ranks exchange through: NCCL, if a GPU can't reach the memory of another one. None: they need none."""
    size = config.tensor_parallel_size
    if size == 1 or choose_device(config.device).type != "cuda":
        return None
    pairs = itertools.permutations(range(size), 2)
    apart = next((pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)), None)
    if apart is None:
        return None
    if not torch.distributed.is_nccl_available():
        raise ConfigError(
            f"GPU {apart[0]} can't reach the memory of GPU {apart[1]}, which tensor_parallel_size {size} needs where torch has "
            "no NCCL: use a host whose GPUs are linked by NVLink, or set tensor_parallel_size to 1"
        )
    logger.warning(
        "GPU %d can't reach the memory of GPU %d: the GPUs exchange over NCCL, which takes longer and has not been measured. "
        "A host whose GPUs are linked by NVLink is faster",
        *apart,
    )
    return "nccl"


def make_ranks(rank: int, shared: SharedBoxes, processes: Processes, backend: Backend | None) -> Ranks:
    """The ranks as `rank` sees them. backend: the library that they exchange through; None for shared memory."""
    if backend is None:
        return SharedMemoryRanks(rank, shared, processes)
    return CollectiveRanks(rank, shared, processes, backend)


class _Rank0:
    """Rank 0's process, as the other ranks see it. See `Processes`. They don't watch it: they end when their pipe is closed."""

    def check(self) -> None:
        # Not os.getppid(): that is the fork server, which does not end with rank 0.
        rank_0 = multiprocessing.parent_process()
        if rank_0 is None or not rank_0.is_alive():
            raise RankError("rank 0 of the model has ended")

    def tell(self, message: object) -> None:
        pass

    def watch(self, on_failure: Callable[[RankError], None]) -> None:
        pass


def run_rank(setup: RankSetup, pipe: Connection) -> None:
    """Run until rank 0 closes the pipe. An error is sent through the pipe, and ends the process.

    A ConfigError is sent itself, for rank 0 to raise. Of other errors, the text is sent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for rank 0, which then closes the pipe.
    threading.Thread(target=_beat, args=(setup.signs.beats, setup.rank), daemon=True).start()
    try:
        loaded = _load(setup)
        setup.signs.loaded[setup.rank] = True
        while True:
            try:
                message = pipe.recv()
            except EOFError:
                return
            loaded.runner.follow(message)
    except ConfigError as error:
        pipe.send(error)
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
        raise


def _load(setup: RankSetup) -> LoadedModel:
    config, model = setup.config, setup.model
    device = rank_device(config.device, setup.rank)
    if device.type == "cpu":
        torch.set_num_threads(setup.threads)
    ranks = make_ranks(setup.rank, setup.shared, _Rank0(), setup.backend)
    shard = Shard(model, setup.rank, ranks.size)
    weights = setup.load(device, config.dtype, shard=shard, check=ranks.check)
    model = with_own_head(model, weights)
    schedule = load_schedule(SCHEDULES[config.schedule_for(model)])
    return LoadedModel.build(config, model, weights, ranks, schedule.max_groups)


def _beat(beats: Tensor, rank: int) -> None:
    while True:
        beats[rank] += 1
        time.sleep(BEAT_SECONDS)
