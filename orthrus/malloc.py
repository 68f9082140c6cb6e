"""glibc's malloc, as passes on a CPU need it."""

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def keep_freed_memory() -> None:
    """Let the process keep what it frees, up to 256 MiB: from now on, for all of it; without effect where there is no glibc.

    Every layer of a pass takes megabytes and gives them back. glibc would return them to the kernel each time, and have them
    cleared and mapped anew: an eighth of a decode step. What loading the weights has left behind goes back first.
    """
    libc = ctypes.CDLL(None)
    mallopt, trim = getattr(libc, "mallopt", None), getattr(libc, "malloc_trim", None)
    if mallopt is not None and trim is not None:
        trim(0)
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TOP_PAD, 64 << 20)
        mallopt(_TRIM_THRESHOLD, 256 << 20)
