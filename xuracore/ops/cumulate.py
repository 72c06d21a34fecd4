"""Running sums, products and their relatives along one axis.

Each gradient is a recurrence from the end, s[k] = g[k] + f[k+1] s[k+1], without divisions: it is right
where factors are 0.
"""

import numpy as np

from xuracore.errors import ShapeError
from xuracore.ops.registry import primitive


def _one_axis(name, axis):
    if axis is None:
        raise ShapeError(f"{name} runs along one axis; reshape(-1) first to go over all elements in order")


def _from_the_end(grad, factors, axis):
    """s with s[k] = grad[k] + factors[k] s[k+1] along ``axis``; ``factors`` has one element less."""
    s = np.array(grad)
    along, steps = np.moveaxis(s, axis, 0), np.moveaxis(factors, axis, 0)
    for k in range(len(steps) - 1, -1, -1):
        along[k] += steps[k] * along[k + 1]
    return s


def _part(x, axis, start, stop):
    """``x`` from ``start`` to ``stop`` along ``axis``."""
    return x[(slice(None),) * (axis % x.ndim) + (slice(start, stop),)]


def _samples(rng):
    yield (rng.standard_normal((3, 4)),), {"axis": 0}
    yield (rng.standard_normal((3, 4)),), {}
    yield (rng.standard_normal((4, 2, 3)).T,), {"axis": 1}
    yield (rng.standard_normal((1,)),), {}
    yield (rng.standard_normal((0, 3)),), {"axis": 0}


def _cumsum_forward(x, axis=-1):
    """Cumulative sum along one axis."""
    _one_axis("cumsum", axis)
    return x.cumsum(axis=axis), (axis,)


def _cumsum_vjp(grad, saved, needs):
    (axis,) = saved
    return (np.flip(np.flip(grad, axis).cumsum(axis=axis), axis),)


cumsum = primitive("cumsum", _cumsum_forward, _cumsum_vjp,
                   reference=lambda x, axis=-1: np.cumsum(x, axis=axis), samples=_samples)


def _cumprod_forward(x, axis=-1):
    """Cumulative product along one axis; gradients are right where factors are 0."""
    _one_axis("cumprod", axis)
    y = x.cumprod(axis=axis)
    return y, (x, y, axis)


def _cumprod_vjp(grad, saved, needs):
    x, y, axis = saved
    s = _from_the_end(grad, _part(x, axis, 1, None), axis)
    later = _part(s, axis, 1, None)  # a view: the first element is multiplied by nothing
    later *= _part(y, axis, None, -1)
    return (s,)


def _cumprod_samples(rng):
    yield from _samples(rng)
    x = rng.standard_normal((3, 5))
    x[0, 1] = x[1, 0] = x[1, 3] = x[2, 4] = 0
    yield (x,), {}


cumprod = primitive("cumprod", _cumprod_forward, _cumprod_vjp,
                    reference=lambda x, axis=-1: np.cumprod(x, axis=axis), samples=_cumprod_samples)


def _logcumsumexp_forward(x, axis=-1):
    """log of the cumulative sum of exp(x) along one axis, without overflow."""
    _one_axis("logcumsumexp", axis)
    y = np.logaddexp.accumulate(x, axis=axis)
    return y, (x, y, axis)


def _logcumsumexp_vjp(grad, saved, needs):
    """exp(x[k] - y[i]), summed over i ≥ k: each further step multiplies by exp(y[i-1] - y[i]) ≤ 1."""
    x, y, axis = saved
    y = np.where(y == -np.inf, y.dtype.type(0), y)  # nothing yet: x is -inf, and its share 0
    steps = np.exp(np.minimum(_part(y, axis, None, -1) - _part(y, axis, 1, None), 0))
    return (_from_the_end(grad, steps, axis) * np.exp(x - y),)


def _logcumsumexp_samples(rng):
    yield from _samples(rng)
    yield (np.array([[-700.0, 0.5, 300.0], [900.0, -900.0, -800.0]]),), {}


def _logcumsumexp_reference(x, axis=-1):
    top = x.max(axis=axis, keepdims=True, initial=-1e300)
    return np.logaddexp.accumulate(x - top, axis=axis) + top


logcumsumexp = primitive("logcumsumexp", _logcumsumexp_forward, _logcumsumexp_vjp,
                         reference=_logcumsumexp_reference, samples=_logcumsumexp_samples)


def _running_extreme(name, ufunc):
    def forward(x, axis=-1):
        _one_axis(name, axis)
        y = ufunc.accumulate(x, axis=axis)
        places = np.arange(x.shape[axis]).reshape((-1,) + (1,) * (x.ndim - 1 - axis % x.ndim))
        source = np.maximum.accumulate(np.where(x == y, places, 0), axis=axis)  # the latest extreme so far
        return y, (source, axis)

    def vjp(grad, saved, needs):
        source, axis = saved
        out = np.zeros_like(grad)
        to, given, index = (np.moveaxis(a, axis, 0) for a in (out, grad, source))
        place = np.ogrid[tuple(slice(n) for n in to.shape[1:])]
        for k in range(len(given)):
            to[(index[k], *place)] += given[k]  # within one step, no place occurs twice
        return (out,)

    forward.__doc__ = f"Cumulative {name[3:]}imum along one axis; of equal ones the latest gets the gradient."
    return primitive(name, forward, vjp, reference=lambda x, axis=-1: ufunc.accumulate(x, axis=axis),
                     samples=_samples)


cummax, cummin = _running_extreme("cummax", np.maximum), _running_extreme("cummin", np.minimum)
