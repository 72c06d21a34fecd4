"""Compile every kernel before it is needed: ``python -m xuracore warmup``.

The samples of the op registry, in float32, are sent forward and backward through every op; kernels
behind no op have a sample here.
"""

import importlib
import pkgutil
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


def _mamba1_step():
    width, inner, size, rank = 8, 32, 2, 1
    mixed = rank + 2 * size
    return (
        _single(1, width), _single(width), 1e-5, _single(2 * inner, width), _NO_SCALES, _single(2 * inner),
        _single(inner, 4), _single(inner), _single(mixed, inner), _NO_SCALES, _single(inner, rank), _NO_SCALES,
        _single(inner), _single(inner, size), _single(inner), _single(width, inner), _NO_SCALES, _single(width),
        -1.0, 1, _single(1, 3, inner), _single(1, inner, size), _single(1, 3, inner), _single(1, inner, size),
    )  # fmt: skip


def _mamba2_step():
    width, heads, headdim, size = 8, 2, 16, 4
    inner = heads * headdim
    channels = inner + 2 * size
    rows = inner + channels + heads
    return (
        _single(1, width), _single(width), 1e-5, _single(rows, width), _NO_SCALES, _single(rows),
        _single(channels, 4), _single(channels), _single(heads), 0.0, 1.0, _single(heads), _single(heads, 1), 1, 0,
        _single(inner), 1e-5, _single(width, inner), _NO_SCALES, _single(width), 1, _single(1, 3, channels),
        _single(1, heads, headdim, size), _single(1, 3, channels), _single(1, heads, headdim, size),
    )  # fmt: skip


SAMPLES = {  # of kernels that no op calls
    "adamw_update": _adamw, "sum_of_squares": _sum_of_squares, "gemv": _gemv, "mamba1_step": _mamba1_step,
    "mamba2_step": _mamba2_step,
}  # fmt: skip


def warm_up(report=None):
    """Compile all kernels for float32, or load them from the cache.

    Returns a list of ``(kernel, how, seconds)`` in the order of compilation, how being ``compiled`` or
    ``cached``; empty where the NumPy twins run.  Seconds are those of the build.  ``report`` is called
    with each such tuple as soon as there is one.  An interruption loses only the kernel at hand: what was
    compiled before is in the cache.
    """
    load_kernels()
    if jit.backend() == "numpy":
        return []
    before = told = len(jit.FIRST_CALLS)
    for _ in _samples():
        for first_call in jit.FIRST_CALLS[told:] if report else ():
            report(first_call)
        told = len(jit.FIRST_CALLS)
    return jit.FIRST_CALLS[before:]


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


def _run_samples():
    for _ in _samples():
        pass


def _samples():
    """Run each sample; yields after each."""
    for kernel in jit.KERNELS:
        if kernel.__name__ in SAMPLES:
            kernel(*SAMPLES[kernel.__name__]())
            yield
    with warnings.catch_warnings(), np.errstate(all="ignore"):  # samples visit the edges on purpose
        warnings.simplefilter("ignore")
        for record in ops.REGISTRY.values():
            for inputs, attributes in record.samples(np.random.default_rng(0)):
                _forward_and_backward(record, [_in_single(x) for x in inputs], attributes)
                yield


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
