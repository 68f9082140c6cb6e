"""The processes of ranks 1 and up of a model that several ranks share. The engine's own process is rank 0.

A process of its own for each GPU: one that drives several GPUs waits for all of them whenever a kernel is loaded. The engine
tells the ranks over pipes what to run. It notices at once if one of them ends, and within about `HANG_SECONDS` if one stops.
"""

import copy
import logging
import multiprocessing
import pickle
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import torch

from orthrus.engine.config import EngineConfig
from orthrus.engine.rank_worker import (
    BEAT_SECONDS,
    LoadWeights,
    RankSetup,
    SignsOfLife,
    choose_backend,
    make_ranks,
    rank_device,
    run_rank,
)
from orthrus.errors import ConfigError
from orthrus.kernels.ranks import ONE_RANK, RankError, Ranks
from orthrus.kernels.ranks.collective import Backend
from orthrus.kernels.ranks.shared_memory import SharedBoxes
from orthrus.models.config import ModelConfig
from orthrus.models.families import family_of

logger = logging.getLogger(__name__)

HANG_SECONDS = 3.5
"""A rank that has not shown itself for so long has stopped."""
_STILL_LOOKS = round(HANG_SECONDS / BEAT_SECONDS)
"""The same in looks at it. A host that stands still for a while makes none, and so loses no rank."""
_END_SECONDS = 2.0
"""What a rank is given to end by itself."""


@contextmanager
def start_ranks(
    config: EngineConfig, model: ModelConfig, load: LoadWeights, backend: Backend | None = None
) -> Iterator[Ranks]:
    """Start the other ranks of `config.tensor_parallel_size`, and yield rank 0, with which the caller makes the engine.

    Each of them makes its part of the engine (`LoadedModel.build`) at the same time as the caller. The processes end with the
    `Ranks`, or at once if the caller fails to make the engine.

    model: the whole one, which can be divided among them. load: see `LoadWeights`.
    backend: the library that they exchange through; None: that of `choose_backend`, if they need one.
    """
    size = config.tensor_parallel_size
    if size == 1:
        yield ONE_RANK
        return
    backend = backend or choose_backend(config)
    context = multiprocessing.get_context("forkserver")
    # Imported once for all ranks: they are forks of a process that has done nothing else.
    rotary = family_of(model).hugging_face().rotary
    context.set_forkserver_preload([run_rank.__module__, rotary.__module__])
    shared = SharedBoxes.make(context, size)
    signs = SignsOfLife.make(size)
    before = torch.get_num_threads()
    threads = max(1, before // size)
    on_cpu = rank_device(config.device, 0).type == "cpu"
    if on_cpu:
        torch.set_num_threads(threads)
    processes = [
        _start(context, RankSetup(rank, config, model, load, shared, backend, signs, threads))
        for rank in range(1, size)
    ]
    folder = Path(shared.store_file).parent
    ranks = RankProcesses(processes, signs, folder, before if on_cpu else None)
    try:
        yield make_ranks(0, shared, ranks, backend)
    except BaseException:
        # Not when they are collected: a thread that the start left behind (see `Ranks.watched`) may still hold them.
        ranks.end()
        raise


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

    def __init__(self, ranks: Sequence[_Rank], signs: SignsOfLife, folder: Path, threads: int | None) -> None:
        """folder: is removed at the end. threads: what this process has at the end again; None for what it has."""
        self._ranks = ranks
        self._watch = _Watch(ranks, signs, folder)
        self._thread = threading.Thread(target=self._watch.run, name="orthrus-ranks", daemon=True)
        self._thread.start()
        # Not a method of this object, which would keep it alive.
        self._end = weakref.finalize(self, _end_ranks, ranks, self._watch, threads)

    def check(self) -> None:
        self._watch.check()

    def end(self) -> None:
        """End the processes, as happens by itself once nobody uses this object."""
        self._end()

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


@dataclass
class _Seen:
    """What a rank last showed of itself."""

    beats: int
    ticks: int
    """For how long it had computed, while it loaded: see `_process_state`."""
    looks: int = 0
    """How often it has been looked at since, in vain."""


class _Watch:
    """Looks whether all ranks are there, several times a second."""

    def __init__(self, ranks: Sequence[_Rank], signs: SignsOfLife, folder: Path) -> None:
        self._ranks, self._signs, self.folder = ranks, signs, folder
        self._seen = {rank.number: _Seen(0, 0) for rank in ranks}
        self._lock = threading.Lock()
        self._error: RankError | ConfigError | None = None
        self.on_failure: Callable[[RankError], None] | None = None
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(BEAT_SECONDS):
            self._look()
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
            self._error = self._error or self._find_ended()
        if self._error is not None:
            # A copy: an error that was raised holds the engine by its traceback, and this one is kept until the engine ends.
            raise copy.copy(self._error)

    def _look(self) -> None:
        """Note what the ranks show of themselves, and that one has stopped if it has shown nothing new for long.

        A rank that still loads may be unable to beat for long, as a thread of Python that reads a large file can keep all others
        from running. It has not stopped as long as it computes, or waits for a disk.
        """
        for rank in self._ranks:
            beats, ticks = int(self._signs.beats[rank.number]), 0
            state = ""
            if not self._signs.loaded[rank.number] and rank.process.pid is not None:
                state, ticks = _process_state(rank.process.pid)
            seen = self._seen[rank.number]
            begun = beats or ticks >= _FEW_TICKS
            if (
                not begun
                or beats != seen.beats
                or ticks - seen.ticks >= _FEW_TICKS
                or state == _WAITS_FOR_DISK
            ):
                self._seen[rank.number] = _Seen(beats, ticks)
                continue
            seen.looks += 1
            if seen.looks >= _STILL_LOOKS:
                with self._lock:
                    if not self.stopped.is_set():
                        self._error = self._error or self._find_ended() or _stopped(rank.number)

    def _find_ended(self) -> RankError | ConfigError | None:
        if self.stopped.is_set():
            return None
        for rank in self._ranks:
            if not rank.process.is_alive():
                reason = _reason(rank)
                if isinstance(reason, ConfigError):
                    return type(reason)(f"rank {rank.number}: {reason}")
                return RankError(f"rank {rank.number} of the model has ended: {reason}")
        return None


_WAITS_FOR_DISK = "D"
"""Of the states of a process, as in ps."""
_FEW_TICKS = 5
"""A process whose threads only wait for each other uses fewer ticks than this in `HANG_SECONDS`. A second has 100."""


def _process_state(pid: int) -> tuple[str, int]:
    """State of a process, and for how many ticks of the clock it has computed; "" and 0 where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0
    return fields[0], int(fields[11]) + int(fields[12])


def _stopped(rank: int) -> RankError:
    return RankError(
        f"rank {rank} of the model has stopped: it has not shown itself for {HANG_SECONDS:g} seconds"
    )


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
