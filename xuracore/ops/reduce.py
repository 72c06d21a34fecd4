"""Sums, products, means, norms, extremes and their relatives along axes.

``axis`` is None (all), an integer or a tuple; ``keepdims`` as in NumPy.
"""

import math

import numpy as np

from xuracore.errors import ConfigError
from xuracore.ops.registry import primitive
from xuracore.tensor import Tensor

FLOAT32 = np.dtype(np.float32)


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
    if axis is None and not keepdims and x.dtype is FLOAT32:  # into an array: a NumPy number would become one later
        return np.add.reduce(x, None, None, np.empty((), FLOAT32)), (x.shape, None, False)
    return np.add.reduce(x, axis, keepdims=keepdims), (x.shape, axis, keepdims)  # what x.sum calls in the end


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


# ---------------------------------------------------------------------- standard deviation, norm, product
def _std_forward(x, axis=None, keepdims=False, correction=0):
    """Standard deviation over ``axis``, see :func:`var`; where it is 0, so is the gradient."""
    centred = x - x.mean(axis=axis, keepdims=True)
    y = x.std(axis=axis, keepdims=keepdims, ddof=correction)
    return y, (centred, y, axis, keepdims, x.size / (np.size(y) or 1) - correction)


def _std_vjp(grad, saved, needs):
    centred, y, axis, keepdims, count = saved
    share = grad / np.where(y == 0, np.inf, y * (count if count > 0 else math.nan)).astype(grad.dtype)
    return (_spread(share, centred.shape, axis, keepdims) * centred,)


std = primitive("std", _std_forward, _std_vjp,
                reference=lambda x, axis=None, keepdims=False, correction=0:
                    np.std(x, axis=axis, keepdims=keepdims, ddof=correction),
                samples=lambda rng: ((x, {**a, "correction": c}) for c in (0, 1)
                                     for x, a in _samples(rng, False) if x[0].ndim))


def _norm_forward(x, axis=None, keepdims=False, order=2.0):
    """(Σ |x|ᵖ)^(1/p) with p = ``order`` > 0, or the largest |x| if that is inf; where it is 0, so is the gradient.

    Raises ConfigError for an order that is not positive.
    """
    if not order > 0:
        raise ConfigError(f"norm: order={order!r}; expected a number above 0, or math.inf")
    size = np.abs(x)
    if order == 2:
        y = np.sqrt((x * x).sum(axis=axis, keepdims=True))
    elif order == math.inf:
        y = size.max(axis=axis, keepdims=True, initial=0)
    else:
        y = (size**order).sum(axis=axis, keepdims=True) ** (1 / order)
    flat = y if keepdims else y.reshape(_reduced(x.shape, axis))
    return flat, (x, y, axis, keepdims, order)


def _norm_vjp(grad, saved, needs):
    x, y, axis, keepdims, order = saved
    spread = _spread(grad, x.shape, axis, keepdims)
    safe = np.where(y == 0, y.dtype.type(1), y)
    if order == 2:
        return (spread * (x / safe),)
    if order == math.inf:
        hit = (np.abs(x) == y) & (y != 0)
        count = np.maximum(hit.sum(axis=axis, keepdims=True), 1).astype(grad.dtype)
        return (spread / count * np.sign(x) * hit,)
    ratio = np.abs(x) / safe
    if order < 1:  # the slope at 0 is infinite; 0 is the one number that keeps it usable
        ratio = np.where(x == 0, x.dtype.type(1), ratio)
    return (spread * np.sign(x) * ratio ** (order - 1),)


def _norm_reference(x, axis=None, keepdims=False, order=2.0):
    size = np.abs(x)
    if order == math.inf:
        return size.max(axis=axis, keepdims=keepdims)
    return (size**order).sum(axis=axis, keepdims=keepdims) ** (1 / order)


def _norm_samples(rng):
    for (x,), attributes in _samples(rng):
        yield (x,), attributes
    for order in (1.0, 3.5, math.inf):
        x = rng.standard_normal((4, 3)).T
        yield (x + 0.1 * np.sign(x),), {"axis": 1, "keepdims": order == 1, "order": order}


norm = primitive("norm", _norm_forward, _norm_vjp, reference=_norm_reference, samples=_norm_samples)


def _prod_forward(x, axis=None, keepdims=False):
    """Product over ``axis``; gradients are right where factors are 0."""
    return x.prod(axis=axis, keepdims=keepdims), (x, axis, keepdims)


def _prod_vjp(grad, saved, needs):
    """The product of all other factors: of those before times that of those after."""
    x, axis, keepdims = saved
    spread = _spread(grad, x.shape, axis, keepdims)
    axes = tuple(range(x.ndim)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    axes = [a % x.ndim for a in axes]
    order = [a for a in range(x.ndim) if a not in axes] + axes
    moved = x.transpose(order)
    count = math.prod(moved.shape[x.ndim - len(axes) :])
    factors = moved.reshape(math.prod(moved.shape[: x.ndim - len(axes)]), count)
    before, after = np.ones_like(factors), np.ones_like(factors)
    factors[:, :-1].cumprod(axis=1, out=before[:, 1:])
    factors[:, :0:-1].cumprod(axis=1, out=after[:, -2::-1] if count > 1 else after[:, :0])
    others = (before * after).reshape(moved.shape).transpose(np.argsort(order))
    return (spread * others,)


def _prod_samples(rng):
    yield from _samples(rng)
    for zeros in (1, 2):
        x = rng.standard_normal((3, 4))
        x[1, :zeros] = 0
        yield (x,), {"axis": 1}
    yield (rng.standard_normal((2, 1)),), {"axis": -1}


prod = primitive("prod", _prod_forward, _prod_vjp, reference=np.prod, samples=_prod_samples)


# ---------------------------------------------------------------------- places and truths: arrays, off the tape
amax, amin = max, min


def _off_tape(function, explanation):
    def call(x, axis=None, keepdims=False):
        return function(x.data if isinstance(x, Tensor) else x, axis=axis, keepdims=keepdims)

    call.__name__ = call.__qualname__ = function.__name__
    call.__doc__ = f"{explanation}, of a Tensor or array; an array, off the tape."
    return call


argmax = _off_tape(np.argmax, "Place of the first largest element along ``axis`` (None: in the flat order)")
argmin = _off_tape(np.argmin, "Place of the first smallest element along ``axis`` (None: in the flat order)")
any = _off_tape(np.any, "Whether any element along ``axis`` is not 0")
all = _off_tape(np.all, "Whether all elements along ``axis`` are not 0")
