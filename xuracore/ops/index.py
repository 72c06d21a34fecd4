"""Selecting elements: slices, integer and boolean arrays, rows of a table."""

import numpy as np

from xuracore.errors import DTypeError
from xuracore.kernels.scatter import scatter_add_rows
from xuracore.ops.registry import primitive
from xuracore.tensor import Tensor


def _is_basic(key):
    parts = key if isinstance(key, tuple) else (key,)
    return all(p is None or p is Ellipsis or isinstance(p, (int, slice, np.integer)) for p in parts)


def _getitem_forward(x, key):
    """``x[key]`` with any NumPy index; elements picked several times add up their gradients."""
    y = x[key]
    return y, (x.shape, key)


def _getitem_vjp(grad, saved, needs):
    shape, key = saved
    out = np.zeros(shape, grad.dtype)
    if _is_basic(key) or isinstance(key, np.ndarray) and key.dtype == bool:
        out[key] = grad  # no element is picked twice
    elif isinstance(key, np.ndarray) and key.dtype.kind in "iu":  # rows; np.add.at is a hundred times slower
        flat = out.reshape(shape[0], -1)
        rows = np.ascontiguousarray(grad.reshape(key.size, flat.shape[1]))
        scatter_add_rows((key.reshape(-1) % shape[0]).astype(np.int64), rows, flat)
    else:
        np.add.at(out, key, grad)
    return (out,)


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
    rows = np.ascontiguousarray(grad.reshape(-1, shape[1]))
    scatter_add_rows(ids.reshape(-1).astype(np.int64), rows, out)
    return out, None


def _embedding_samples(rng):
    yield (rng.standard_normal((6, 3)), np.array([[0, 5, 5], [2, 0, 1]])), {}
    yield (rng.standard_normal((2, 3)), np.zeros((0,), int)), {}


embedding = primitive("embedding", _embedding_forward, _embedding_vjp, reference=lambda t, i: t[i],
                      samples=_embedding_samples)
