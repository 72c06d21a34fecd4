"""Initialisers: pure functions ``(shape, rng, …) -> float32 array``."""

import contextlib
import contextvars
import math

import numpy as np

_BLANK = contextvars.ContextVar("xura_blank_init", default=False)


@contextlib.contextmanager
def blank():
    """Inside, large random arrays are left zero: for modules whose weights are about to be read.

    Zeros take no time, and no memory until they are written.
    """
    token = _BLANK.set(True)
    try:
        yield
    finally:
        _BLANK.reset(token)


def zeros(shape):
    """All zeros."""
    return np.zeros(shape, np.float32)


def ones(shape):
    """All ones."""
    return np.ones(shape, np.float32)


def uniform(shape, rng, bound):
    """Uniform in ±bound."""
    if _BLANK.get():
        return zeros(shape)
    return rng.uniform(-bound, bound, shape).astype(np.float32)


def normal(shape, rng, std=0.02):
    """Normal with the given standard deviation."""
    if _BLANK.get():
        return zeros(shape)
    return (rng.standard_normal(shape) * std).astype(np.float32)


def truncated_normal(shape, rng, std=0.02, limit=2.0):
    """Normal, redrawn outside ± ``limit`` standard deviations."""
    if _BLANK.get():
        return zeros(shape)
    x = rng.standard_normal(shape)
    while (outside := np.abs(x) > limit).any():
        x[outside] = rng.standard_normal(int(outside.sum()))
    return (x * std).astype(np.float32)


def linear(shape, rng, gain=1.0):
    """The usual default of a linear layer, weight (out, in): uniform in ±gain/√in."""
    return uniform(shape, rng, gain / math.sqrt(shape[-1]))


def inverse_softplus_steps(count, rng, low=1e-3, high=0.1, floor=1e-4):
    """Biases b (count) with softplus(b) log-uniform in [low, high], not below ``floor``.

    The start of the step size in Mamba-1, 2 and 3 (Gu & Dao 2023, §3.6): b = Δ + ln(-expm1(-Δ)).
    """
    step = np.exp(rng.random(count) * (math.log(high) - math.log(low)) + math.log(low)).clip(floor)
    return (step + np.log(-np.expm1(-step))).astype(np.float32)
