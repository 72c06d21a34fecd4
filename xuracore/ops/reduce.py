"""Sums, means, extremes and their relatives along axes.

``axis`` is None (all), an integer or a tuple; ``keepdims`` as in NumPy.
"""

import math

import numpy as np

from xuracore.errors import ShapeError
from xuracore.ops.registry import primitive


def _spread(grad, shape, axis, keepdims):
    """``grad`` of a reduction, with the reduced axes back as size 1."""
    if axis is None:
        return grad.reshape((1,) * len(shape))
    if keepdims:
        return grad
    axes = axis if isinstance(axis, tuple) else (axis,)
    kept = list(shape)
    for a in axes:
        kept[a] = 1
    return grad.reshape(kept)


def _filled(grad, shape):
    """``grad`` repeated to ``shape``, in memory of its own."""
    out = np.empty(shape, grad.dtype)
    out[...] = grad
    return out


def _samples(rng, empty=True):
    yield (rng.standard_normal((3, 4)),), {}
    yield (rng.standard_normal((2, 3, 4)),), {"axis": 1}
    yield (rng.standard_normal((2, 3, 4)),), {"axis": (0, -1), "keepdims": True}
    yield (rng.standard_normal((4, 3)).T,), {"axis": -1, "keepdims": True}
    yield (np.asarray(rng.standard_normal()),), {}
    if empty:
        yield (rng.standard_normal((0, 3)),), {"axis": 1}


def _sum_forward(x, axis=None, keepdims=False):
    """Sum over ``axis``."""
    return x.sum(axis=axis, keepdims=keepdims), (x.shape, axis, keepdims)


def _sum_vjp(grad, saved, needs):
    shape, axis, keepdims = saved
    return (_filled(_spread(grad, shape, axis, keepdims), shape),)


sum = primitive("sum", _sum_forward, _sum_vjp, reference=np.sum, samples=_samples)


def _mean_forward(x, axis=None, keepdims=False):
    """Mean over ``axis``."""
    y = x.mean(axis=axis, keepdims=keepdims)
    return y, (x.shape, axis, keepdims, x.size / (np.size(y) or 1))


def _mean_vjp(grad, saved, needs):
    shape, axis, keepdims, count = saved
    return (_filled(_spread(grad, shape, axis, keepdims) / (count or 1), shape),)


mean = primitive("mean", _mean_forward, _mean_vjp, reference=np.mean, samples=_samples)


def _var_forward(x, axis=None, keepdims=False, correction=0):
    """Variance over ``axis``, divided by count - correction (0: biased, 1: unbiased)."""
    centred = x - x.mean(axis=axis, keepdims=True)
    y = x.var(axis=axis, keepdims=keepdims, ddof=correction)
    return y, (centred, axis, keepdims, x.size / (np.size(y) or 1) - correction)


def _var_vjp(grad, saved, needs):
    centred, axis, keepdims, count = saved
    return (_spread(grad, centred.shape, axis, keepdims) * centred * (2 / count if count > 0 else math.nan),)


var = primitive("var", _var_forward, _var_vjp,
                reference=lambda x, axis=None, keepdims=False, correction=0:
                    np.var(x, axis=axis, keepdims=keepdims, ddof=correction),
                samples=lambda rng: ((x, {**a, "correction": c}) for c in (0, 1)
                                     for x, a in _samples(rng, False) if x[0].ndim))


def _extreme(name, pick):
    def forward(x, axis=None, keepdims=False):
        y = pick(x, axis=axis, keepdims=True)
        hit = x == y
        flat = y if keepdims else y.reshape(_reduced(x.shape, axis))
        return flat, (hit, axis, keepdims)

    def vjp(grad, saved, needs):
        hit, axis, keepdims = saved
        share = hit / hit.sum(axis=axis, keepdims=True).astype(grad.dtype)
        return (_spread(grad, hit.shape, axis, keepdims) * share.astype(grad.dtype),)

    forward.__doc__ = f"{name.capitalize()}imum over ``axis``; equal extremes share the gradient."
    return primitive(name, forward, vjp, reference=pick, samples=lambda rng: _samples(rng, False))


def _reduced(shape, axis):
    if axis is None:
        return ()
    axes = {a % len(shape) for a in (axis if isinstance(axis, tuple) else (axis,))}
    return tuple(n for i, n in enumerate(shape) if i not in axes)


max = _extreme("max", np.max)
min = _extreme("min", np.min)


def _logsumexp_forward(x, axis=-1, keepdims=False):
    """log(sum(exp(x))) over ``axis``, without overflow; of nothing but -inf it is -inf, with gradient 0."""
    top = x.max(axis=axis, keepdims=True)
    top = np.where(np.isfinite(top), top, x.dtype.type(0))
    e = np.exp(x - top)
    total = e.sum(axis=axis, keepdims=True)
    y = np.where(total > 0, np.log(np.where(total > 0, total, 1)) + top, top.dtype.type(-np.inf))
    return (y if keepdims else y.reshape(_reduced(x.shape, axis))), (e, total, axis, keepdims)


def _logsumexp_vjp(grad, saved, needs):
    e, total, axis, keepdims = saved
    return (_spread(grad, e.shape, axis, keepdims) * (e / np.where(total == 0, 1, total)),)


def _logsumexp_samples(rng):
    for (x,), attributes in _samples(rng, False):
        yield (x,), {"axis": -1 if x.ndim else None, **attributes}
    yield (np.array([[-np.inf, 0.5], [1.5, -np.inf]]),), {"axis": 0}


logsumexp = primitive("logsumexp", _logsumexp_forward, _logsumexp_vjp,
                      reference=lambda x, axis=-1, keepdims=False: np.log(
                          np.exp(x).sum(axis=axis, keepdims=keepdims)),
                      samples=_logsumexp_samples)


def _cumsum_forward(x, axis=-1):
    """Cumulative sum along one axis."""
    if axis is None:
        raise ShapeError("cumsum runs along one axis; reshape(-1) first to sum over all elements in order")
    return x.cumsum(axis=axis), (axis,)


def _cumsum_vjp(grad, saved, needs):
    (axis,) = saved
    return (np.flip(np.flip(grad, axis).cumsum(axis=axis), axis),)


def _cumsum_samples(rng):
    yield (rng.standard_normal((3, 4)),), {"axis": 0}
    yield (rng.standard_normal((3, 4)),), {}
    yield (rng.standard_normal((1,)),), {}


cumsum = primitive("cumsum", _cumsum_forward, _cumsum_vjp,
                   reference=lambda x, axis=-1: np.cumsum(x, axis=axis), samples=_cumsum_samples)
