"""What repeats, moves round or leaves out elements: roll, tile, repeat, triangles, diagonals, windows."""

import numpy as np

from xuracore.errors import ShapeError
from xuracore.kernels.scatter import scatter_add_rows
from xuracore.ops.arrays import contiguous
from xuracore.ops.registry import primitive


def _roll_forward(x, shift, axis=None):
    """Move the elements on by ``shift`` along ``axis``, round the end; None: in the flat order."""
    return np.roll(x, shift, axis), (shift, axis)


def _roll_vjp(grad, saved, needs):
    shift, axis = saved
    back = tuple(-s for s in shift) if isinstance(shift, tuple) else -shift
    return (np.roll(grad, back, axis),)


def _roll_samples(rng):
    yield (rng.standard_normal((3, 4)),), {"shift": 2, "axis": 1}
    yield (rng.standard_normal((4, 3)).T,), {"shift": (1, -2), "axis": (0, 1)}
    yield (rng.standard_normal((3, 4)),), {"shift": -5}
    yield (rng.standard_normal((0, 3)),), {"shift": 1, "axis": 0}


roll = primitive("roll", _roll_forward, _roll_vjp, samples=_roll_samples,
                 reference=lambda x, shift, axis=None: np.roll(x, shift, axis))


# ---------------------------------------------------------------------- tile, repeat
def _tile_forward(x, counts):
    """The whole array side by side, ``counts`` times along each axis (numpy.tile)."""
    return np.tile(x, counts), (x.shape, counts)


def _tile_vjp(grad, saved, needs):
    shape, counts = saved
    counts = counts if isinstance(counts, tuple) else (counts,)
    width = max(len(shape), len(counts))
    counts, sizes = (1,) * (width - len(counts)) + counts, (1,) * (width - len(shape)) + shape
    parts = grad.reshape([n for pair in zip(counts, sizes) for n in pair])
    return (parts.sum(axis=tuple(range(0, 2 * width, 2))).reshape(shape),)


def _tile_samples(rng):
    yield (rng.standard_normal((2, 3)),), {"counts": (2, 3)}
    yield (rng.standard_normal((3, 2)).T,), {"counts": 2}
    yield (rng.standard_normal(3),), {"counts": (2, 1, 2)}
    yield (rng.standard_normal((2, 3)),), {"counts": (0, 1)}


tile = primitive("tile", _tile_forward, _tile_vjp, samples=_tile_samples,
                 reference=lambda x, counts: np.tile(x, counts))


def _repeat_forward(x, counts, axis=-1):
    """Each element ``counts`` times in place along one axis; one number, or one for each (numpy.repeat)."""
    return np.repeat(x, counts, axis), (x.shape, counts, axis)


def _repeat_vjp(grad, saved, needs):
    shape, counts, axis = saved
    axis %= len(shape)
    if np.ndim(counts) == 0:
        parts = grad.reshape(*shape[: axis + 1], counts, *shape[axis + 1 :])
        return (parts.sum(axis=axis + 1),)
    moved = contiguous(np.moveaxis(grad, axis, 0))
    out = np.zeros((shape[axis], *moved.shape[1:]), grad.dtype)
    source = np.repeat(np.arange(shape[axis]), counts)
    if moved.size:
        scatter_add_rows(source, moved.reshape(len(source), -1), out.reshape(len(out), -1))
    return (np.moveaxis(out, 0, axis),)


def _repeat_samples(rng):
    yield (rng.standard_normal((2, 3)),), {"counts": 2}
    yield (rng.standard_normal((2, 3, 2)),), {"counts": (2, 0, 3), "axis": 1}
    yield (rng.standard_normal((3, 2)).T,), {"counts": 3, "axis": 0}
    yield (rng.standard_normal((2, 3)),), {"counts": 0}


repeat = primitive("repeat", _repeat_forward, _repeat_vjp, samples=_repeat_samples,
                   reference=lambda x, counts, axis=-1: np.repeat(x, counts, axis))
repeat_interleave = repeat


# ---------------------------------------------------------------------- triangles and diagonals
def _triangle(name, keep, which):
    def forward(x, offset=0):
        return keep(x, offset), (offset,)

    def vjp(grad, saved, needs):
        return (keep(grad, saved[0]),)

    def samples(rng):
        yield (rng.standard_normal((3, 4)),), {}
        yield (rng.standard_normal((2, 3, 3)),), {"offset": 1}
        yield (rng.standard_normal((3, 3)).T,), {"offset": -1}
        yield (rng.standard_normal((0, 2)),), {}

    forward.__doc__ = f"The last two axes with 0 {which} the diagonal ``offset`` places to the right of the main one."
    return primitive(name, forward, vjp, samples=samples, reference=lambda x, offset=0: keep(x, offset))


tril, triu = _triangle("tril", np.tril, "above"), _triangle("triu", np.triu, "below")


def _diagonal_key(count, offset):
    along = np.arange(count)
    return along + max(-offset, 0), along + max(offset, 0)


def _diagonal_forward(x, offset=0, first=-2, second=-1):
    """The diagonal of two axes as a new last axis, ``offset`` places to the right of the main one."""
    return x.diagonal(offset, first, second), (x.shape, offset, first, second)


def _diagonal_vjp(grad, saved, needs):
    shape, offset, first, second = saved
    out = np.zeros(shape, grad.dtype)
    np.moveaxis(out, (first, second), (-2, -1))[(..., *_diagonal_key(grad.shape[-1], offset))] = grad
    return (out,)


def _diagonal_samples(rng):
    yield (rng.standard_normal((3, 4)),), {}
    yield (rng.standard_normal((3, 2, 4)),), {"offset": -1, "first": 0, "second": 2}
    yield (rng.standard_normal((3, 3)).T,), {"offset": 2}
    yield (rng.standard_normal((2, 0)),), {}


diagonal = primitive("diagonal", _diagonal_forward, _diagonal_vjp, samples=_diagonal_samples,
                     reference=lambda x, offset=0, first=-2, second=-1: np.diagonal(x, offset, first, second))


def _diag_forward(x, offset=0):
    """Square matrices with the vectors x (…, n) on a diagonal, 0 elsewhere.

    offset : places to the right of the main diagonal; the side is n, and its size more.
    """
    if not x.ndim:
        raise ShapeError("diag needs at least one axis; a single number has none")
    side = x.shape[-1] + abs(offset)
    out = np.zeros((*x.shape[:-1], side, side), x.dtype)
    out[(..., *_diagonal_key(x.shape[-1], offset))] = x
    return out, (offset,)


def _diag_vjp(grad, saved, needs):
    return (grad.diagonal(saved[0], -2, -1),)


def _diag_samples(rng):
    yield (rng.standard_normal(3),), {}
    yield (rng.standard_normal((2, 3)),), {"offset": -2}
    yield (rng.standard_normal((3, 2)).T,), {"offset": 1}
    yield (rng.standard_normal(0),), {}


diag = primitive("diag", _diag_forward, _diag_vjp, samples=_diag_samples,
                 reference=lambda x, offset=0: np.apply_along_axis(np.diag, -1, x, offset) if x.size
                 else np.zeros((abs(offset),) * 2))


# ---------------------------------------------------------------------- windows
def _windows_forward(x, size, step=1, axis=-1):
    """Overlapping pieces of ``size`` elements, one every ``step``, along one axis; they are the last axis.

    (…, n, …) → (…, (n - size) // step + 1, …, size), as torch.Tensor.unfold.  Raises ShapeError.
    """
    if not 1 <= size <= x.shape[axis] or step < 1:
        raise ShapeError(f"windows of {size} every {step} along axis {axis} of {x.shape}: none fits")
    every = (slice(None),) * (axis % x.ndim) + (slice(None, None, step),)
    view = np.lib.stride_tricks.sliding_window_view(x, size, axis)[every]
    return np.ascontiguousarray(view), (x.shape, step, axis)


def _windows_vjp(grad, saved, needs):
    shape, step, axis = saved
    out = np.zeros(shape, grad.dtype)
    to, count = np.moveaxis(out, axis, -1), grad.shape[axis % len(shape)]
    given = np.moveaxis(grad, axis % len(shape), -2)
    for k in range(grad.shape[-1]):
        to[..., k : k + step * (count - 1) + 1 : step] += given[..., k]
    return (out,)


def _windows_reference(x, size, step=1, axis=-1):
    x = np.moveaxis(x, axis, -1)
    pieces = [x[..., i : i + size] for i in range(0, x.shape[-1] - size + 1, step)]
    return np.moveaxis(np.stack(pieces, axis=-2), -2, axis % x.ndim)


def _windows_samples(rng):
    yield (rng.standard_normal((2, 5, 3)),), {"size": 2, "axis": 1}
    yield (rng.standard_normal((2, 7)),), {"size": 3, "step": 2}
    yield (rng.standard_normal((3, 4)).T,), {"size": 4, "axis": 0}


windows = primitive("windows", _windows_forward, _windows_vjp, reference=_windows_reference,
                    samples=_windows_samples)
