"""Views and assemblies: reshape, transpose, concatenate, stack, split, broadcast, pad, flip."""

import numpy as np

from xuracore.errors import DTypeError, ShapeError
from xuracore.ops.registry import primitive
from xuracore.tensor import FLOATS


def _reshape_forward(x, shape):
    """The same elements in another shape; one size may be -1.  ShapeError if the counts differ."""
    try:
        return x.reshape(shape), (x.shape,)
    except ValueError:
        raise ShapeError(f"cannot reshape {x.shape} ({x.size} elements) to {shape}") from None


def _reshape_vjp(grad, saved, needs):
    return (grad.reshape(saved[0]),)


def _reshape_samples(rng):
    yield (rng.standard_normal((2, 6)),), {"shape": (3, 4)}
    yield (rng.standard_normal((2, 6)).T,), {"shape": (-1,)}
    yield (np.asarray(rng.standard_normal()),), {"shape": (1, 1)}
    yield (rng.standard_normal((0, 3)),), {"shape": (3, 0)}


reshape = primitive("reshape", _reshape_forward, _reshape_vjp,
                    reference=lambda x, shape: np.reshape(x, shape), samples=_reshape_samples)


def _transpose_forward(x, axes=None):
    """Permute the axes (None: reverse them); negative ones count from the end.  Raises ShapeError."""
    if axes is not None and sorted(axis % max(x.ndim, 1) for axis in axes) != list(range(x.ndim)):
        raise ShapeError(f"axes {tuple(axes)} are no permutation of the {x.ndim} axes of shape {x.shape}")
    return x.transpose(axes), (axes,)


def _transpose_vjp(grad, saved, needs):
    (axes,) = saved
    if axes is None:
        return (grad.transpose(),)
    back = [0] * len(axes)
    for place, axis in enumerate(axes):
        back[axis] = place
    return (grad.transpose(back),)


def _transpose_samples(rng):
    yield (rng.standard_normal((2, 3)),), {}
    yield (rng.standard_normal((2, 3, 4)),), {"axes": (1, 2, 0)}
    yield (rng.standard_normal((2, 3, 4)),), {"axes": (0, -1, 1)}
    yield (np.asarray(rng.standard_normal()),), {}


transpose = primitive("transpose", _transpose_forward, _transpose_vjp,
                      reference=lambda x, axes=None: np.transpose(x, axes), samples=_transpose_samples)


def swapaxes(x, first, second):
    """Exchange two axes."""
    axes = list(range(x.ndim))
    axes[first], axes[second] = axes[second], axes[first]
    return transpose(x, axes=tuple(axes))


def _concatenate_forward(*arrays, axis=0):
    """Join along an existing axis."""
    return np.concatenate(arrays, axis=axis), (tuple(a.shape[axis] for a in arrays), axis)


def _concatenate_vjp(grad, saved, needs):
    sizes, axis = saved
    before, start, pieces = (slice(None),) * (axis % grad.ndim), 0, []
    for size, need in zip(sizes, needs):
        pieces.append(grad[(*before, slice(start, start + size))] if need else None)
        start += size
    return pieces


def _concatenate_samples(rng):
    yield (rng.standard_normal((2, 3)), rng.standard_normal((1, 3))), {}
    yield tuple(rng.standard_normal((2, n)) for n in (3, 0, 2)), {"axis": -1}


concatenate = primitive("concatenate", _concatenate_forward, _concatenate_vjp,
                        reference=lambda *a, axis=0: np.concatenate(a, axis), samples=_concatenate_samples,
                        weak=True)


def _stack_forward(*arrays, axis=0):
    """Join along a new axis."""
    return np.stack(arrays, axis=axis), (axis,)


def _stack_vjp(grad, saved, needs):
    return [piece if need else None for piece, need in zip(np.moveaxis(grad, saved[0], 0), needs)]


def _stack_samples(rng):
    yield (rng.standard_normal((2, 3)), rng.standard_normal((2, 3))), {}
    yield (rng.standard_normal(2), rng.standard_normal(2)), {"axis": -1}


stack = primitive("stack", _stack_forward, _stack_vjp,
                  reference=lambda *a, axis=0: np.stack(a, axis), samples=_stack_samples, weak=True)


def split(x, sizes, axis=-1):
    """Cut into pieces of the given sizes along one axis; their sum must be the whole.

    x : Tensor or array; sizes : sequence of int.  Returns a list of the same kind.
    """
    axis %= x.ndim
    if sum(sizes) != x.shape[axis]:
        raise ShapeError(f"sizes {tuple(sizes)} add up to {sum(sizes)}; axis {axis} has {x.shape[axis]}")
    pieces, start = [], 0
    for size in sizes:
        key = (slice(None),) * axis + (slice(start, start + size),)
        pieces.append(x[key])
        start += size
    return pieces


def _broadcast_to_forward(x, shape):
    """Repeat along axes of size 1 (and new leading axes) to reach ``shape``.  Raises ShapeError."""
    try:
        return np.array(np.broadcast_to(x, shape)), ()
    except ValueError:
        raise ShapeError(f"cannot broadcast {np.shape(x)} to {shape}") from None


def _broadcast_to_vjp(grad, saved, needs):
    return (grad,)  # the tape sums it back


def _broadcast_samples(rng):
    yield (rng.standard_normal((1, 3)),), {"shape": (2, 4, 3)}
    yield (np.asarray(rng.standard_normal()),), {"shape": (2,)}
    yield (rng.standard_normal((2, 3)),), {"shape": (2, 3)}


broadcast_to = primitive("broadcast_to", _broadcast_to_forward, _broadcast_to_vjp,
                         reference=lambda x, shape: np.broadcast_to(x, shape), samples=_broadcast_samples)


def _pad_forward(x, widths, value=0.0):
    """Add ``widths`` = ((before, after), ...) elements of ``value`` around each axis."""
    return np.pad(x, widths, constant_values=value), (x.shape, widths)


def _pad_vjp(grad, saved, needs):
    shape, widths = saved
    return (grad[tuple(slice(before, before + n) for n, (before, _) in zip(shape, widths))],)


def _pad_samples(rng):
    yield (rng.standard_normal((2, 3)),), {"widths": ((1, 0), (0, 2))}
    yield (rng.standard_normal((2,)),), {"widths": ((0, 0),), "value": 3.0}


pad = primitive("pad", _pad_forward, _pad_vjp,
                reference=lambda x, widths, value=0.0: np.pad(x, widths, constant_values=value),
                samples=_pad_samples)


def _flip_forward(x, axis):
    """Reverse the order along ``axis``."""
    return np.flip(x, axis), (axis,)


def _flip_vjp(grad, saved, needs):
    return (np.flip(grad, saved[0]),)


def _flip_samples(rng):
    yield (rng.standard_normal((2, 3)),), {"axis": 1}
    yield (rng.standard_normal((2, 3)),), {"axis": (0, 1)}


flip = primitive("flip", _flip_forward, _flip_vjp, reference=lambda x, axis: np.flip(x, axis),
                 samples=_flip_samples)


def _astype_forward(x, dtype):
    """Convert to float32 or float64.  DTypeError for other types: nothing else can be on the tape."""
    if np.dtype(dtype) not in FLOATS:
        raise DTypeError(f"astype: {np.dtype(dtype)} is not float32 or float64; use .data for constants")
    return x.astype(dtype), ()


def _astype_vjp(grad, saved, needs):
    return (grad,)  # the tape gives a gradient its input's dtype


astype = primitive("astype", _astype_forward, _astype_vjp, reference=lambda x, dtype: np.asarray(x, dtype),
                   samples=lambda rng: [((rng.standard_normal((2, 3)),), {"dtype": np.float64})])
