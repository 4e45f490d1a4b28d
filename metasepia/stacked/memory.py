"""Keeps a training process from giving its memory back to the system between two steps."""

import ctypes
import functools
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_MIB = 1 << 20


@functools.cache
def keep_freed_memory() -> bool:
    """Has glibc's malloc keep what is freed, for the rest of the process; whether it could.

    A step frees all its states. By default glibc returns them to the system, and the next step's first touch of each
    page is a fault: a tenth of the time of a small model's step. The process stays as large as it once was.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Arrays up to 32 MiB, the most that glibc allows here, come from the heap, which is shrunk only from 1 GiB on.
    return bool(mallopt(_M_MMAP_THRESHOLD, 32 * _MIB)) and bool(mallopt(_M_TRIM_THRESHOLD, 1024 * _MIB))
