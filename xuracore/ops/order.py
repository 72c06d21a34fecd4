"""Sorting, and what follows from it."""

import numpy as np

from xuracore.errors import ShapeError
from xuracore.ops.index import take_along_axis
from xuracore.ops.registry import primitive
from xuracore.tensor import Tensor


def _order(x, axis, descending):
    """Places of the elements in order; equal ones stay in the order they are in."""
    if not descending:
        return np.argsort(x, axis=axis, kind="stable")
    flipped = np.flip(x, axis)
    return x.shape[axis] - 1 - np.flip(np.argsort(flipped, axis=axis, kind="stable"), axis)


def _sort_forward(x, axis=-1, descending=False):
    """Elements in order along one axis; equal ones keep their order, and their gradients."""
    order = _order(x, axis, descending)
    return np.take_along_axis(x, order, axis), (order, axis)


def _sort_vjp(grad, saved, needs):
    order, axis = saved
    out = np.empty_like(grad)
    np.put_along_axis(out, order, grad, axis)
    return (out,)


def _sort_reference(x, axis=-1, descending=False):
    y = np.sort(x, axis=axis)
    return np.flip(y, axis) if descending else y


def _sort_samples(rng):
    yield (rng.standard_normal((3, 4)),), {}
    yield (rng.standard_normal((3, 2, 4)),), {"axis": 0, "descending": True}
    yield (rng.standard_normal((4, 3)).T,), {"axis": 1}
    yield (rng.standard_normal(1),), {}
    yield (rng.standard_normal((0, 2)),), {"axis": 0}


sort = primitive("sort", _sort_forward, _sort_vjp, reference=_sort_reference, samples=_sort_samples)


def argsort(x, axis=-1, descending=False):
    """Places of the elements in order along one axis; an array of integers.  Equal ones keep their order."""
    return _order(x.data if isinstance(x, Tensor) else np.asarray(x), axis, descending)


def topk(x, k, axis=-1, largest=True):
    """The ``k`` largest (or smallest) along one axis, in order, and their places → (values, array of integers).

    Of equal ones the earlier comes first.  Raises ShapeError if there are not ``k``.
    """
    count = x.shape[axis]
    if not 0 <= k <= count:
        raise ShapeError(f"topk of {k} along axis {axis} of shape {tuple(x.shape)}, which has {count}")
    places = argsort(x, axis, descending=largest)
    places = places[(slice(None),) * (axis % x.ndim) + (slice(k),)]
    return take_along_axis(x, places, axis=axis), places


def median(x, axis=-1, keepdims=False):
    """The middle element along one axis; the mean of the middle two if there is an even number."""
    ordered, count = sort(x, axis=axis), x.shape[axis]
    before = (slice(None),) * (axis % x.ndim)
    middle = ordered[(*before, slice((count - 1) // 2, count // 2 + 1))]
    return middle.mean(axis=axis, keepdims=keepdims)
