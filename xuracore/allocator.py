"""How arrays lie in memory: what they gave back is kept for the next ones, and weights lie on huge pages.

By default glibc returns freed memory to the kernel once a few megabytes lie at the end of the heap.  Arrays of
that size are then mapped, filled with zeros and unmapped in every call of an op: SiLU of 800 000 numbers takes
2 ms where the arithmetic takes 0.25.
"""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names and numbers of <malloc.h>
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # of <sys/mman.h>
HUGE = 2 << 20  # bytes of a huge page
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


def lay_on_huge_pages(arrays):
    """Move the memory of large ``arrays`` onto huge pages, in place; returns how many arrays that was done for.

    Who reads all weights for each token otherwise looks up an address for every 4 kB: a third of the time of a
    product on one thread.  NumPy asks for huge pages from 4 MB on, and only for new memory.  Needs Linux 6.1;
    elsewhere, and with ``XURA_NO_ENV=1``, nothing happens.
    """
    if not sys.platform.startswith("linux") or os.environ.get("XURA_NO_ENV", "") == "1":
        return 0
    advise, done = ctypes.CDLL(None).madvise, 0
    for array in arrays:
        start, stop = array.ctypes.data // HUGE * HUGE, -(-(array.ctypes.data + array.nbytes) // HUGE) * HUGE
        if array.nbytes >= HUGE // 4:  # neighbours on the same page gain as well
            span = ctypes.c_void_p(start), ctypes.c_size_t(stop - start)
            advise(*span, MADV_HUGEPAGE)
            done += advise(*span, MADV_COLLAPSE) == 0
    return done
