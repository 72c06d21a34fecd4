"""Compile every kernel before it is needed: ``python -m xuracore warmup``.

The samples of the op registry, in float32, are sent forward and backward through every op; kernels
behind no op have a sample here.  Each kernel that has a parallel build is compiled in both builds.
"""

import importlib
import pkgutil
import warnings

import numpy as np

from xuracore import jit, kernels, ops, threads


def _adamw():
    return *(np.ones(8, np.float32) for _ in range(4)), 1e-3, 0.9, 0.999, 1e-8, 0.01, 0.1, 0.001


def _sum_of_squares():
    return np.ones(8, np.float32), np.zeros(1)


SAMPLES = {"adamw_update": _adamw, "sum_of_squares": _sum_of_squares}  # kernels that no op calls


def warm_up():
    """Compile all kernels for float32, or load them from the cache.

    Returns a list of ``(kernel, build, seconds)`` in the order of compilation, build being ``serial`` or
    ``parallel``; empty where the NumPy twins run.  Seconds are those of the first call.
    """
    load_kernels()
    if jit.backend() == "numpy":
        return []
    before = len(jit.FIRST_CALLS)
    _run_samples()
    return jit.FIRST_CALLS[before:]


def load_kernels():
    """Import every module of :mod:`xuracore.kernels`; return the names of the kernels."""
    for module in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"{kernels.__name__}.{module.name}")
    return [kernel.__name__ for kernel in jit.KERNELS]


def _run_samples():
    for kernel in jit.KERNELS:
        if kernel.__name__ in SAMPLES:
            kernel(*SAMPLES[kernel.__name__]())
    with warnings.catch_warnings(), np.errstate(all="ignore"):  # samples visit the edges on purpose
        warnings.simplefilter("ignore")
        for record in ops.REGISTRY.values():
            for inputs, attributes in record.samples(np.random.default_rng(0)):
                _forward_and_backward(record, [_single(x) for x in inputs], attributes)


def _single(x):
    x = np.asarray(x) if isinstance(x, (float, np.generic, list)) else x
    return x.astype(np.float32) if isinstance(x, np.ndarray) and x.dtype == np.float64 else x


def _forward_and_backward(record, inputs, attributes):
    output, saved = record.forward(*inputs, **attributes)
    needs = [isinstance(x, np.ndarray) and x.dtype.kind == "f" for x in inputs]
    if record.outputs > 1:
        grad = tuple(np.ones_like(part) for part in output)
    else:
        grad = np.ones_like(output)
    if any(needs):
        record.vjp(grad, saved, needs)
