"""The one place that decides how many threads run.

BLAS (behind ``@``) and the kernels are set together: two pools that each take all cores spend their
time waiting for each other.  The default is what the process may really use:
CPU affinity, a container's quota and ``XURA_NUM_THREADS``, whichever is least.
"""

import contextlib
import ctypes
import functools
import math
import os
import queue
import sys
import threading
from pathlib import Path

from xuracore.crew import BOX_WORDS, LEAVE, MOST_WORKERS, WATCHING
from xuracore.errors import ConfigError

_threads = None  # chosen by set_num_threads; None until then


def prepare_environment():
    """Set what must be set before Numba loads, in case a user's own function starts its OpenMP threads.

    GNU OpenMP workers spin after each parallel region and so take the core that BLAS needs next;
    ``OMP_WAIT_POLICY=passive`` makes them sleep.  What the user set stays; ``XURA_NO_ENV=1`` leaves the
    environment alone.
    """
    if os.environ.get("XURA_NO_ENV", "") != "1":
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


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


def parallel_allowed():
    """Whether a kernel may use several threads here: more than one is set, and this is not one of them."""
    return get_num_threads() > 1 and not hasattr(_this_thread, "works")


def run(calls):
    """Make ``calls``, each (function, arguments …), at the same time; the first one in the calling thread.

    For functions that release the GIL.  Handing over costs some 10 µs a call (:mod:`xuracore.crew` does it for
    less).  Returns when all have ended;
    then raises the error of the first that failed.  Calls made from within one are made in turn.
    """
    others = [_Job(call) for call in calls[1:]]
    if others and not hasattr(_this_thread, "works"):
        _start_workers(len(others))
        for job in others:
            _jobs.put(job)
        for box in range(_workers):
            _boxes[box * BOX_WORDS + LEAVE // 8] = 1
    first = _Job(calls[0])
    first.do()
    for job in others:
        if hasattr(_this_thread, "works"):
            job.do()
        job.done.acquire()
    for job in (first, *others):
        if job.error is not None:
            raise job.error


class _Job:
    __slots__ = ("call", "done", "error")

    def __init__(self, call):
        self.call, self.done, self.error = call, threading.Lock(), None
        self.done.acquire()

    def do(self):
        try:
            function, *arguments = self.call
            function(*arguments)
        except BaseException as error:
            self.error = error
        finally:
            self.call = None
            self.done.release()


_jobs, _workers, _workers_lock = queue.SimpleQueue(), 0, threading.Lock()
_boxes, _watch = None, None  # of the workers, and what they do with them
_native_ids = []  # of the workers
_this_thread = threading.local()  # has the attribute ``works`` in the threads that run() hands calls to


def _start_workers(wanted):
    global _workers, _boxes
    if _workers >= wanted:
        return
    with _workers_lock:
        _boxes = _boxes or (ctypes.c_int64 * (BOX_WORDS * available_cpus()))()
        while _workers < min(wanted, available_cpus()):
            arguments = _jobs, _boxes, _workers
            threading.Thread(target=_work, args=arguments, name=f"xura-{_workers}", daemon=True).start()
            _workers += 1


def _work(jobs, boxes, number):
    """Do what is asked for; in between look at the box for a while, then sleep."""
    _this_thread.works = True
    _native_ids.append(threading.get_native_id())
    box = number * BOX_WORDS
    while True:
        jobs.get().do()
        boxes[box + LEAVE // 8] = 0
        if _watch is not None and jobs.empty():
            boxes[box] = WATCHING
            _watch(ctypes.addressof(boxes) + 8 * box)


def watch_with(function):
    """Let workers watch their boxes between jobs with ``function(address of the box)``."""
    global _watch
    _watch = function


def boxes():
    """Address of the first worker's box, 0 if there is none."""
    return ctypes.addressof(_boxes) if _boxes else 0


def workers():
    """How many workers may share a task."""
    return min(_workers, MOST_WORKERS)


def spread():
    """Send the workers to other processors than the caller's.

    The system likes to wake a thread where its waker runs; there the two take turns, while the next processor
    is idle, until the system looks round, some milliseconds later.
    """
    with contextlib.suppress(OSError):
        everywhere = os.sched_getaffinity(0)
        elsewhere = everywhere - {ctypes.CDLL(None).sched_getcpu()}
        for worker in _native_ids:
            if elsewhere:
                os.sched_setaffinity(worker, elsewhere)
                os.sched_setaffinity(worker, everywhere)


_holding, _holding_lock, _blas_before = 0, threading.Lock(), ()  # blocks of one_blas_thread(), and what they set aside


def share(calls, work):
    """Make ``calls``, (function, arguments …) each, on the threads there are, with BLAS on one thread in each.

    For tasks that are chains of small matrix products and kernels: BLAS would split each small product
    instead.  Less than a few million scalar operations of ``work`` stay in the calling thread, and so do tasks
    so small that threads would mostly wait for the interpreter's lock.
    """
    worth = work >= max(SHARED_WORK, TASK_WORK * len(calls))
    workers = min(len(calls), get_num_threads()) if worth and parallel_allowed() else 1
    runs = [calls[i::workers] for i in range(max(1, workers))]
    with one_blas_thread():
        run([(_in_turn, each) for each in runs])


SHARED_WORK = 2_000_000  # handing tasks to another thread costs as much as a million products
TASK_WORK = 20_000_000  # of each task on average: milliseconds


def _in_turn(calls):
    for function, *arguments in calls:
        function(*arguments)


@contextlib.contextmanager
def one_blas_thread():
    """Inside, BLAS starts no threads of its own: the first of several blocks sets that, the last sets it back."""
    _hold_blas(1)
    try:
        yield
    finally:
        _hold_blas(-1)


def _hold_blas(step):
    global _holding, _blas_before
    with _holding_lock:
        if _holding == 0:
            _blas_before = [(setter, getter()) for getter, setter in _blas_functions()]
        _holding += step
        for setter, before in _blas_before:
            if before > 1:
                setter(1 if _holding else before)


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
    """A child starts with the forking thread alone: no workers, and nobody who holds these locks."""
    global _jobs, _workers, _boxes, _native_ids, _workers_lock, _holding, _holding_lock
    _jobs, _workers, _boxes, _native_ids = queue.SimpleQueue(), 0, None, []
    _workers_lock, _holding_lock, _holding = threading.Lock(), threading.Lock(), 0  # those who held it are not here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
