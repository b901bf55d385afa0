"""The allocator: glibc keeps freed megabytes for the next batch instead of giving every page back to the kernel.

Lance allocates each column of each batch with malloc. By default glibc maps blocks of megabytes anew each time, so
most of a scan's CPU time is page faults (tests/test_malloc.py counts them for plain blocks). The setting holds for the
whole process; GPULOAD_MALLOC=default leaves the allocator alone.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h


@functools.cache
def tune() -> bool:
    """Set glibc's thresholds once per process. False where it is not glibc, too old, or GPULOAD_MALLOC=default."""
    if os.environ.get("GPULOAD_MALLOC") == "default":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return set_thresholds(mallopt)


def set_thresholds(mallopt: Callable[[int, int], int]) -> bool:
    """Keep blocks of up to 1 GiB, unless the first answer is no: then nothing else is set.

    glibc up to 2.34 refuses a threshold above 32 MiB. Left alone it raises its thresholds to that by itself, as blocks
    are freed; setting any other would end this, with the trim threshold at the 128 KiB it starts from.
    """
    if mallopt(_M_MMAP_THRESHOLD, 1 << 30) != 1:
        return False
    taken = [mallopt(option, value) == 1 for option, value in ((_M_TRIM_THRESHOLD, 2**31 - 1), (_M_ARENA_MAX, 2))]
    return all(taken)


def give_back() -> None:
    """Give what is free to the kernel: of an image so large that its memory should not stay."""
    if tune():
        ctypes.CDLL(None).malloc_trim(0)
