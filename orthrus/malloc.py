"""glibc's malloc, as passes on a CPU need it."""

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def keep_freed_memory() -> None:
    """Let the whole process keep up to 256 MiB of freed memory from now on. Has no effect without glibc.

    Every layer of a pass allocates and frees megabytes. glibc would return them to the kernel each time, which would clear and
    map them again: an eighth of a decode step. Memory that was freed before this call is returned first.
    """
    libc = ctypes.CDLL(None)
    mallopt, trim = getattr(libc, "mallopt", None), getattr(libc, "malloc_trim", None)
    if mallopt is not None and trim is not None:
        trim(0)
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TOP_PAD, 64 << 20)
        mallopt(_TRIM_THRESHOLD, 256 << 20)
