"""Views and assemblies: reshape, transpose, concatenate, stack, split, broadcast, pad, flip, astype.

What repeats or leaves out elements is in :mod:`xuracore.ops.rearrange`.
"""

import math

import numpy as np

from xuracore.errors import ConfigError, DTypeError, ShapeError
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


def squeeze(x, axis=None):
    """Drop axes of size 1: the given one or ones, or all.  ShapeError if one has another size."""
    shape = tuple(x.shape)
    axes = axis if isinstance(axis, tuple) else (axis,)
    dropped = {a % len(shape) for a in axes} if axis is not None else {i for i, n in enumerate(shape) if n == 1}
    if any(shape[a] != 1 for a in dropped):
        raise ShapeError(f"squeeze: axis {axis} of shape {shape} has not size 1")
    return reshape(x, shape=tuple(n for i, n in enumerate(shape) if i not in dropped))


def expand_dims(x, axis):
    """A new axis of size 1 at place ``axis`` of the result (numpy.expand_dims, torch.unsqueeze)."""
    shape = list(x.shape)
    if not -len(shape) - 1 <= axis <= len(shape):
        raise ShapeError(f"expand_dims: {tuple(shape)} with one more axis has no axis {axis}")
    shape.insert(axis % (len(shape) + 1), 1)
    return reshape(x, shape=tuple(shape))


unsqueeze = expand_dims


def flatten(x, start=0, end=-1):
    """The axes from ``start`` to ``end``, both included, as one."""
    shape = tuple(x.shape)
    if not shape:
        return reshape(x, shape=(1,))
    start, end = start % len(shape), end % len(shape)
    if start > end:
        raise ShapeError(f"flatten from axis {start} to {end} of shape {shape}; expected an order from left to right")
    return reshape(x, shape=shape[:start] + (math.prod(shape[start : end + 1]),) + shape[end + 1 :])


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


def permute(x, *axes):
    """:func:`transpose` with the axes in a row: ``permute(x, 2, 0, 1)``."""
    return transpose(x, axes=axes[0] if len(axes) == 1 and isinstance(axes[0], (tuple, list)) else axes)


def moveaxis(x, source, destination):
    """Move an axis, or several, to new places; the others keep their order."""
    places = source if isinstance(source, tuple) else (source,), destination
    moved, to = (tuple(a % x.ndim for a in (p if isinstance(p, tuple) else (p,))) for p in places)
    if len(set(moved)) != len(moved) or len(set(to)) != len(to) or len(moved) != len(to):
        raise ShapeError(f"moveaxis: {source} to {destination}: expected as many places as axes, each once")
    order = [axis for axis in range(x.ndim) if axis not in moved]
    for place, axis in sorted(zip(to, moved)):
        order.insert(place, axis)
    return transpose(x, axes=tuple(order))


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


def _split_forward(x, sizes, axis=-1):
    """Cut into pieces of the given sizes along one axis, as a tuple; their sum must be the whole (ShapeError).

    One node for all pieces: each piece's gradient is copied once, however many there are.
    """
    if not -x.ndim <= axis < x.ndim:
        raise ShapeError(f"split along axis {axis} of shape {x.shape}, which has {x.ndim} axes")
    axis, total = axis % x.ndim, int(np.sum(sizes))
    if total != x.shape[axis]:
        raise ShapeError(f"sizes {tuple(sizes)} add up to {total}; axis {axis} has {x.shape[axis]}")
    before, start, pieces = (slice(None),) * axis, 0, []
    for size in sizes:
        pieces.append(x[(*before, slice(start, start + int(size)))])
        start += int(size)
    return tuple(pieces), (x.shape, sizes, axis)


def _split_vjp(grad, saved, needs):
    shape, sizes, axis = saved
    whole = np.empty(shape, next(g for g in grad if g is not None).dtype)
    before, start = (slice(None),) * axis, 0
    for piece, size in zip(grad, sizes):
        whole[(*before, slice(start, start + int(size)))] = 0 if piece is None else piece
        start += int(size)
    return whole, None


def _split_samples(rng):
    yield (rng.standard_normal((2, 6)),), {"sizes": (1, 0, 5)}
    yield (rng.standard_normal((3, 4)).T,), {"sizes": (2, 2), "axis": 0}
    yield (rng.standard_normal((2, 3)),), {"sizes": (3,)}


split = primitive("split", _split_forward, _split_vjp, outputs=2, samples=_split_samples,
                  reference=lambda x, sizes, axis=-1: tuple(np.split(x, np.cumsum(sizes)[:-1], axis)))


def chunk(x, count, axis=-1):
    """Cut into ``count`` pieces along one axis, the earlier ones larger by one if they cannot be equal."""
    if count < 1:
        raise ShapeError(f"chunk into {count} pieces; expected at least 1")
    size, rest = divmod(x.shape[axis], count)
    return split(x, sizes=(size + 1,) * rest + (size,) * (count - rest), axis=axis)


def unstack(x, axis=0):
    """The slices along one axis, as a tuple: the inverse of :func:`stack`."""
    if not x.shape[axis]:
        return ()
    return tuple(squeeze(piece, axis) for piece in split(x, sizes=(1,) * x.shape[axis], axis=axis))


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


PAD_MODES = ("constant", "reflect", "symmetric", "edge", "wrap")


def _pad_forward(x, widths, value=0.0, mode="constant"):
    """Add ``widths`` = ((before, after), ...) elements around each axis.

    mode : "constant" for ``value``, or as in numpy.pad: "reflect" (the edge is not repeated), "symmetric"
    (it is), "edge" (it alone is), "wrap" (the other end).
    """
    if mode not in PAD_MODES:
        raise ConfigError(f"pad: mode={mode!r}; expected one of {', '.join(PAD_MODES)}")
    if mode == "constant":
        return np.pad(x, widths, constant_values=value), (x.shape, widths, mode)
    return np.pad(x, widths, mode=mode), (x.shape, widths, mode)


def _pad_vjp(grad, saved, needs):
    shape, widths, mode = saved
    if mode == "constant":
        return (grad[tuple(slice(before, before + n) for n, (before, _) in zip(shape, widths))],)
    for axis, (n, width) in enumerate(zip(shape, widths)):
        source = np.pad(np.arange(n), width, mode=mode)
        inside = np.zeros((n, len(source)), grad.dtype)
        inside[source, np.arange(len(source))] = 1
        grad = np.moveaxis(np.tensordot(inside, grad, (1, axis)), 0, axis)
    return (grad,)


def _pad_samples(rng):
    yield (rng.standard_normal((2, 3)),), {"widths": ((1, 0), (0, 2))}
    yield (rng.standard_normal((2,)),), {"widths": ((0, 0),), "value": 3.0}
    for mode in PAD_MODES[1:]:
        yield (rng.standard_normal((4, 3)).T,), {"widths": ((2, 1), (0, 3)), "mode": mode}


pad = primitive("pad", _pad_forward, _pad_vjp,
                reference=lambda x, widths, value=0.0, mode="constant": np.pad(
                    x, widths, mode=mode, **({"constant_values": value} if mode == "constant" else {})),
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
