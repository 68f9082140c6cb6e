"""Run something that starts processes, and leave none of them behind: Ctrl-C and SIGTERM end it within seconds, at any time.

The work runs in a child process with a session of its own, so that a terminal's Ctrl-C reaches only the supervisor, which is
never busy. The supervisor kills the child first. So Ray, which runs in the child, prints no errors while its cluster ends.
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
"""How long processes have to end after SIGTERM. Those that are left are killed."""
_KILL_SECONDS = 2.0
"""How long to go on killing processes that are left."""
_POLL_SECONDS = 0.05
"""Between two looks at which processes are left."""
# From Linux' prctl.h.
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def run_supervised(work: Callable[[], int]) -> int:
    """Run `work` in a child process. Returns its exit status, or 0 if SIGINT, SIGTERM or SIGHUP ended it.

    Call it while this process has only one thread. When it returns, all descendants of this process have ended.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # Orphaned descendants become children of this process.
    # SIGCHLD is ignored by default, and sigwait may miss an ignored signal. So it gets a handler.
    signal.signal(signal.SIGCHLD, lambda *_: None)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (*_STOP, signal.SIGCHLD))
    child = os.fork()
    if child == 0:
        _work(work, mask)
    status: int | None = None
    while status is None:
        if signal.sigwait((*_STOP, signal.SIGCHLD)) != signal.SIGCHLD:
            print("\nStopping.", file=sys.stderr, flush=True)
            # Killed first, so that it prints no errors about processes that end before it.
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
    """Run `work` in the child, and exit with its status. Never returns. mask: the signal mask to restore."""
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
        with suppress(OSError):  # The reader of a pipe may have gone.
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _prctl(option: int, value: int) -> None:
    """Linux' prctl; does nothing on other systems."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _end_descendants() -> None:
    """End all processes below this one."""
    asked: set[int] = set()
    patient_until = time.monotonic() + _GRACE_SECONDS
    # A look at /proc may miss a process whose parent ends meanwhile. It becomes a child of this process at once.
    while ((left := _descendants()) or _has_children()) and time.monotonic() < patient_until + _KILL_SECONDS:
        if time.monotonic() < patient_until:
            _send(signal.SIGTERM, left - asked)
            asked |= left
        else:
            _send(signal.SIGKILL, left)
        time.sleep(_POLL_SECONDS)
        _reap()


def _reap() -> dict[int, int]:
    """The exit status of each child that has ended, by pid. For a child that a signal ended, it is minus the signal's number."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = os.waitstatus_to_exitcode(status)


def _has_children() -> bool:
    """Whether this process has any child, dead ones that were not waited for included."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _descendants() -> set[int]:
    """All live processes below this one."""
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in brackets, may contain spaces and brackets.
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
