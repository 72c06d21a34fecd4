"""Initialisers: pure functions ``(shape, rng, …, dtype=float32) -> array``.

The *fans* of a weight (out, in, *kernel) are in · kernel elements, which feed one output, and out · kernel,
which one input feeds; of a vector, both are its length.  A variance of 1/fan_in keeps the size of what
flows forward, 1/fan_out that of the gradients, and *gain* makes up for what an activation takes away.
"""

import contextlib
import contextvars
import math

import numpy as np

from xuracore.errors import ConfigError, ShapeError

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


def is_blank():
    """Whether :func:`blank` is in effect."""
    return _BLANK.get()


def zeros(shape, dtype=np.float32):
    """All zeros."""
    return np.zeros(shape, dtype)


def ones(shape, dtype=np.float32):
    """All ones."""
    return np.ones(shape, dtype)


def uniform(shape, rng, bound, dtype=np.float32):
    """Uniform in ±bound."""
    if _BLANK.get():
        return zeros(shape, dtype)
    return rng.uniform(-bound, bound, shape).astype(dtype)


def normal(shape, rng, std=0.02, dtype=np.float32):
    """Normal with the given standard deviation."""
    if _BLANK.get():
        return zeros(shape, dtype)
    return (rng.standard_normal(shape) * std).astype(dtype)


def truncated_normal(shape, rng, std=0.02, limit=2.0, dtype=np.float32):
    """Normal, redrawn outside ± ``limit`` standard deviations."""
    if not limit > 0:
        raise ConfigError(f"truncated_normal: limit={limit!r}; expected a number above 0")
    if _BLANK.get():
        return zeros(shape, dtype)
    x = rng.standard_normal(shape)
    while (outside := np.abs(x) > limit).any():
        x[outside] = rng.standard_normal(int(outside.sum()))
    return (x * std).astype(dtype)


def linear(shape, rng, gain=1.0, dtype=np.float32):
    """The usual default of a linear layer, weight (out, in): uniform in ±gain/√in."""
    return uniform(shape, rng, gain / math.sqrt(shape[-1]), dtype)


# ---------------------------------------------------------------------- by fan
def fans(shape):
    """(fan_in, fan_out) of a weight (out, in, *kernel), or of a vector.  Raises ShapeError for a single number."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if not shape:
        raise ShapeError("the fans of a single number are not defined; give a shape of one axis or more")
    if len(shape) == 1:
        return shape[0], shape[0]
    kernel = math.prod(shape[2:])
    return shape[1] * kernel, shape[0] * kernel


GAINS = {"linear": 1.0, "sigmoid": 1.0, "tanh": 5 / 3, "relu": math.sqrt(2)}


def gain(activation, slope=0.01):
    """What a layer before ``activation`` is to be multiplied by: 1 for "linear" and "sigmoid", 5/3 for "tanh",
    √2 for "relu", √(2/(1 + slope²)) for "leaky_relu" (He et al. 2015).  ConfigError for others.
    """
    if activation == "leaky_relu":
        return math.sqrt(2 / (1 + slope * slope))
    if activation not in GAINS:
        raise ConfigError(f"gain of {activation!r}; expected one of {', '.join(GAINS)}, leaky_relu")
    return GAINS[activation]


def xavier_uniform(shape, rng, gain=1.0, dtype=np.float32):
    """Uniform in ± gain √(6 / (fan_in + fan_out)) (Glorot & Bengio 2010, equation 16)."""
    return uniform(shape, rng, gain * math.sqrt(6 / max(1, sum(fans(shape)))), dtype)


def xavier_normal(shape, rng, gain=1.0, dtype=np.float32):
    """Normal with standard deviation gain √(2 / (fan_in + fan_out)) (Glorot & Bengio 2010)."""
    return normal(shape, rng, gain * math.sqrt(2 / max(1, sum(fans(shape)))), dtype)


def _one_fan(shape, mode):
    if mode not in ("fan_in", "fan_out"):
        raise ConfigError(f"mode={mode!r}; expected 'fan_in' or 'fan_out'")
    return max(1, fans(shape)[mode == "fan_out"])


def kaiming_uniform(shape, rng, slope=0.0, mode="fan_in", dtype=np.float32):
    """Uniform in ± √(6 / ((1 + slope²) fan)), for a leaky ReLU of that slope (He et al. 2015, equation 15)."""
    return uniform(shape, rng, gain("leaky_relu", slope) * math.sqrt(3 / _one_fan(shape, mode)), dtype)


def kaiming_normal(shape, rng, slope=0.0, mode="fan_in", dtype=np.float32):
    """Normal with standard deviation √(2 / ((1 + slope²) fan)) (He et al. 2015, equation 15)."""
    return normal(shape, rng, gain("leaky_relu", slope) / math.sqrt(_one_fan(shape, mode)), dtype)


def orthogonal(shape, rng, gain=1.0, dtype=np.float32):
    """gain times a random matrix (out, the rest) with orthonormal rows, or columns if those are fewer.

    Uniform over all such matrices (Saxe et al. 2014; the signs as in Mezzadri 2007).  ShapeError below two axes.
    """
    if isinstance(shape, int) or len(shape) < 2:
        raise ShapeError(f"orthogonal: shape {shape}; expected two axes or more")
    if _BLANK.get():
        return zeros(shape, dtype)
    rows, columns = shape[0], math.prod(shape[1:])
    q, r = np.linalg.qr(rng.standard_normal((max(rows, columns), min(rows, columns))))
    q = q * np.sign(np.diagonal(r))
    return (gain * (q.T if rows < columns else q)).reshape(shape).astype(dtype)


# ---------------------------------------------------------------------- of state-space models
def inverse_softplus_steps(count, rng, low=1e-3, high=0.1, floor=1e-4, dtype=np.float32):
    """Biases b (count) with softplus(b) log-uniform in [low, high], not below ``floor``.

    The start of the step size in Mamba-1, 2 and 3 (Gu & Dao 2023, §3.6): b = Δ + ln(-expm1(-Δ)).
    """
    step = np.exp(rng.random(count) * (math.log(high) - math.log(low)) + math.log(low)).clip(floor)
    return (step + np.log(-np.expm1(-step))).astype(dtype)
