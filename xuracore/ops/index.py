"""Selecting elements: slices, integer and boolean arrays, rows of a table."""

import math

import numpy as np

from xuracore.errors import DTypeError, ShapeError
from xuracore.kernels.scatter import scatter_add_rows
from xuracore.ops.arrays import contiguous
from xuracore.ops.registry import primitive
from xuracore.tensor import Tensor


def _is_basic(key):
    parts = key if isinstance(key, tuple) else (key,)
    return all(p is None or p is Ellipsis or isinstance(p, (int, slice, np.integer)) for p in parts)


def _getitem_forward(x, key):
    """``x[key]`` with any NumPy index; elements picked several times add up their gradients."""
    return x[key], (x.shape, key)


def _getitem_vjp(grad, saved, needs):
    shape, key = saved
    out = np.zeros(shape, grad.dtype)
    if _is_basic(key) or isinstance(key, np.ndarray) and key.dtype == bool:
        out[key] = grad  # no element is picked twice
    elif isinstance(key, np.ndarray) and key.dtype.kind in "iu":
        _add_rows(out, key, 1, grad)
    else:
        positions, axes = _positions(shape, key)
        _add_rows(out, positions, axes, grad)
    return (out,)


def _add_rows(out, positions, axes, grad):
    """out[p] += grad for each of ``positions`` in the flat order of the first ``axes`` axes of ``out``.

    ``numpy.add.at`` is a hundred times slower.
    """
    count, width = math.prod(out.shape[:axes]), math.prod(out.shape[axes:])
    if positions.size and width:
        index = (positions.reshape(-1) % count).astype(np.int64)  # negative ones count from the end
        rows = contiguous(grad).reshape(index.size, width)
        scatter_add_rows(index, rows, out.reshape(count, width))


def _positions(shape, key):
    """What ``key`` picks, as positions in the flat order of the axes it speaks of, and how many those are."""
    parts = key if isinstance(key, tuple) else (key,)
    while parts and (parts[-1] is Ellipsis or isinstance(parts[-1], slice) and parts[-1] == slice(None)):
        parts = parts[:-1]
    axes = len(shape)
    if not any(part is Ellipsis for part in parts):
        axes = sum(map(_axes_of, parts))
    return np.arange(math.prod(shape[:axes])).reshape(shape[:axes])[parts], axes


def _axes_of(part):
    """How many axes one part of a key speaks of."""
    if part is None:
        return 0
    if isinstance(part, (list, np.ndarray, np.generic, bool)):
        part = np.asarray(part)
        return part.ndim if part.dtype == bool else 1
    return 1


def _getitem_samples(rng):
    x = rng.standard_normal((4, 5))
    yield (x,), {"key": (slice(1, 3), slice(None, None, 2))}
    yield (x,), {"key": 2}
    yield (x,), {"key": (Ellipsis, None, -1)}
    yield (x,), {"key": np.array([0, 2, 2])}
    yield (rng.standard_normal((3, 2, 2)),), {"key": np.array([[0, -1], [2, -3]])}
    yield (x[0],), {"key": np.array([3, 3, -1])}
    yield (x,), {"key": np.zeros(0, int)}
    yield (x,), {"key": [1, 1]}
    yield (x,), {"key": (np.array([0, 1, 0]), np.array([4, 4, 4]))}
    yield (x,), {"key": x > 0}
    yield (x,), {"key": (slice(1, None), [0, 0, 3])}
    y = rng.standard_normal((3, 2, 4))
    yield (y,), {"key": (np.array([0, 0]), slice(None), np.array([[1], [1]]))}
    yield (y,), {"key": (Ellipsis, np.array([3, -1]))}
    yield (y,), {"key": (None, np.array([True, False, True]), 1, Ellipsis)}
    yield (y,), {"key": (y[:, :, 0] > 0, slice(None))}
    yield (x,), {"key": slice(0, 0)}


getitem = primitive("getitem", _getitem_forward, _getitem_vjp, reference=lambda x, key: x[key],
                    samples=_getitem_samples)


def plain_key(key):
    """The key with Tensors in it replaced by their arrays."""
    if isinstance(key, tuple):
        return tuple(part.data if isinstance(part, Tensor) else part for part in key)
    return key.data if isinstance(key, Tensor) else key


def _embedding_forward(table, ids):
    """Rows of ``table`` (V, D) for integer ``ids`` of any shape → ids.shape + (D,).

    Raises DTypeError for ids that are not integers, IndexError naming the offending id.
    """
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu":
        raise DTypeError(f"ids are {ids.dtype}; expected an integer array")
    if ids.size and not (0 <= ids.min() and ids.max() < len(table)):
        bad = ids.min() if ids.min() < 0 else ids.max()
        raise IndexError(f"id {bad} is outside the table of {len(table)} rows")
    return table[ids], (table.shape, ids)


def _embedding_vjp(grad, saved, needs):
    shape, ids = saved
    if not needs[0]:
        return None, None
    out = np.zeros(shape, grad.dtype)
    rows = contiguous(grad.reshape(-1, shape[1]))
    scatter_add_rows(ids.reshape(-1).astype(np.int64), rows, out)
    return out, None


def _embedding_samples(rng):
    yield (rng.standard_normal((6, 3)), np.array([[0, 5, 5], [2, 0, 1]])), {}
    yield (rng.standard_normal((2, 3)), np.zeros((0,), int)), {}


embedding = primitive("embedding", _embedding_forward, _embedding_vjp, reference=lambda t, i: t[i],
                      samples=_embedding_samples)


# ---------------------------------------------------------------------- along one axis
def _integers(name, index):
    index = np.asarray(index.data if isinstance(index, Tensor) else index)
    if index.dtype.kind not in "iu":
        raise DTypeError(f"{name}: the index is {index.dtype}; expected integers")
    return index


def take(x, index, axis=0):
    """``x`` with its ``axis`` replaced by the elements at ``index`` (integers of any shape)."""
    return _pick(x, (slice(None),) * (axis % x.ndim) + (_integers("take", index),))


def _pick(x, key):
    return getitem(x, key=key) if isinstance(x, Tensor) else np.asarray(x)[key]


def index_select(x, index, axis=0):
    """:func:`take` with a one-dimensional index.  Raises ShapeError for another."""
    index = _integers("index_select", index)
    if index.ndim != 1:
        raise ShapeError(f"index_select: the index has shape {index.shape}; expected one axis (see take)")
    return take(x, index, axis)


def _along(name, shape, index, axis):
    """Flat positions in an array of ``shape`` of ``index`` along ``axis``, each in its own row and column."""
    index = _integers(name, index)
    if index.ndim != len(shape):
        raise ShapeError(f"{name}: the index has shape {index.shape}, the array {shape}; expected as many axes")
    try:
        return np.take_along_axis(np.arange(math.prod(shape)).reshape(shape), index, axis)
    except ValueError:
        raise ShapeError(f"{name}: an index of shape {index.shape} does not fit {shape} along {axis}") from None


def _take_along_axis_forward(x, index, axis=-1):
    """y[i, j, …] = x[index[i, j, …], j, …] for ``axis`` 0, and so on; the other axes broadcast.

    Raises DTypeError for an index that is not of integers, ShapeError if it does not fit.
    """
    positions = _along("take_along_axis", x.shape, index, axis)
    return x.reshape(-1)[positions], (x.shape, positions)


def _take_along_axis_vjp(grad, saved, needs):
    shape, positions = saved
    out = np.zeros(shape, grad.dtype)
    _add_rows(out, positions, len(shape), grad)
    return out, None


def _take_along_axis_samples(rng):
    yield (rng.standard_normal((3, 4)), np.array([[0, 0], [3, -1], [1, 2]])), {}
    yield (rng.standard_normal((4, 3)).T, np.array([[2, 0, 2, 1]])), {"axis": 0}
    yield (rng.standard_normal((2, 3, 2)), np.array([[[1], [1]]])), {"axis": 1}
    yield (rng.standard_normal((2, 3)), np.zeros((2, 0), int)), {}


take_along_axis = primitive("take_along_axis", _take_along_axis_forward, _take_along_axis_vjp,
                            reference=lambda x, index, axis=-1: np.take_along_axis(x, index, axis),
                            samples=_take_along_axis_samples)


def gather(x, index, axis=-1):
    """:func:`take_along_axis` for an index that may be smaller than ``x`` along the other axes: it is not
    broadcast, but meets the first elements there."""
    index = _integers("gather", index)
    whole = [m if i == axis % x.ndim else n for i, (n, m) in enumerate(zip(index.shape, x.shape))]
    if index.ndim != x.ndim or any(n > m for n, m in zip(whole, x.shape)):
        raise ShapeError(f"gather: an index of shape {index.shape} does not fit {tuple(x.shape)} along {axis}")
    key = tuple(map(slice, whole))
    return take_along_axis(_pick(x, key), index, axis=axis)


def _scatter_add_forward(x, index, source, axis=-1):
    """A copy of ``x`` with y[index[i, j, …], j, …] += source[i, j, …] for ``axis`` 0, and so on.

    index, source : one shape, which fits ``x`` along the other axes.  Raises DTypeError, ShapeError.
    """
    positions = _along("scatter_add", x.shape, index, axis)
    if positions.shape != np.shape(source):
        raise ShapeError(f"scatter_add: index {positions.shape} and source {np.shape(source)}; expected one shape")
    y = np.array(x, order="C")
    _add_rows(y, positions, x.ndim, source.astype(y.dtype, copy=False))
    return y, (positions,)


def _scatter_add_vjp(grad, saved, needs):
    return grad, None, grad.reshape(-1)[saved[0]] if needs[2] else None


def _scatter_add_reference(x, index, source, axis=-1):
    y = np.array(x)
    place = list(np.indices(source.shape))
    place[axis] = index
    np.add.at(y, tuple(place), source)
    return y


def _scatter_add_samples(rng):
    for (x, index), attributes in _take_along_axis_samples(rng):
        shape = np.take_along_axis(x, index, attributes.get("axis", -1)).shape
        index = np.array(np.broadcast_to(index, shape))
        yield (x, index, rng.standard_normal(shape)), attributes


scatter_add = primitive("scatter_add", _scatter_add_forward, _scatter_add_vjp,
                        reference=_scatter_add_reference, samples=_scatter_add_samples)


def _index_add_forward(x, index, source):
    """A copy of ``x`` (N, …) with y[index[i]] += source[i]: sums of rows by group.

    index (n,) integers; source (n, …).  Raises DTypeError, ShapeError, IndexError.
    """
    index = _integers("index_add", index)
    if index.ndim != 1 or np.shape(source) != (len(index), *x.shape[1:]):
        raise ShapeError(f"index_add: x {x.shape}, index {index.shape}, source {np.shape(source)} do not fit")
    if index.size and not (-len(x) <= index.min() and index.max() < len(x)):
        raise IndexError(f"index_add: index {index.min()}..{index.max()}, but x has {len(x)} rows")
    y = np.array(x, order="C")
    _add_rows(y, index, 1, source.astype(y.dtype, copy=False))
    return y, (index,)


def _index_add_vjp(grad, saved, needs):
    return grad, None, grad[saved[0]] if needs[2] else None


def _index_add_reference(x, index, source):
    y = np.array(x)
    np.add.at(y, index, source)
    return y


def _index_add_samples(rng):
    yield (rng.standard_normal((4, 2)), np.array([0, 3, 3, -1]), rng.standard_normal((4, 2))), {}
    yield (rng.standard_normal(3), np.array([1, 1]), rng.standard_normal(2)), {}
    yield (rng.standard_normal((2, 3)).T, np.zeros(0, int), rng.standard_normal((0, 2))), {}


index_add = primitive("index_add", _index_add_forward, _index_add_vjp, reference=_index_add_reference,
                      samples=_index_add_samples)


def one_hot(ids, classes, dtype=np.float32):
    """1 at each of ``ids`` (integers of any shape) along a new last axis of ``classes``, 0 elsewhere; an array.

    Raises DTypeError, or IndexError naming an id outside [0, classes).
    """
    ids = _integers("one_hot", ids)
    if ids.size and not (0 <= ids.min() and ids.max() < classes):
        bad = ids.min() if ids.min() < 0 else ids.max()
        raise IndexError(f"one_hot: id {bad} is outside the {classes} classes")
    out = np.zeros((ids.size, classes), dtype)
    out[np.arange(ids.size), ids.reshape(-1)] = 1
    return out.reshape(*ids.shape, classes)
