"""What every op over a kernel does first: a float dtype, contiguous memory, rows of the last axis."""

import math

import numpy as np

from xuracore.errors import ShapeError

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


def floating(x):
    """``x`` as a float32 or float64 array; Python numbers, integers and half precision become float32."""
    if type(x) is not np.ndarray:
        x = np.asarray(x)
    return x if x.dtype in FLOATS and isinstance(x, np.ndarray) else x.astype(np.float32)


def contiguous(x, dtype=None):
    """``x`` as a C-contiguous, writable array, itself where it can be.

    Kernels take no other: a read-only array is a type of its own to Numba and would cost another build.
    """
    x = np.ascontiguousarray(x, dtype)
    return x if x.flags.writeable else x.copy()


def flat(x):
    """``x`` as one C-contiguous axis (a view where it can be)."""
    return x.ravel() if x.flags.carray else contiguous(x).reshape(-1)


def rows(x):
    """``x`` (..., width) as C-contiguous (rows, width)."""
    return contiguous(x).reshape(math.prod(x.shape[:-1]), x.shape[-1])


def vector(given, width, dtype, fill, name):
    """A parameter of the last axis as a contiguous (width,) array; None means ``fill`` everywhere."""
    if given is None:
        return np.full(width, fill, dtype)
    given = np.asarray(given)
    if given.shape != (width,):
        raise ShapeError(f"{name} has shape {given.shape}; expected ({width},) for inputs of that width")
    return contiguous(given, dtype)
