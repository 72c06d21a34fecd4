"""Compile every kernel before it is needed: ``python -m xuracore warmup``.

The samples of the op registry, in float32, are sent forward and backward through every op; kernels
behind no op have a sample here.
"""

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import queue
import signal
import subprocess
import sys
import threading
import types
import warnings

import numpy as np

from xuracore import jit, kernels, ops


def _single(*shape, fill=1.0):
    return np.full(shape, fill, np.float32)


def _adamw():
    return *(_single(8) for _ in range(4)), 1e-3, 0.9, 0.999, 1e-8, 0.01, 0.1, 0.001


def _sum_of_squares():
    return _single(8), np.zeros(1)


_NO_SCALES = np.empty((0, 0, 0), np.uint16)  # float32 weights have none


def _gemv():
    return _single(32, 8), _NO_SCALES, _single(32), _single(1, 8), 1, _single(1, 32)


def _mamba1(batch=1, width=8, inner=32, size=2, rank=1, tasks=1):
    """Arguments of mamba1_project and of mamba1_scan."""
    gate, u = _single(batch, inner), _single(batch, inner)
    project = (
        _single(batch, width), _single(width), 1e-5, _single(2 * inner, width), _NO_SCALES, _single(2 * inner),
        _single(inner, 4), _single(inner), _single(batch, 3, inner), gate, u, tasks,
    )  # fmt: skip
    scan = (
        _single(batch, rank + 2 * size), -1.0, _single(inner, rank), _NO_SCALES, _single(inner), _single(inner, size),
        _single(inner), gate, u, _single(batch, inner, size), tasks,
    )  # fmt: skip
    return project, scan


def _mamba2(batch=1, width=8, heads=2, headdim=16, size=4, tasks=1):
    """Arguments of mamba2_project and of mamba2_scan."""
    inner = heads * headdim
    channels = inner + 2 * size
    rows = inner + channels + heads
    gate, u, steps = _single(batch, inner), _single(batch, channels), _single(batch, heads)
    project = (
        _single(batch, width), _single(width), 1e-5, _single(rows, width), _NO_SCALES, _single(rows),
        _single(channels, 4), _single(channels), _single(heads), 0.0, 1.0, _single(batch, 3, channels),
        gate, u, steps, tasks,
    )  # fmt: skip
    scan = (
        u, steps, _single(heads), _single(heads, 1), 1, 0, gate, _single(inner),
        _single(batch, heads, headdim, size), _single(batch, inner), _single(tasks, batch),
    )  # fmt: skip
    return project, scan


def _mamba3(batch=1, heads=2, headdim=4, size=4, turns=1):
    """Arguments of mamba3_scan."""
    inner, each, key = heads * headdim, _single(heads, 1, headdim), _single(heads, 1, size)
    state = _single(batch, heads, turns), _single(batch, heads, headdim, size), _single(batch, 1, heads, size)
    return (
        _single(batch, 2 * inner + 2 * size + 3 * heads + turns), _single(heads), 0, 1e-4, -1.0, _single(size),
        _single(size), 1e-5, key, key, 0, _single(heads), each, each, each, _single(inner), -1.0, 1,
        *state, _single(batch, heads, headdim), _single(batch, inner), 1,
    )  # fmt: skip


def _project():
    return _single(1, 8), _single(8), 1e-5, _single(32, 8), _NO_SCALES, _single(32), 1, _single(1, 32)


def _residual():
    return _single(1, 8), _single(1, 32), _single(1, 1), 1, 32, 1e-5, _single(8, 32), _NO_SCALES, _single(8), 1


SAMPLES = {  # of kernels that no op calls
    "adamw_update": _adamw, "sum_of_squares": _sum_of_squares, "gemv": _gemv,
    "mamba1_project": lambda: _mamba1()[0], "mamba1_scan": lambda: _mamba1()[1],
    "mamba2_project": lambda: _mamba2()[0], "mamba2_scan": lambda: _mamba2()[1],
    "mamba3_scan": _mamba3, "project": _project, "residual": _residual,
}  # fmt: skip


def warm_up(report=None, processes=1):
    """Compile all kernels for float32, or load them from the cache.

    Returns a list of ``(kernel, how, seconds)`` in the order of compilation, how being ``compiled`` or
    ``cached``; empty where the NumPy twins run.  Seconds are those of the build.  ``report`` is called
    with each such tuple as soon as there is one.  An interruption loses only the kernel at hand: what was
    compiled before is in the cache.

    processes : how many may compile at once.  Others than this one are started when the cache is found to
        lack a kernel; what they have built is then loaded here, which shows that it is whole.
    """
    load_kernels()
    if jit.backend() == "numpy":
        return []
    builds, seen = [], set()

    def note(first_call):
        name, how, _ = first_call
        if how != "cached" or name not in seen:  # a build of another process is read here once more
            builds.append(first_call)
            seen.add(name)
            if report:
                report(first_call)

    units = _units()
    may_share = processes > 1 and jit.backend() == "numba" and jit.cache_directory() is not None
    while units:
        first_calls = _run(units.pop())
        for each in first_calls:
            note(each)
        if may_share and any(how == "compiled" for _, how, _ in first_calls):
            may_share = False
            _with_workers(units, min(processes, len(units)) - 1, note)
    return builds


def _with_workers(units, count, note):
    """Compile ``units``, the first one first, here and in ``count`` other processes; empties the list."""
    workers, lock, built = [], threading.Lock(), queue.SimpleQueue()

    def note_all(first_calls):
        with lock:
            for each in first_calls:
                note(tuple(each))

    def serve(worker):
        unit = None
        with contextlib.suppress(IndexError, OSError, ValueError):  # nothing left, or the worker has died
            while True:
                unit = units.pop(0)
                worker.stdin.write(unit + "\n")
                worker.stdin.flush()
                note_all(json.loads(worker.stdout.readline()))
                built.put(unit)
                unit = None
        built.put(unit)
        built.put(_NO_MORE)

    try:
        for _ in range(count):
            workers.append(_forked() if _may_fork() else _started())
        for worker in workers:
            threading.Thread(target=serve, args=(worker,), daemon=True).start()
        with contextlib.suppress(IndexError):
            while True:
                note_all(_run(units.pop(0)))
        for _ in workers:  # what they have built is loaded, and what they have not is built, before they are missed
            for unit in iter(built.get, _NO_MORE):
                note_all(_run(unit) if unit else [])
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
            with contextlib.suppress(OSError):  # what a dead worker did not read
                worker.stdin.close()
            worker.stdout.close()


_NO_MORE = object()


def _may_fork():
    """A copy of this process has Numba loaded; one that had several threads could be copied at a bad moment."""
    return sys.platform == "linux" and threading.active_count() == 1


def _forked():
    """A worker that is a copy of this process."""
    (tasks, stdin), (stdout, answers) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(stdin)  # so that a parent that dies is the end of the tasks
            os.close(stdout)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            _work(open(tasks), open(answers, "w"))
        finally:
            os._exit(0)  # at once: what the parent has not written yet is not for this process to write
    os.close(tasks)
    os.close(answers)
    return types.SimpleNamespace(
        stdin=open(stdin, "w"), stdout=open(stdout), kill=lambda: os.kill(child, signal.SIGKILL),
        wait=lambda: os.waitpid(child, 0),
    )  # fmt: skip


def _started():
    """A worker that is a fresh process."""
    command = [sys.executable, "-c", "from xuracore import warmup; warmup.load_kernels(); warmup._work()"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def _work(tasks=sys.stdin, answers=sys.stdout):
    """Read names of units, run them, and answer each with its first calls as a line of JSON."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started this ends it
    for line in tasks:
        print(json.dumps(_run(line.strip())), file=answers, flush=True)


def clear():
    """Remove the compiled kernels of this installation from the cache; returns how many files that were."""
    load_kernels()
    directories = {jit.cache_directory(kernel) for kernel in jit.KERNELS}
    files = [file for each in directories if each for file in each.glob("*.nb[ci]")]
    for file in files:
        file.unlink(missing_ok=True)
    return len(files)


def load_kernels():
    """Import every module of :mod:`xuracore.kernels`; return the names of the kernels."""
    for module in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"{kernels.__name__}.{module.name}")
    return [kernel.__name__ for kernel in jit.KERNELS]


LONGEST = (
    "scan", "ssd", "linear_state", "mamba3_scan", "normalize", "mamba1_scan", "mamba2_project", "mamba1_project",
    "mamba2_scan", "convolve", "losses", "activation", "project", "attention",
)  # fmt: skip


def _units():
    """Names of what is run in one go, what compiles longest first: a kernel with a sample, or a module of ops."""
    modules = dict.fromkeys(_module(record) for record in ops.REGISTRY.values())
    units = [kernel.__name__ for kernel in jit.KERNELS if kernel.__name__ in SAMPLES] + list(modules)
    return sorted(units, key=lambda unit: LONGEST.index(unit) if unit in LONGEST else len(LONGEST))


def _module(record):
    """The module of an op; two that share kernels count as one, so that no two processes compile the same."""
    name = record.forward.__module__.rpartition(".")[2]
    return "ssd" if name == "trapezoid" else name


def _run_samples():
    for unit in _units():
        _run(unit)


def _run(unit):
    """Run the samples of one unit; returns the first calls that this led to."""
    before, collecting = len(jit.FIRST_CALLS), gc.isenabled()
    gc.disable()  # compiling makes many objects that stay: looking through them is an eighth of the time
    try:
        for kernel in jit.KERNELS:
            if kernel.__name__ == unit and unit in SAMPLES:
                kernel(*SAMPLES[unit]())
        with warnings.catch_warnings(), np.errstate(all="ignore"):  # samples visit the edges on purpose
            warnings.simplefilter("ignore")
            for record in ops.REGISTRY.values():
                if _module(record) == unit:
                    for inputs, attributes in record.samples(np.random.default_rng(0)):
                        _forward_and_backward(record, [_in_single(x) for x in inputs], attributes)
    finally:
        if collecting:
            gc.enable()
    return jit.FIRST_CALLS[before:]


def _in_single(x):
    x = np.asarray(x) if isinstance(x, (float, np.generic, list)) else x
    narrow = {np.dtype(np.float64): np.float32, np.dtype(np.complex128): np.complex64}
    return x.astype(narrow[x.dtype]) if isinstance(x, np.ndarray) and x.dtype in narrow else x


def _forward_and_backward(record, inputs, attributes):
    output, saved = record.forward(*inputs, **attributes)
    needs = [isinstance(x, np.ndarray) and x.dtype.kind == "f" for x in inputs]
    if record.outputs > 1:
        grad = tuple(np.ones_like(part) for part in output)
    else:
        grad = np.ones_like(output)
    if any(needs):
        record.vjp(grad, saved, needs)
