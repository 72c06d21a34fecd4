"""Lets the C library keep memory that arrays gave back, for the next arrays.

By default glibc returns freed memory to the kernel once a few megabytes lie at the end of the heap.  Arrays of
that size are then mapped, filled with zeros and unmapped in every call of an op: SiLU of 800 000 numbers takes
2 ms where the arithmetic takes 0.25.
"""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names and numbers of <malloc.h>
KEPT = 256 << 20  # bytes that may lie free at the end of the heap
MAPPED = 32 << 20  # arrays from here on are mapped one by one; the largest value glibc accepts


def keep_freed_memory():
    """Set both limits; returns whether it was done.

    Not outside Linux, without glibc, with ``XURA_NO_ENV=1``, or where the user set limits of their own
    (``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``, ``GLIBC_TUNABLES``).
    """
    own = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
    if not sys.platform.startswith("linux") or os.environ.get("XURA_NO_ENV", "") == "1":
        return False
    library = ctypes.CDLL(None)
    if any(name in os.environ for name in own) or not hasattr(library, "gnu_get_libc_version"):
        return False
    return bool(library.mallopt(M_TRIM_THRESHOLD, KEPT) and library.mallopt(M_MMAP_THRESHOLD, MAPPED))
