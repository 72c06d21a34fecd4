"""Gives OpenBLAS the widest vectors the processor has, where its own detection missed them.

OpenBLAS chooses its kernels by processor model.  A model newer than the library (AMD Zen 5 with the OpenBLAS
of NumPy 2.4: OpenMathLib/OpenBLAS#6029) falls back to AVX2, and every matrix product takes 1.7 times as
long as with the AVX-512 kernels that lie in the same library.  ``OPENBLAS_CORETYPE`` chooses by hand; what is
set there stays.
"""

import contextlib
import ctypes
import os
import sys
import threading
from pathlib import Path

NEEDED = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}  # what the SkylakeX kernels use
NARROW = {"Haswell", "Zen", "Excavator"}  # the AVX2 sets


def libraries(maps=Path("/proc/self/maps")):
    """Paths of the OpenBLAS libraries this process has loaded; empty outside Linux."""
    if not sys.platform.startswith("linux"):
        return []
    lines = maps.read_text().splitlines()
    return list(dict.fromkeys(line.split(maxsplit=5)[-1] for line in lines if "openblas" in line))


def has_avx512(cpuinfo=Path("/proc/cpuinfo")):
    """Whether the first processor listed has every instruction set in ``NEEDED``."""
    with contextlib.suppress(OSError), cpuinfo.open() as lines:
        for line in lines:
            if line.startswith("flags"):
                return set(line.split()) >= NEEDED
    return False


def core_name(path):
    """The kernel set a loaded OpenBLAS uses (``Haswell``, ``SkylakeX`` …), or None if it does not say."""
    library = ctypes.PyDLL(path)
    for name in ("scipy_openblas_get_corename64_", "openblas_get_corename64_", "openblas_get_corename"):
        if hasattr(library, name):
            function = getattr(library, name)
            function.restype = ctypes.c_char_p
            return function().decode()
    return None


def widen():
    """Move each OpenBLAS from its AVX2 kernels to its AVX-512 ones, if both sides have them.

    Between the two calls no product may run, so nothing is done once a second Python thread exists.  Nor is
    it with ``OPENBLAS_CORETYPE`` or ``XURA_NO_ENV=1``.  Returns the paths that were changed.
    """
    if os.environ.get("OPENBLAS_CORETYPE") or os.environ.get("XURA_NO_ENV", "") == "1":
        return []
    if threading.active_count() > 1 or not has_avx512():
        return []
    changed = []
    for path in libraries():
        library = ctypes.PyDLL(path)
        parts = ("gotoblas_dynamic_quit", "gotoblas_dynamic_init", "gotoblas_SKYLAKEX")
        if core_name(path) in NARROW and all(hasattr(library, name) for name in parts):
            os.environ["OPENBLAS_CORETYPE"] = "SkylakeX"  # read by init, in this call only
            try:
                library.gotoblas_dynamic_quit()
                library.gotoblas_dynamic_init()
            finally:
                del os.environ["OPENBLAS_CORETYPE"]
            changed.append(path)
    return changed
