"""The processes of ranks 1 and up of a model that several ranks share. The engine's own process is rank 0.

A process of its own for each GPU: one that drives several GPUs waits for all of them whenever a kernel is loaded. The engine
tells the ranks over pipes what to run. It notices within `HANG_SECONDS` and a little more if one of them ends or stops.
"""

import copy
import logging
import multiprocessing
import pickle
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import torch
from torch import Tensor

from orthrus.engine.config import EngineConfig
from orthrus.engine.rank_worker import BEAT_SECONDS, LoadWeights, RankSetup, rank_device, run_rank
from orthrus.errors import ConfigError
from orthrus.kernels.ranks import RankError, Ranks
from orthrus.kernels.ranks.shared_memory import SharedBoxes, SharedMemoryRanks
from orthrus.models.config import ModelConfig
from orthrus.models.families import family_of

logger = logging.getLogger(__name__)

HANG_SECONDS = 4.0
"""A rank that has not shown itself for so long has stopped."""
_END_SECONDS = 2.0
"""What a rank is given to end by itself."""


def start_ranks(config: EngineConfig, model: ModelConfig, load: LoadWeights) -> Ranks:
    """Start the other ranks of `config.tensor_parallel_size`, and return rank 0.

    model: the whole one, which can be divided among them. load: see `LoadWeights`. The processes end with the `Ranks`. Each of
    them makes its part of the engine (`LoadedModel.build`) at the same time as the caller.
    """
    size = config.tensor_parallel_size
    context = multiprocessing.get_context("forkserver")
    # Imported once for all ranks: they are forks of a process that has done nothing else.
    rotary = family_of(model).hugging_face().rotary
    context.set_forkserver_preload([run_rank.__module__, rotary.__module__])
    shared = SharedBoxes.make(context, size)
    beats = torch.zeros(size, dtype=torch.float64).share_memory_()
    before = torch.get_num_threads()
    threads = max(1, before // size)
    on_cpu = rank_device(config.device, 0).type == "cpu"
    if on_cpu:
        torch.set_num_threads(threads)
    processes = [
        _start(context, RankSetup(rank, config, model, load, shared, beats, threads))
        for rank in range(1, size)
    ]
    folder = Path(shared.store_file).parent
    return SharedMemoryRanks(0, shared, RankProcesses(processes, beats, folder, before if on_cpu else None))


@dataclass(frozen=True)
class _Rank:
    """The process of one rank."""

    number: int
    process: ForkServerProcess
    pipe: Connection
    """To the process: what it is to do. From it: why it has failed."""


def _start(context: ForkServerContext, setup: RankSetup) -> _Rank:
    ours, theirs = context.Pipe()
    process = context.Process(
        target=run_rank, args=(setup, theirs), name=f"orthrus-rank-{setup.rank}", daemon=True
    )
    process.start()
    theirs.close()
    return _Rank(setup.rank, process, ours)


class RankProcesses:
    """The processes of ranks 1 and up, as rank 0 sees them. See `Processes`.

    A thread looks after them. When one has failed it ends the others, so that nobody waits for a process that stands still.
    """

    def __init__(self, ranks: Sequence[_Rank], beats: Tensor, folder: Path, threads: int | None) -> None:
        """beats: float64, when each rank last showed itself, in seconds of the monotonic clock. 0: it has not begun. folder: is
        removed at the end. threads: what this process has at the end again; None for what it has."""
        self._ranks = ranks
        self._watch = _Watch(ranks, beats, folder)
        self._thread = threading.Thread(target=self._watch.run, name="orthrus-ranks", daemon=True)
        self._thread.start()
        # Not a method of this object, which would keep it alive.
        self._end = weakref.finalize(self, _end_ranks, ranks, self._watch, threads)

    def check(self) -> None:
        self._watch.check()

    def tell(self, message: object) -> None:
        data = pickle.dumps(message)
        try:
            for rank in self._ranks:
                rank.pipe.send_bytes(data)
        except OSError as error:
            self._watch.check()
            raise RankError(f"a rank can't be told what to run: {error}") from error

    def watch(self, on_failure: Callable[[RankError], None]) -> None:
        self._watch.on_failure = on_failure
        try:
            self._watch.check()
        except (RankError, ConfigError) as error:
            on_failure(_as_rank_error(error))  # The thread may have found it before.


class _Watch:
    """Looks whether all ranks are there, several times a second."""

    def __init__(self, ranks: Sequence[_Rank], beats: Tensor, folder: Path) -> None:
        self._ranks, self._beats, self.folder = ranks, beats, folder
        self._lock = threading.Lock()
        self._error: RankError | ConfigError | None = None
        self.on_failure: Callable[[RankError], None] | None = None
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(BEAT_SECONDS):
            try:
                self.check()
            except (RankError, ConfigError) as error:
                for rank in self._ranks:
                    rank.process.kill()
                # Here too, since a process whose engine has failed may end at once.
                shutil.rmtree(self.folder, ignore_errors=True)
                if self.on_failure is not None:
                    self.on_failure(_as_rank_error(error))
                return

    def check(self) -> None:
        """Raise RankError if a rank has failed, or ConfigError if it can't be made as the settings say.

        It says the same each time: what was found first.
        """
        with self._lock:
            self._error = self._error or self._find()
        if self._error is not None:
            # A copy: an error that was raised holds the engine by its traceback, and this one is kept until the engine ends.
            raise copy.copy(self._error)

    def _find(self) -> RankError | ConfigError | None:
        if self.stopped.is_set():
            return None
        now = time.monotonic()
        for rank in self._ranks:
            if not rank.process.is_alive():
                reason = _reason(rank)
                if isinstance(reason, ConfigError):
                    return type(reason)(f"rank {rank.number}: {reason}")
                return RankError(f"rank {rank.number} of the model has ended: {reason}")
            beat = float(self._beats[rank.number])
            if beat and now - beat > HANG_SECONDS:
                return RankError(
                    f"rank {rank.number} of the model has stopped: it has not shown itself for {now - beat:.0f} seconds"
                )
        return None


def _as_rank_error(error: RankError | ConfigError) -> RankError:
    """For an engine that serves already, and has no settings to be told of."""
    return error if isinstance(error, RankError) else RankError(str(error))


def _reason(rank: _Rank) -> str | ConfigError:
    """Why a process has ended, as far as it could say."""
    try:
        if rank.pipe.poll():
            said: str | ConfigError = rank.pipe.recv()
            return said
    except (OSError, EOFError):
        pass
    code = rank.process.exitcode
    return f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"


def _end_ranks(ranks: Sequence[_Rank], watch: _Watch, threads: int | None) -> None:
    """Let the processes end: a rank whose pipe is closed has no more to do. threads: see `RankProcesses`."""
    watch.stopped.set()
    for rank in ranks:
        rank.pipe.close()
    for rank in ranks:
        rank.process.join(_END_SECONDS)
        rank.process.kill()
    shutil.rmtree(watch.folder, ignore_errors=True)
    if threads is not None:
        torch.set_num_threads(threads)
