"""The processes of ranks 1 and up of a model that several ranks share. The engine's own process is rank 0.

Each GPU has a process of its own, because a process with several GPUs waits for all of them whenever a kernel is loaded. The
engine sends the passes to the ranks over pipes. It notices within `BEAT_SECONDS` if a process ends, and within about
`HANG_SECONDS` if one hangs.
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
"""A rank without a heartbeat for so long has stopped."""
_MAX_MISSED = round(HANG_SECONDS / BEAT_SECONDS)
"""The same as a number of checks. The checks pause with the host, so ranks are not lost when the whole host is suspended."""
_MAX_MISSED_AT_START = round(60 / BEAT_SECONDS)
"""The same for a rank that has not begun to run yet: it waits for Python and the CPU."""
_END_SECONDS = 2.0
"""How long a rank may take to end by itself before it is killed."""


@contextmanager
def start_ranks(
    config: EngineConfig, model: ModelConfig, load: LoadWeights, backend: Backend | None = None
) -> Iterator[Ranks]:
    """Start the processes of ranks 1 and up, and yield the `Ranks` of rank 0, with which the caller makes the engine.

    Each process makes its part of the engine (`LoadedModel.build`) at the same time as the caller. The processes end when the
    `Ranks` object is no longer used, or at once if the caller fails to make the engine.

    model: the whole model, which the ranks must be able to share. load: see `LoadWeights`. backend: the library that the ranks
    exchange through. If it is None, `choose_backend` chooses.
    """
    size = config.tensor_parallel_size
    if size == 1:
        yield ONE_RANK
        return
    backend = backend or choose_backend(config)
    context = multiprocessing.get_context("forkserver")
    # The ranks are forks of a server process, which imports these modules once for all of them.
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
        # Garbage collection may be late: a thread that the start left behind (see `Ranks.watched`) may still hold `ranks`.
        ranks.end()
        raise


@dataclass(frozen=True)
class _Rank:
    """The process of one rank."""

    number: int
    process: ForkServerProcess
    pipe: Connection
    """Sends messages to the process, and receives the reason if it fails."""


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

    A thread watches them. When one has failed, it kills all of them, so that nothing waits for a process that hangs.
    """

    def __init__(self, ranks: Sequence[_Rank], signs: SignsOfLife, folder: Path, threads: int | None) -> None:
        """folder: removed at the end. threads: the number of torch's threads to restore at the end; None to leave it."""
        self._ranks = ranks
        self._watch = _Watch(ranks, signs, folder)
        self._thread = threading.Thread(target=self._watch.run, name="orthrus-ranks", daemon=True)
        self._thread.start()
        # Not a method of this object: the reference would keep the object alive.
        self._end = weakref.finalize(self, _end_ranks, ranks, self._watch, threads)

    def check(self) -> None:
        self._watch.check()

    def end(self) -> None:
        """End the processes. This also happens when the object is garbage-collected."""
        self._end()

    def tell(self, message: object) -> None:
        data = pickle.dumps(message)
        try:
            for rank in self._ranks:
                rank.pipe.send_bytes(data)
        except OSError as error:
            self._watch.check()
            raise RankError(f"a message to a rank can't be sent: {error}") from error

    def watch(self, on_failure: Callable[[RankError], None]) -> None:
        self._watch.on_failure = on_failure
        try:
            self._watch.check()
        except (RankError, ConfigError) as error:
            on_failure(_as_rank_error(error))  # The thread may have found it before `on_failure` was set.


@dataclass
class _LastSign:
    """The last sign of life of a rank."""

    beats: int
    ticks: int
    """CPU time of the process while the rank loads: see `_process_state`."""
    missed: int = 0
    """How many checks since then found nothing new."""


class _Watch:
    """Checks every `BEAT_SECONDS` whether all ranks run."""

    def __init__(self, ranks: Sequence[_Rank], signs: SignsOfLife, folder: Path) -> None:
        self._ranks, self._signs, self.folder = ranks, signs, folder
        self._last = {rank.number: _LastSign(0, 0) for rank in ranks}
        # Reentrant, because `stop` may be called by a garbage collection in any line.
        self._lock = threading.RLock()
        self._error: RankError | ConfigError | None = None
        self.on_failure: Callable[[RankError], None] | None = None
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(BEAT_SECONDS):
            self._check_beats()
            try:
                self.check()
            except (RankError, ConfigError) as error:
                if self.stopped.is_set():
                    return
                for rank in self._ranks:
                    rank.process.kill()
                # `_end_ranks` may never run: a process whose engine has failed may end at once.
                shutil.rmtree(self.folder, ignore_errors=True)
                if self.on_failure is not None:
                    self.on_failure(_as_rank_error(error))
                return

    def stop(self) -> None:
        """Stop checking, because the processes are ended. From now on `check` raises RankError.

        So a thread that a start has left behind, as when it is interrupted, does not go on loading and waiting for them.
        """
        self.stopped.set()
        with self._lock:
            self._error = self._error or RankError("the ranks of the model have been ended")

    def check(self) -> None:
        """Raise RankError if a rank has failed, or ConfigError if it can't be made with these settings.

        Every later call raises the first failure that was found.
        """
        with self._lock:
            self._error = self._error or self._find_ended()
        if self._error is not None:
            # A copy: a raised error keeps the engine alive by its traceback, and `_error` is kept until the engine ends.
            raise copy.copy(self._error)

    def _check_beats(self) -> None:
        """Read the heartbeats of the ranks. A rank that has missed `_MAX_MISSED` of them counts as stopped.

        While a rank loads, its heartbeat may pause for long: a Python thread that reads a large file can block all others. Such a
        rank has not stopped as long as it uses the CPU or waits for a disk.
        """
        for rank in self._ranks:
            beats, ticks = int(self._signs.beats[rank.number]), 0
            state = ""
            if not self._signs.loaded[rank.number] and rank.process.pid is not None:
                state, ticks = _process_state(rank.process.pid)
            last = self._last[rank.number]
            if beats != last.beats or ticks - last.ticks >= _FEW_TICKS or state == _WAITS_FOR_DISK:
                self._last[rank.number] = _LastSign(beats, ticks)
                continue
            last.missed += 1
            begun = beats or ticks >= _FEW_TICKS
            if last.missed >= (_MAX_MISSED if begun else _MAX_MISSED_AT_START):
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
"""The state of a process in uninterruptible sleep, as ps shows it."""
_FEW_TICKS = 5
"""A process whose threads only wait for each other uses fewer clock ticks of CPU time in `HANG_SECONDS`. A second has 100."""


def _process_state(pid: int) -> tuple[str, int]:
    """The state of a process as in ps, and its CPU time in clock ticks. "" and 0 if /proc does not have them."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0
    return fields[0], int(fields[11]) + int(fields[12])


def _stopped(rank: int) -> RankError:
    return RankError(
        f"rank {rank} of the model has stopped: it has sent no heartbeat for {HANG_SECONDS:g} seconds"
    )


def _as_rank_error(error: RankError | ConfigError) -> RankError:
    """An engine that serves already reports every failure of a rank as a RankError."""
    return error if isinstance(error, RankError) else RankError(str(error))


def _reason(rank: _Rank) -> str | ConfigError:
    """Why a process has ended: what it sent before, or else its exit code."""
    try:
        if rank.pipe.poll():
            said: str | ConfigError = rank.pipe.recv()
            return said
    except (OSError, EOFError):
        pass
    code = rank.process.exitcode
    return f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"


def _end_ranks(ranks: Sequence[_Rank], watch: _Watch, threads: int | None) -> None:
    """End the processes. A rank ends by itself when its pipe is closed; else it is killed. threads: see `RankProcesses`."""
    watch.stop()
    for rank in ranks:
        rank.pipe.close()
    for rank in ranks:
        rank.process.join(_END_SECONDS)
        rank.process.kill()
    shutil.rmtree(watch.folder, ignore_errors=True)
    if threads is not None:
        torch.set_num_threads(threads)
