"""Arithmetic, powers, comparisons of magnitude: one number at a time, with NumPy broadcasting.

The vjps return gradients of the broadcast shape; the tape sums them back (see ``unbroadcast``).
"""

import numpy as np

from xuracore.ops.functions import samples_between
from xuracore.ops.registry import primitive


def _pairs(rng, positive=False):
    """Sample pairs: equal shapes, broadcasting both ways, size 1, empty, 0-d, non-contiguous."""
    def draw(*shape):
        x = rng.standard_normal(shape)
        return np.asarray(np.abs(x) + 0.5 if positive else x + np.sign(x) * 0.3)

    yield (draw(3, 4), draw(3, 4)), {}
    yield (draw(2, 1, 3), draw(4, 1)), {}
    yield (draw(1), draw(2, 3)), {}
    yield (draw(0, 3), draw(3)), {}
    yield (draw(), draw()), {}
    yield (draw(4, 3).T, draw(3, 4)), {}


# ---------------------------------------------------------------------- a + b, a - b, a * b, a / b
def _add_forward(a, b):
    """a + b."""
    return a + b, ()


def _add_vjp(grad, saved, needs):
    return grad, grad


add = primitive("add", _add_forward, _add_vjp, reference=np.add, samples=_pairs, weak=True)


def _subtract_forward(a, b):
    """a - b."""
    return a - b, ()


def _subtract_vjp(grad, saved, needs):
    return grad, -grad if needs[1] else None


subtract = primitive("subtract", _subtract_forward, _subtract_vjp, reference=np.subtract,
                     samples=_pairs, weak=True)


def _multiply_forward(a, b):
    """a · b, element by element."""
    return a * b, (a, b)


def _multiply_vjp(grad, saved, needs):
    a, b = saved
    return grad * b if needs[0] else None, grad * a if needs[1] else None


multiply = primitive("multiply", _multiply_forward, _multiply_vjp, reference=np.multiply,
                     samples=_pairs, weak=True)


def _divide_forward(a, b):
    """a / b, element by element."""
    y = a / b
    return y, (b, y)


def _divide_vjp(grad, saved, needs):
    b, y = saved
    scaled = grad / b
    return scaled, -scaled * y if needs[1] else None


divide = primitive("divide", _divide_forward, _divide_vjp, reference=np.divide, samples=_pairs, weak=True)


# ---------------------------------------------------------------------- -a, |a|, a**b
def _negative_forward(a):
    """-a."""
    return -a, ()


def _negative_vjp(grad, saved, needs):
    return (-grad,)


negative = primitive("negative", _negative_forward, _negative_vjp, reference=np.negative,
                     samples=samples_between(-2, 2))


def _absolute_forward(a):
    """Absolute value; the gradient at 0 is 0."""
    return np.abs(a), (a,)


def _absolute_vjp(grad, saved, needs):
    return (grad * np.sign(saved[0]),)


absolute = primitive("absolute", _absolute_forward, _absolute_vjp, reference=np.abs, samples=samples_between(0.1, 2))


def _power_forward(a, b):
    """a to the power b.

    Where b = 0 the gradient with respect to a is 0, and where a = 0 that with respect to b: not NaN.
    """
    y = a**b
    return y, (a, b, y)


def _power_vjp(grad, saved, needs):
    a, b, y = saved
    to_base = to_exponent = None
    if needs[0]:
        to_base = grad * _power_slope(a, b)
    if needs[1]:
        to_exponent = grad * y * np.log(np.where(a == 0, 1, a).astype(y.dtype))
    return to_base, to_exponent


def _power_slope(a, b):
    """b a^(b - 1), and 0 where b = 0: at a = 0 the formula would be 0 · ∞."""
    if isinstance(b, np.ndarray):
        return b * a ** np.where(b == 0, b, b - 1)
    return b * a ** (b - 1) if b else 0.0


power = primitive("power", _power_forward, _power_vjp, reference=np.power,
                  samples=lambda rng: _pairs(rng, positive=True), weak=True)


# ---------------------------------------------------------------------- exp, log, sqrt, sin, cos
def _exp_forward(x):
    """e to the power x."""
    y = np.exp(x)
    return y, (y,)


def _exp_vjp(grad, saved, needs):
    return (grad * saved[0],)


exp = primitive("exp", _exp_forward, _exp_vjp, reference=np.exp, samples=samples_between(-3, 3))


def _expm1_forward(x):
    """exp(x) - 1 without cancellation near 0."""
    y = np.expm1(x)
    return y, (y,)


def _expm1_vjp(grad, saved, needs):
    return (grad * (saved[0] + 1),)


expm1 = primitive("expm1", _expm1_forward, _expm1_vjp, reference=np.expm1, samples=samples_between(-3, 3))


def _log_forward(x):
    """Natural logarithm."""
    return np.log(x), (x,)


def _log_vjp(grad, saved, needs):
    return (grad / saved[0],)


log = primitive("log", _log_forward, _log_vjp, reference=np.log, samples=samples_between(0.2, 4))


def _log1p_forward(x):
    """log(1 + x) without cancellation near 0."""
    return np.log1p(x), (x,)


def _log1p_vjp(grad, saved, needs):
    return (grad / (1 + saved[0]),)


log1p = primitive("log1p", _log1p_forward, _log1p_vjp, reference=np.log1p, samples=samples_between(-0.5, 4))


def _sqrt_forward(x):
    """Square root; its gradient at 0 is infinite."""
    y = np.sqrt(x)
    return y, (y,)


def _sqrt_vjp(grad, saved, needs):
    return (grad * 0.5 / saved[0],)


sqrt = primitive("sqrt", _sqrt_forward, _sqrt_vjp, reference=np.sqrt, samples=samples_between(0.2, 4))


def _sin_forward(x):
    """Sine of an angle in radians."""
    return np.sin(x), (x,)


def _sin_vjp(grad, saved, needs):
    return (grad * np.cos(saved[0]),)


sin = primitive("sin", _sin_forward, _sin_vjp, reference=np.sin, samples=samples_between(-3, 3))


def _cos_forward(x):
    """Cosine of an angle in radians."""
    return np.cos(x), (x,)


def _cos_vjp(grad, saved, needs):
    return (-grad * np.sin(saved[0]),)


cos = primitive("cos", _cos_forward, _cos_vjp, reference=np.cos, samples=samples_between(-3, 3))


# ---------------------------------------------------------------------- max, min, where, clip
def _maximum_forward(a, b):
    """Larger of two; where they are equal each gets half the gradient."""
    return np.maximum(a, b), (a, b)


def _maximum_vjp(grad, saved, needs):
    a, b = saved
    share = _share(a, b, grad.dtype)
    return grad * share, grad * (1 - share)


def _share(a, b, dtype):
    """1 where a > b, 0 where a < b, one half where they are equal."""
    return ((a > b).astype(dtype) + (a >= b).astype(dtype)) * dtype.type(0.5)


maximum = primitive("maximum", _maximum_forward, _maximum_vjp, reference=np.maximum,
                    samples=_pairs, weak=True)


def _minimum_forward(a, b):
    """Smaller of two; where they are equal each gets half the gradient."""
    return np.minimum(a, b), (a, b)


def _minimum_vjp(grad, saved, needs):
    a, b = saved
    share = _share(b, a, grad.dtype)
    return grad * share, grad * (1 - share)


minimum = primitive("minimum", _minimum_forward, _minimum_vjp, reference=np.minimum,
                    samples=_pairs, weak=True)


def _where_forward(condition, a, b):
    """``a`` where ``condition`` (boolean array) holds, else ``b``."""
    return np.where(condition, a, b), (np.asarray(condition),)


def _where_vjp(grad, saved, needs):
    (condition,) = saved
    zero = grad.dtype.type(0)
    return (
        None,
        np.where(condition, grad, zero) if needs[1] else None,
        np.where(condition, zero, grad) if needs[2] else None,
    )


def _where_samples(rng):
    for (a, b), _ in _pairs(rng):
        yield (np.asarray(rng.random(np.broadcast_shapes(a.shape, b.shape)) < 0.5), a, b), {}


where = primitive("where", _where_forward, _where_vjp, reference=np.where, samples=_where_samples, weak=True)


def _clip_forward(x, low=None, high=None):
    """Limit to [low, high]; outside, the gradient is 0.  ``low``, ``high`` are numbers or None."""
    low, high = (None if limit is None else float(limit) for limit in (low, high))  # np.float64 would widen x
    return np.clip(x, low, high), (x, low, high)


def _clip_vjp(grad, saved, needs):
    x, low, high = saved
    inside = np.ones(x.shape, bool)
    if low is not None:
        inside &= x >= low
    if high is not None:
        inside &= x <= high
    return (grad * inside,)


def _clip_samples(rng):
    for (x,), _ in samples_between(-3, 3)(rng):
        x[np.abs(np.abs(x) - 1) < 0.05] += 0.2
        yield (x,), {"low": -1.0, "high": 1.0}
        yield (x,), {"low": None, "high": 1.0}


clip = primitive("clip", _clip_forward, _clip_vjp, reference=lambda x, low, high: np.clip(x, low, high),
                 samples=_clip_samples)


def hardtanh(x, low=-1.0, high=1.0):
    """:func:`clip` to [low, high], as an activation."""
    return clip(x, low=low, high=high)


def masked_fill(x, mask, value):
    """``x`` with ``value`` where ``mask`` (boolean, broadcastable) holds; no gradient flows there."""
    return where(mask, value, x)


def _nan_to_num_forward(x, nan=0.0, posinf=None, neginf=None):
    """Finite numbers for NaN and ±∞ (None: the largest of the dtype); no gradient flows there."""
    return np.nan_to_num(x, nan=nan, posinf=posinf, neginf=neginf), (np.isfinite(x),)


def _nan_to_num_vjp(grad, saved, needs):
    return (np.where(saved[0], grad, grad.dtype.type(0)),)


def _nan_to_num_samples(rng):
    yield from samples_between(-2, 2)(rng)
    yield (np.array([1.0, np.nan, np.inf, -np.inf]),), {"nan": 2.0, "posinf": 3.0, "neginf": -4.0}


nan_to_num = primitive("nan_to_num", _nan_to_num_forward, _nan_to_num_vjp, samples=_nan_to_num_samples,
                       reference=lambda x, nan=0.0, posinf=None, neginf=None: np.nan_to_num(
                           x, nan=nan, posinf=posinf, neginf=neginf))


# ---------------------------------------------------------------------- more of two numbers
def _atan2_forward(a, b):
    """The angle of the point (b, a), in [-π, π]: atan(a / b) in the right quadrant."""
    return np.arctan2(a, b), (a, b)


def _atan2_vjp(grad, saved, needs):
    a, b = saved
    scaled = grad / (a * a + b * b)
    return scaled * b, -scaled * a if needs[1] else None


atan2 = primitive("atan2", _atan2_forward, _atan2_vjp, reference=np.arctan2, samples=_pairs, weak=True)


def _logaddexp_forward(a, b):
    """log(eᵃ + eᵇ), without overflow."""
    y = np.logaddexp(a, b)
    return y, (a, b, y)


def _logaddexp_vjp(grad, saved, needs):
    a, b, y = saved
    finite = np.where(y == -np.inf, y.dtype.type(0), y)  # of -inf and -inf, each has gradient 0
    to_a = grad * np.exp(np.minimum(a - finite, 0)) if needs[0] else None
    return to_a, grad * np.exp(np.minimum(b - finite, 0)) if needs[1] else None


logaddexp = primitive("logaddexp", _logaddexp_forward, _logaddexp_vjp, reference=np.logaddexp, samples=_pairs,
                      weak=True)


def _remainder_forward(a, b):
    """a - b ⌊a / b⌋: what is left of a, with the sign of b."""
    return np.remainder(a, b), (a, b)


def _remainder_vjp(grad, saved, needs):
    a, b = saved
    return grad, -grad * np.floor_divide(a, b) if needs[1] else None


def _remainder_samples(rng):
    for (a, b), attributes in _pairs(rng):
        whole = rng.integers(-3, 3, np.broadcast_shapes(a.shape, b.shape))
        yield (np.asarray((whole + rng.uniform(0.1, 0.9, np.shape(whole))) * b), b), attributes


remainder = primitive("remainder", _remainder_forward, _remainder_vjp, reference=np.remainder,
                      samples=_remainder_samples, weak=True)


def _lerp_forward(a, b, weight):
    """a + weight (b - a): a where ``weight`` is 0, b where it is 1."""
    return a + weight * (b - a), (a, b, weight)


def _lerp_vjp(grad, saved, needs):
    a, b, weight = saved
    to_b = grad * weight
    return grad - to_b, to_b, grad * (b - a) if needs[2] else None


def _lerp_samples(rng):
    for (a, b), attributes in _pairs(rng):
        yield (a, b, np.asarray(rng.random(b.shape))), attributes


lerp = primitive("lerp", _lerp_forward, _lerp_vjp, samples=_lerp_samples, weak=True,
                 reference=lambda a, b, weight: (1 - weight) * a + weight * b)
