"""Interpolation of images (B, C, H, W) and sequences (B, C, L) to another size.

Every method is linear and separable: y = R x Cᵀ with one matrix for the rows and one for the columns,
(new, old) each, and the gradient is Rᵀ dy C.  A pixel i of the new grid lies at (i + ½) old/new - ½ of the
old one, or, with ``align_corners``, at i (old - 1)/(new - 1): then the corner pixels keep their places.
"""

import functools

import numpy as np

from xuracore.errors import ConfigError, ShapeError
from xuracore.ops.registry import primitive

NEAREST, SMOOTH = ("nearest", "nearest-exact"), ("linear", "bilinear", "bicubic")


def _triangle(x):
    return np.maximum(1 - np.abs(x), 0)


def _cubic(x, a):
    """Cubic convolution (Keys 1981) with slope ``a`` at 1; 0 from 2 on."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


@functools.lru_cache(maxsize=64)
def resize_matrix(old, new, mode, align_corners=False, antialias=False):
    """The matrix (new, old), float64 and read-only, of one axis; see :func:`interpolate`."""
    places = np.arange(new)
    matrix = np.zeros((new, old))
    if mode in NEAREST:
        shift = 0.5 if mode == "nearest-exact" else 0.0
        matrix[places, np.minimum(np.floor((places + shift) * old / new).astype(int), old - 1)] = 1
    elif antialias:  # the filter is as wide as a new pixel, and its weights add up to 1 (as Pillow does)
        width = max(old / new, 1.0)
        distance = (np.arange(old) + 0.5 - (places[:, None] + 0.5) * old / new) / width
        matrix = _cubic(distance, -0.5) if mode == "bicubic" else _triangle(distance)
        matrix /= matrix.sum(axis=1, keepdims=True)
    else:
        at = places * ((old - 1) / max(new - 1, 1)) if align_corners else (places + 0.5) * old / new - 0.5
        cubic = mode == "bicubic"
        at = at if cubic else np.clip(at, 0, old - 1)
        first = np.floor(at).astype(int)
        for k in range(-1, 3) if cubic else range(2):  # beyond the edge, the edge pixel stands in
            weight = _cubic(at - first - k, -0.75) if cubic else _triangle(at - first - k)
            np.add.at(matrix, (places, np.clip(first + k, 0, old - 1)), weight)
    matrix.flags.writeable = False
    return matrix


def _interpolate_forward(x, size, mode="nearest", align_corners=False, antialias=False):
    """x (B, C, L) or (B, C, H, W) resized to ``size``, one number for all axes or one for each.

    mode : "nearest" (the pixel at or before), "nearest-exact" (the closest), "linear" (of sequences),
    "bilinear", "bicubic" (a = -0.75; a = -0.5 with antialias).
    align_corners : keep the corner pixels in place.   antialias : average over what a new pixel covers.
    Numbers as torch.nn.functional.interpolate gives for a size.  Raises ShapeError, ConfigError.
    """
    axes = x.ndim - 2
    size = (int(size),) * axes if isinstance(size, (int, np.integer)) else tuple(size)
    if axes not in (1, 2) or len(size) != axes or min(size) < 1 or 0 in x.shape[2:]:
        raise ShapeError(f"interpolate: x {x.shape} to size {size}; expected (B, C, L) or (B, C, H, W), sizes from 1")
    if mode not in NEAREST + SMOOTH or mode in SMOOTH and (mode == "linear") != (axes == 1):
        raise ConfigError(f"interpolate: mode={mode!r} for {axes} axes; expected 'nearest', 'nearest-exact', "
                          f"{repr('linear') if axes == 1 else repr('bilinear') + ', ' + repr('bicubic')}")
    if (align_corners or antialias) and mode in NEAREST or align_corners and antialias or antialias and axes == 1:
        raise ConfigError(f"interpolate: mode={mode!r} takes no align_corners={align_corners} with "
                          f"antialias={antialias} here")
    matrices = [
        resize_matrix(n, m, mode, bool(align_corners), bool(antialias)).astype(x.dtype)
        for n, m in zip(x.shape[2:], size)
    ]  # fmt: skip
    if mode in NEAREST:  # picked, not multiplied: an infinite pixel stays where it is
        picked = [matrix.argmax(axis=1) for matrix in matrices]
        y = x[..., picked[0]] if axes == 1 else x[..., picked[0][:, None], picked[1]]
    else:
        y = x @ matrices[-1].T
        y = matrices[0] @ y if axes == 2 else y
    return y, (matrices,)


def _interpolate_vjp(grad, saved, needs):
    (matrices,) = saved
    back = grad @ matrices[-1]
    return (matrices[0].T @ back if len(matrices) == 2 else back,)


def _interpolate_reference(x, size, mode="nearest", align_corners=False, antialias=False):
    size = (size,) * (x.ndim - 2) if isinstance(size, int) else size
    for axis, new in enumerate(size, start=2):
        line = [_pixel(np.moveaxis(x, axis, 0), i, new, mode, align_corners, antialias) for i in range(new)]
        x = np.stack(line, axis=axis)
    return x


def _pixel(x, i, new, mode, align_corners, antialias):
    """Pixel ``i`` of ``new`` along the first axis."""
    old, reach = len(x), 2 if mode == "bicubic" else 1
    kernel = (lambda d: _cubic(d, -0.5 if antialias else -0.75)) if reach == 2 else _triangle
    if mode in NEAREST:
        return x[int((i + 0.5 * (mode == "nearest-exact")) * old / new)]
    at = i * (old - 1) / max(new - 1, 1) if align_corners else (i + 0.5) * old / new - 0.5
    if antialias:
        weights = np.array([kernel((j - at) / max(old / new, 1)) for j in range(old)])
        return np.tensordot(weights / weights.sum(), x, 1)
    at = max(at, 0) if reach == 1 else at
    near = range(int(np.floor(at)) - reach + 1, int(np.floor(at)) + reach + 1)
    return sum(kernel(at - j) * x[min(max(j, 0), old - 1)] for j in near)


def _interpolate_samples(rng):
    x = rng.standard_normal((1, 2, 4, 3))
    for mode in ("bilinear", "bicubic"):
        yield (x,), {"size": (6, 2), "mode": mode}
        yield (x,), {"size": (1, 5), "mode": mode, "align_corners": True}
        yield (x,), {"size": (2, 4), "mode": mode, "antialias": True}
    yield (x.transpose(1, 0, 3, 2),), {"size": (5, 2)}
    yield (x[0],), {"size": 5, "mode": "nearest-exact"}
    yield (x[0],), {"size": 5, "mode": "linear"}


interpolate = primitive("interpolate", _interpolate_forward, _interpolate_vjp, reference=_interpolate_reference,
                        samples=_interpolate_samples)
