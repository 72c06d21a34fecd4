"""Pooling: the largest or the mean of each window of an image (B, C, H, W) or a sequence (B, C, L)."""

import functools

import numpy as np

from xuracore.errors import ShapeError
from xuracore.ops.conv2d import output_size, pad_image, pair, taps
from xuracore.ops.registry import primitive
from xuracore.ops.shape import expand_dims, squeeze


def _plan(name, x, kernel_size, stride, padding, dilation=1):
    """(kernel, stride, padding, dilation, counts) as pairs; the stride is the kernel size if None."""
    kernel, padding, dilation = pair(kernel_size), pair(padding), pair(dilation)
    stride = kernel if stride is None else pair(stride)
    if x.ndim != 4:
        raise ShapeError(f"{name}: x {x.shape}; expected (B, C, H, W)")
    counts = output_size(name, x.shape[2:], kernel, stride, padding, dilation)
    if any(2 * p > k for p, k in zip(padding, kernel)):
        raise ShapeError(f"{name}: padding {padding} is more than half the window {kernel}: some would see nothing")
    return kernel, stride, padding, dilation, counts


def _inside(padded, padding, size):
    return padded[..., padding[0] : padding[0] + size[0], padding[1] : padding[1] + size[1]]


def _grown(shape, padding):
    return (*shape[:2], *(n + 2 * p for n, p in zip(shape[2:], padding)))


# ---------------------------------------------------------------------- max
def _max_pool2d_forward(x, kernel_size, stride=None, padding=0, dilation=1):
    """Largest element of each window: (B, C, H, W) → (B, C, oh, ow); of equal ones the first gets the gradient.

    stride : None for the kernel size.  Padding counts as -inf; NaN wins.  Raises ShapeError.
    """
    plan = kernel, stride, padding, dilation, counts = _plan("max_pool2d", x, kernel_size, stride, padding, dilation)
    padded, best, place = pad_image(x, padding, -np.inf), None, np.zeros((*x.shape[:2], *counts), np.int32)
    for n, (_, seen) in enumerate(taps(kernel, stride, dilation, counts)):
        if best is None:
            best = np.array(padded[seen], order="C")
            continue
        better = ~(padded[seen] <= best) & (best == best)
        np.copyto(best, padded[seen], where=better)
        np.copyto(place, n, where=better)
    return best, (x.shape, place, plan)


def _max_pool2d_vjp(grad, saved, needs):
    shape, place, (kernel, stride, padding, dilation, counts) = saved
    padded, zero = np.zeros(_grown(shape, padding), grad.dtype), grad.dtype.type(0)
    for n, (_, seen) in enumerate(taps(kernel, stride, dilation, counts)):
        padded[seen] += np.where(place == n, grad, zero)
    return (_inside(padded, padding, shape[2:]),)


def _pooled(pick, x, kernel_size, stride, padding, dilation, fill):
    kernel, padding, dilation = pair(kernel_size), pair(padding), pair(dilation)
    stride = kernel if stride is None else pair(stride)
    padded = np.full(_grown(x.shape, padding), float(fill))
    _inside(padded, padding, x.shape[2:])[...] = x
    counts = output_size("", x.shape[2:], kernel, stride, padding, dilation)
    y = np.empty((*x.shape[:2], *counts))
    for i, j in np.ndindex(counts):
        seen = padded[:, :, i * stride[0] :: dilation[0], j * stride[1] :: dilation[1]]
        y[:, :, i, j] = pick(seen[:, :, : kernel[0], : kernel[1]], axis=(2, 3))
    return y


def _max_pool2d_samples(rng):
    yield (rng.standard_normal((2, 2, 4, 6)),), {"kernel_size": 2}
    yield (rng.standard_normal((1, 2, 5, 4)),), {"kernel_size": (3, 2), "stride": (2, 1), "padding": 1}
    yield (rng.standard_normal((5, 4, 2, 1)).T,), {"kernel_size": 2, "stride": 1, "dilation": (1, 2)}
    yield (rng.standard_normal((0, 2, 3, 3)),), {"kernel_size": 3}


max_pool2d = primitive(
    "max_pool2d", _max_pool2d_forward, _max_pool2d_vjp, samples=_max_pool2d_samples,
    reference=lambda x, kernel_size, stride=None, padding=0, dilation=1: _pooled(
        np.max, x, kernel_size, stride, padding, dilation, -np.inf))  # fmt: skip


def max_pool1d(x, kernel_size, stride=None, padding=0, dilation=1):
    """Largest element of each window of a sequence: (B, C, L) → (B, C, length).  See :func:`max_pool2d`."""
    stride = kernel_size if stride is None else stride
    y = max_pool2d(expand_dims(x, -2), kernel_size=(1, kernel_size), stride=(1, stride), padding=(0, padding),
                   dilation=(1, dilation))
    return squeeze(y, -2)


# ---------------------------------------------------------------------- mean
def _avg_pool2d_forward(x, kernel_size, stride=None, padding=0, count_include_pad=True):
    """Mean of each window: (B, C, H, W) → (B, C, oh, ow).

    stride : None for the kernel size.   count_include_pad : whether the padding's zeros count.
    """
    kernel, stride, padding, dilation, counts = _plan("avg_pool2d", x, kernel_size, stride, padding)
    padded = pad_image(x, padding)
    share = x.dtype.type(1 / (kernel[0] * kernel[1]))
    if not count_include_pad:
        inside = pad_image(np.ones((1, 1, *x.shape[2:]), x.dtype), padding)
        share = 1 / sum(inside[seen] for _, seen in taps(kernel, stride, dilation, counts))
    y = np.zeros((*x.shape[:2], *counts), x.dtype)
    for _, seen in taps(kernel, stride, dilation, counts):
        y += padded[seen]
    y *= share
    return y, (x.shape, share, (kernel, stride, padding, dilation, counts))


def _avg_pool2d_vjp(grad, saved, needs):
    shape, share, (kernel, stride, padding, dilation, counts) = saved
    padded, given = np.zeros(_grown(shape, padding), grad.dtype), grad * share
    for _, seen in taps(kernel, stride, dilation, counts):
        padded[seen] += given
    return (_inside(padded, padding, shape[2:]),)


def _avg_pool2d_reference(x, kernel_size, stride=None, padding=0, count_include_pad=True):
    return _pooled(np.mean if count_include_pad else np.nanmean, x, kernel_size, stride, padding, 1,
                   0 if count_include_pad else np.nan)


def _avg_pool2d_samples(rng):
    yield (rng.standard_normal((2, 2, 4, 6)),), {"kernel_size": 2}
    for counted in (True, False):
        settings = {"kernel_size": (3, 2), "stride": (2, 1), "padding": 1, "count_include_pad": counted}
        yield (rng.standard_normal((1, 2, 5, 4)),), settings
    yield (rng.standard_normal((5, 4, 2, 1)).T,), {"kernel_size": 3, "stride": 1}


avg_pool2d = primitive("avg_pool2d", _avg_pool2d_forward, _avg_pool2d_vjp, reference=_avg_pool2d_reference,
                       samples=_avg_pool2d_samples)


def avg_pool1d(x, kernel_size, stride=None, padding=0, count_include_pad=True):
    """Mean of each window of a sequence: (B, C, L) → (B, C, length).  See :func:`avg_pool2d`."""
    stride = kernel_size if stride is None else stride
    y = avg_pool2d(expand_dims(x, -2), kernel_size=(1, kernel_size), stride=(1, stride), padding=(0, padding),
                   count_include_pad=count_include_pad)
    return squeeze(y, -2)


@functools.lru_cache(maxsize=64)
def _shares(size, count):
    """(count, size): row i has the mean over elements ⌊i size/count⌋ to ⌈(i + 1) size/count⌉."""
    out = np.zeros((count, size))
    for i in range(count):
        first, last = i * size // count, -(-(i + 1) * size // count)
        out[i, first:last] = 1 / (last - first)
    out.flags.writeable = False
    return out


def _adaptive_avg_pool2d_forward(x, output_size):
    """Means over (oh, ow) = ``output_size`` windows, as equal as can be: (B, C, H, W) → (B, C, oh, ow)."""
    counts = pair(output_size)
    if x.ndim != 4 or min(counts) < 1 or not x.shape[2] or not x.shape[3]:
        raise ShapeError(f"adaptive_avg_pool2d: x {x.shape} to {counts}; expected (B, C, H, W) and sizes from 1")
    rows, columns = (_shares(n, count).astype(x.dtype) for n, count in zip(x.shape[2:], counts))
    return rows @ (x @ columns.T), (rows, columns)


def _adaptive_avg_pool2d_vjp(grad, saved, needs):
    rows, columns = saved
    return (rows.T @ (grad @ columns),)


def _adaptive_avg_pool2d_reference(x, output_size):
    (oh, ow), (h, w) = pair(output_size), x.shape[2:]
    y = np.empty((*x.shape[:2], oh, ow))
    for i, j in np.ndindex(oh, ow):
        seen = x[:, :, i * h // oh : -(-(i + 1) * h // oh), j * w // ow : -(-(j + 1) * w // ow)]
        y[:, :, i, j] = seen.mean(axis=(2, 3))
    return y


def _adaptive_avg_pool2d_samples(rng):
    yield (rng.standard_normal((2, 2, 5, 4)),), {"output_size": (2, 3)}
    yield (rng.standard_normal((1, 2, 3, 2)),), {"output_size": 4}
    yield (rng.standard_normal((4, 3, 2, 1)).T,), {"output_size": 1}


adaptive_avg_pool2d = primitive("adaptive_avg_pool2d", _adaptive_avg_pool2d_forward, _adaptive_avg_pool2d_vjp,
                                reference=_adaptive_avg_pool2d_reference, samples=_adaptive_avg_pool2d_samples)
