"""The allocator: glibc keeps freed megabytes for the next batch instead of giving every page back to the kernel.

Lance allocates each column of each batch with malloc. By default glibc maps blocks of megabytes anew each time, so
most of a scan's CPU time is page faults (tests/test_malloc.py counts them for plain blocks). The setting holds for the
whole process; GPULOAD_MALLOC=default leaves the allocator alone.
"""

from __future__ import annotations

import ctypes
import functools
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h


@functools.cache
def tune() -> bool:
    """Set glibc's thresholds once per process. False where it is not glibc or GPULOAD_MALLOC=default."""
    if os.environ.get("GPULOAD_MALLOC") == "default":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_THRESHOLD, 1 << 30), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_ARENA_MAX, 2))
    taken = [mallopt(option, value) == 1 for option, value in settings]
    return all(taken)
