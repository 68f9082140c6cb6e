"""Run something that starts processes, and leave none of them behind: Ctrl-C and SIGTERM end it within seconds, at any time.

The work has a process of its own, in a session of its own, so that a terminal's Ctrl-C reaches the supervisor alone, who is
a few lines of Python and is never busy. What Ray would say of a cluster that is ended under it is said by nobody.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GRACE_SECONDS = 2.0
"""For processes that end when they are asked to; then they are killed."""
_KILL_SECONDS = 2.0
_POLL_SECONDS = 0.05
# From Linux' prctl.h.
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def run_supervised(work: Callable[[], int]) -> int:
    """Run `work` in a child process. Returns its exit status, or 0 if SIGINT, SIGTERM or SIGHUP ended it.

    Call it while there is one thread. When it returns, no process that `work` has started is left, nor any of theirs.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # What its parent has left behind becomes ours.
    # Without a handler, the end of a child may be no signal to wait for.
    signal.signal(signal.SIGCHLD, lambda *_: None)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (*_STOP, signal.SIGCHLD))
    child = os.fork()
    if child == 0:
        _work(work, mask)
    status: int | None = None
    while status is None:
        if signal.sigwait((*_STOP, signal.SIGCHLD)) != signal.SIGCHLD:
            print("\nStopping.", file=sys.stderr, flush=True)
            # Killed, so that it says nothing of what ends under it.
            os.kill(child, signal.SIGKILL)
            status = 0
            break
        status = _reap().get(child)
    _end_descendants()
    if status < 0:
        print(f"orthrus: ended by {signal.Signals(-status).name}", file=sys.stderr)
        return 1
    return status


def _work(work: Callable[[], int], mask: set[int | signal.Signals]) -> None:
    """Never returns."""
    os.setsid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    status = 1
    try:
        status = work()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with suppress(OSError):  # Whoever read them may have gone.
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _prctl(option: int, value: int) -> None:
    """Where there is one."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _end_descendants() -> None:
    """End all processes below this one."""
    asked: set[int] = set()
    patient_until = time.monotonic() + _GRACE_SECONDS
    while (left := _descendants()) and time.monotonic() < patient_until + _KILL_SECONDS:
        if time.monotonic() < patient_until:
            _send(signal.SIGTERM, left - asked)
            asked |= left
        else:
            _send(signal.SIGKILL, left)
        time.sleep(_POLL_SECONDS)
        _reap()


def _reap() -> dict[int, int]:
    """Children that have ended, and their exit statuses; minus a signal's number for one that was killed."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = os.waitstatus_to_exitcode(status)


def _descendants() -> set[int]:
    """All live processes below this one."""
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in brackets, may have anything in it.
            state, parent, *_ = file.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # It has ended.
        if state != "Z":
            children.setdefault(int(parent), []).append(int(file.parent.name))
    found: set[int] = set()
    below = children.get(os.getpid(), [])
    while below:
        found.update(below)
        below = [pid for parent in below for pid in children.get(parent, [])]
    return found


def _send(number: signal.Signals, pids: set[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
