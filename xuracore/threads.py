"""The one place that decides how many threads run.

BLAS (behind ``@``) and Numba's parallel kernels are set together: two pools that each take all
cores spend their time waiting for each other.  The default is what the process may really use:
CPU affinity, a container's quota and ``XURA_NUM_THREADS``, whichever is least.
"""

import ctypes
import functools
import math
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from xuracore.errors import ConfigError

_threads = None  # chosen by set_num_threads; None until then
_numba = None  # set once Numba is loaded
_pool, _pool_lock = None, threading.Lock()
_forked = False  # True in a forked child, where an OpenMP pool does not survive


def prepare_environment():
    """Set what must be set before Numba loads its OpenMP layer.

    GNU OpenMP workers spin after each parallel region and so take the core that BLAS needs next;
    ``OMP_WAIT_POLICY=passive`` makes them sleep.  ``XURA_NO_ENV=1`` leaves the environment alone.
    """
    if os.environ.get("XURA_NO_ENV", "") != "1":
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def apply_to_numba(numba):
    """Give Numba our thread count; called once by :mod:`xuracore.jit` after the import."""
    global _numba
    _numba = numba
    numba.set_num_threads(min(get_num_threads(), numba.config.NUMBA_NUM_THREADS))


@functools.cache
def available_cpus():
    """CPUs this process may use: affinity, limited by a cgroup quota (rounded up)."""
    count = _affinity()
    return max(1, min(count, _cgroup_quota() or count))


def _affinity():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cgroup_quota(root=Path("/sys/fs/cgroup")):
    """Whole CPUs granted by cgroup v2 ``cpu.max`` or v1 ``cfs_quota_us``, or None if unlimited."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
        return None if quota == "max" else math.ceil(int(quota) / int(period))
    except (OSError, ValueError):
        pass
    try:
        quota = int((root / "cpu" / "cpu.cfs_quota_us").read_text())
        period = int((root / "cpu" / "cpu.cfs_period_us").read_text())
        return math.ceil(quota / period) if quota > 0 else None
    except (OSError, ValueError):
        return None


def get_num_threads():
    """Threads that BLAS and the kernels use."""
    return _threads or _default_threads()


@functools.cache
def _default_threads():
    asked = os.environ.get("XURA_NUM_THREADS")
    if not asked:
        return available_cpus()
    if not asked.isdigit() or int(asked) < 1:
        raise ConfigError(f"XURA_NUM_THREADS={asked!r}; expected a whole number of at least 1")
    return min(int(asked), available_cpus())


def hold_blas_to_default():
    """Give BLAS the default too, where that is less than BLAS would take; called when xuracore is imported.

    Only XURA_NUM_THREADS or a container's quota make it less.  This must come before the first product:
    other threads split it otherwise, and a resumed training run would differ in the last bit.
    """
    asked = os.environ.get("XURA_NUM_THREADS", "")
    if asked.isdigit() and int(asked) or available_cpus() < _affinity():
        for _, setter in _blas_functions():
            setter(get_num_threads())


def set_num_threads(count):
    """Use ``count`` threads in BLAS and in the kernels (at least 1; capped by what exists)."""
    global _threads
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ConfigError(f"number of threads is {count!r}; expected a whole number of at least 1")
    _threads = min(count, available_cpus())
    for _, setter in _blas_functions():
        setter(_threads)
    if _numba is not None:
        _numba.set_num_threads(min(_threads, _numba.config.NUMBA_NUM_THREADS))


def parallel_allowed():
    """Whether a parallel kernel may start its pool here: several threads, not a forked child."""
    return not _forked and get_num_threads() > 1


def pool():
    """The Python threads that kernels hand runs of tasks to; a forked child makes its own."""
    global _pool
    if _pool is None:
        with _pool_lock:
            if _pool is None:
                _pool = ThreadPoolExecutor(max(1, available_cpus() - 1), thread_name_prefix="xura")
    return _pool


_sharing, _sharing_lock, _blas_before = 0, threading.Lock(), ()  # calls of share() under way, and what they set aside


def share(calls, work):
    """Make ``calls``, (function, arguments …) each, on the threads there are, with BLAS on one thread in each.

    For tasks that are chains of small matrix products and kernels: BLAS would split each small product
    instead.  Less than a few million scalar operations of ``work`` stay in the calling thread.
    """
    workers = min(len(calls), get_num_threads()) if work >= SHARED_WORK and parallel_allowed() else 1
    runs = [calls[i::workers] for i in range(workers)]
    _hold_blas(1)
    try:
        others = [pool().submit(_in_turn, run) for run in runs[1:]]
        try:
            _in_turn(runs[0])
        finally:
            for other in others:
                other.result()
    finally:
        _hold_blas(-1)


SHARED_WORK = 2_000_000  # handing tasks to another thread costs as much as a million products


def _in_turn(calls):
    for function, *arguments in calls:
        function(*arguments)


def _hold_blas(step):
    """Count the callers that need BLAS on one thread: the first sets it, the last sets it back."""
    global _sharing, _blas_before
    with _sharing_lock:
        if _sharing == 0:
            _blas_before = [(setter, getter()) for getter, setter in _blas_functions()]
        _sharing += step
        for setter, before in _blas_before:
            if before > 1:
                setter(1 if _sharing else before)


def blas_is_controlled():
    """Whether :func:`set_num_threads` reaches the BLAS that NumPy uses."""
    return bool(_blas_functions())


def blas_threads():
    """Threads that BLAS uses at present, or None if it cannot be asked."""
    return next((getter() for getter, _ in _blas_functions()), None)


@functools.cache
def _blas_functions():
    """(getter, setter) of the thread count of each OpenBLAS that NumPy loaded; empty for other libraries."""
    import numpy  # noqa: F401  (loads its BLAS)

    if not sys.platform.startswith("linux"):
        return ()
    names = ("scipy_openblas_{}_num_threads64_", "openblas_{}_num_threads64_", "openblas_{}_num_threads")
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = dict.fromkeys(line.split(maxsplit=5)[-1] for line in lines if "openblas" in line)
    found = []
    for path in paths:
        library = ctypes.CDLL(path)
        name = next((name for name in names if hasattr(library, name.format("set"))), None)
        if name is not None:
            found.append((getattr(library, name.format("get")), getattr(library, name.format("set"))))
    return tuple(found)


def _after_fork():
    global _forked, _pool, _pool_lock, _sharing_lock
    _forked, _pool, _pool_lock, _sharing_lock = True, None, threading.Lock(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
