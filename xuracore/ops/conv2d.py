"""Convolution of images (B, C, H, W) and of sequences (B, C, L), its transpose, and the windows under both.

    y[b, o, i, j] = bias[o] + Σ_{c, u, v} weight[o, c, u, v] x[b, c, i·s + u·d - p, j·s + v·d - p]

with stride s, padding p (zeros) and dilation d.  Windows are laid side by side as columns and multiplied
as matrices (im2col), block by block, so that the columns never take more than ``BLOCK_BYTES``.  All
three products of a convolution and its gradients are here once:

    y = correlate(x, w),   dx = spread(dy, w),   dw = correlate_weight(dy, x)
"""

import numpy as np

from xuracore.errors import ShapeError
from xuracore.ops.registry import primitive
from xuracore.ops.shape import expand_dims, reshape, squeeze, transpose

BLOCK_BYTES = 1 << 25  # columns at a time: enough for the matrix product to run at full speed


def pair(value):
    """A setting of both image axes: one number stands for two."""
    return (value, value) if isinstance(value, (int, np.integer)) else tuple(value)


def output_size(name, size, kernel, stride, padding, dilation):
    """Windows along the two image axes of ``size``.  ShapeError if the settings are no pairs, or none fits."""
    settings = kernel, stride, padding, dilation
    positive = all(len(s) == 2 for s in settings) and min(*kernel, *stride, *dilation) > 0 and min(padding) >= 0
    counts = tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(size, *settings)
    ) if positive else (0, 0)  # fmt: skip
    if min(counts) < 1:
        raise ShapeError(
            f"{name}: no window of {kernel}, dilated {dilation}, fits every {stride} into {tuple(size)} "
            f"padded by {padding}"
        )
    return counts


def pad_image(x, padding, value=0):
    """``x`` (B, C, H, W) with ``padding`` = (rows, columns) of ``value`` on each side."""
    (top, left), (*outer, height, width) = padding, x.shape
    if not top and not left:
        return x
    out = np.full((*outer, height + 2 * top, width + 2 * left), value, x.dtype)
    out[..., top : top + height, left : left + width] = x
    return out


def taps(kernel, stride, dilation, counts, first_row=0):
    """For each place (u, v) of a window: it, and the key of what it sees in a padded image, over all windows."""
    for u in range(kernel[0]):
        for v in range(kernel[1]):
            starts = u * dilation[0] + first_row * stride[0], v * dilation[1]
            yield (u, v), (..., *(slice(a, a + s * (n - 1) + 1, s) for a, s, n in zip(starts, stride, counts)))


def _windows(padded, kernel, stride, dilation, counts):
    """A read-only view (B, C, oh, ow, kh, kw) of every window."""
    b, c, h, w = padded.strides
    strides = (b, c, h * stride[0], w * stride[1], h * dilation[0], w * dilation[1])
    return np.lib.stride_tricks.as_strided(padded, (*padded.shape[:2], *counts, *kernel), strides, writeable=False)


def _blocks(images, rows, row_bytes):
    """(slice of images, slice of output rows) whose columns fit ``BLOCK_BYTES``, or are one row."""
    several = BLOCK_BYTES // max(1, rows * row_bytes)
    height = rows if several else max(1, BLOCK_BYTES // row_bytes)
    for first in range(0, images, max(1, several)):
        for row in range(0, rows, height):
            yield slice(first, first + max(1, several)), slice(row, min(row + height, rows))


def _blocks_of(view):
    images, channels, rows, columns, *kernel = view.shape
    return _blocks(images, rows, channels * columns * kernel[0] * kernel[1] * view.itemsize)


def _grouped(weight, groups):
    """weight (O, C/G, kh, kw) as (G, O/G, C/G · kh · kw)."""
    return weight.reshape(groups, len(weight) // groups, -1)


def _correlate(x, weight, stride, padding, dilation, groups):
    """x (B, C, H, W), weight (O, C/G, kh, kw) → (B, O, oh, ow)."""
    kernel, padded = weight.shape[2:], pad_image(x, padding)
    counts = output_size("conv2d", x.shape[2:], kernel, stride, padding, dilation)
    view, matrix = _windows(padded, kernel, stride, dilation, counts), _grouped(weight, groups)
    y = np.empty((len(x), groups, len(weight) // groups, *counts), x.dtype)
    for images, rows in _blocks_of(view):
        columns = view[images, :, rows].transpose(0, 1, 4, 5, 2, 3)
        count, height = len(columns), columns.shape[4]
        columns = columns.reshape(count, groups, matrix.shape[2], height * counts[1])
        y[images, :, :, rows] = (matrix @ columns).reshape(count, groups, -1, height, counts[1])
    return y.reshape(len(x), len(weight), *counts)


def _spread(grad, weight, size, stride, padding, dilation, groups):
    """The transpose of :func:`_correlate` in x: grad (B, O, oh, ow) → (B, C, *size)."""
    kernel, (images, _, *counts) = weight.shape[2:], grad.shape
    channels = weight.shape[1] * groups
    padded = np.zeros((images, channels, *(n + 2 * p for n, p in zip(size, padding))), grad.dtype)
    matrix = _grouped(weight, groups).swapaxes(1, 2)
    row_bytes = channels * kernel[0] * kernel[1] * counts[1] * grad.itemsize
    for part, rows in _blocks(images, counts[0], row_bytes):
        given = grad[part, :, rows]
        height = given.shape[2]
        columns = matrix @ given.reshape(len(given), groups, -1, height * counts[1])
        columns = columns.reshape(len(given), channels, *kernel, height, counts[1])
        to = padded[part]
        for (u, v), seen in taps(kernel, stride, dilation, (height, counts[1]), rows.start):
            to[seen] += columns[:, :, u, v]
    return padded[..., padding[0] : padding[0] + size[0], padding[1] : padding[1] + size[1]]


def _correlate_weight(grad, x, shape, stride, padding, dilation, groups):
    """The gradient of a weight of ``shape`` from those of the output, grad (B, O, oh, ow), and x."""
    counts = grad.shape[2:]
    view = _windows(pad_image(x, padding), shape[2:], stride, dilation, counts)
    total = np.zeros((groups, shape[0] // groups, int(np.prod(shape[1:]))), grad.dtype)
    given = grad.reshape(len(grad), groups, shape[0] // groups, *counts)
    for images, rows in _blocks_of(view):
        part = view[images, :, rows]
        part = part.reshape(len(part), groups, shape[1], *part.shape[2:]).transpose(1, 0, 3, 4, 2, 5, 6)
        columns = part.reshape(groups, -1, total.shape[2]) if part.size else np.zeros((groups, 0, total.shape[2]))
        rows_of = given[images, :, :, rows].transpose(1, 2, 0, 3, 4).reshape(*total.shape[:2], columns.shape[1])
        total += rows_of @ columns.astype(total.dtype, copy=False)
    return total.reshape(shape)


def _checked(name, x, weight, bias, groups, inputs, outputs):
    """ShapeError unless x has ``inputs`` channels and the bias, if any, one for each of ``outputs``."""
    expected = f"x (B, {inputs}, H, W), weight of four axes, channels divisible by the {groups} groups"
    if x.ndim != 4 or weight.ndim != 4 or groups < 1 or len(weight) % groups or x.shape[1] != inputs:
        raise ShapeError(f"{name}: x {x.shape}, weight {weight.shape}; expected {expected}")
    if bias is not None and bias.shape != (outputs,):
        raise ShapeError(f"{name}: bias {bias.shape}; expected ({outputs},)")


# ---------------------------------------------------------------------- conv2d, conv1d
def _conv2d_forward(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """Convolution of images: x (B, C, H, W), weight (O, C/groups, kh, kw), bias (O,) or None → (B, O, oh, ow).

    stride, padding (zeros on each side), dilation : one number, or one for rows and one for columns.
    groups : runs of channels that see each other; C of them make it depthwise.
    oh = (H + 2 padding - dilation (kh - 1) - 1) // stride + 1.  Raises ShapeError.
    """
    channels = weight.shape[1] * groups if weight.ndim == 4 else "C"
    _checked("conv2d", x, weight, bias, groups, channels, len(weight))
    plan = pair(stride), pair(padding), pair(dilation), groups
    y = _correlate(x, weight, *plan)
    if bias is not None:
        y += bias[:, None, None]
    return y, (x, weight, plan)


def _conv2d_vjp(grad, saved, needs):
    x, weight, plan = saved
    to_x = _spread(grad, weight, x.shape[2:], *plan) if needs[0] else None
    to_weight = _correlate_weight(grad, x, weight.shape, *plan) if needs[1] else None
    return to_x, to_weight, grad.sum(axis=(0, 2, 3)) if len(needs) > 2 and needs[2] else None


def _conv2d_reference(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    (sh, sw), (ph, pw), (dh, dw) = pair(stride), pair(padding), pair(dilation)
    x = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    out, inner, kh, kw = weight.shape
    rows = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
    columns = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    y = np.zeros((len(x), out, rows, columns))
    for o in range(out):
        first = o // (out // groups) * inner
        for i in range(rows):
            for j in range(columns):
                seen = x[:, first : first + inner, i * sh :: dh, j * sw :: dw][:, :, :kh, :kw]
                y[:, o, i, j] = (seen * weight[o]).sum(axis=(1, 2, 3))
    return y + (0 if bias is None else bias[:, None, None])


def _conv2d_samples(rng):
    def draw(x, weight, bias=True):
        return rng.standard_normal(x), rng.standard_normal(weight), rng.standard_normal(weight[0]) if bias else None

    yield draw((2, 2, 4, 4), (3, 2, 2, 2)), {"stride": 2}
    yield draw((1, 2, 5, 4), (2, 2, 3, 2), False), {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
    yield draw((2, 4, 3, 3), (4, 2, 2, 3)), {"padding": 1, "groups": 2}
    yield draw((1, 3, 3, 4), (6, 1, 2, 2)), {"groups": 3}
    yield draw((2, 3, 2, 2), (2, 3, 1, 1)), {}
    x, weight, _ = draw((0, 2, 3, 3), (1, 2, 2, 2))
    yield (x, weight, None), {}
    x, weight, bias = draw((3, 4, 2, 1), (2, 3, 2, 2))
    yield (x.transpose(3, 2, 1, 0)[:, :, ::-1].repeat(2, 1)[:, :3], weight, bias), {}


conv2d = primitive("conv2d", _conv2d_forward, _conv2d_vjp, reference=_conv2d_reference, samples=_conv2d_samples,
                   weak=True)


def conv1d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """Convolution of sequences: x (B, C, L), weight (O, C/groups, K), bias (O,) or None → (B, O, length).

    See :func:`conv2d`.  For one that sees no future and carries a state, see :func:`causal_conv1d`.
    """
    if len(x.shape) != 3 or len(weight.shape) != 3:
        raise ShapeError(f"conv1d: x {tuple(x.shape)}, weight {tuple(weight.shape)}; expected (B, C, L), (O, C, K)")
    y = conv2d(expand_dims(x, 2), expand_dims(weight, 2), bias, stride=(1, stride), padding=(0, padding),
               dilation=(1, dilation), groups=groups)
    return squeeze(y, 2)


# ---------------------------------------------------------------------- the transpose
def _conv_transpose2d_forward(x, weight, bias=None, stride=1, padding=0, output_padding=0, dilation=1, groups=1):
    """The transpose of :func:`conv2d` as a layer: each pixel of x adds a multiple of the kernel to the output.

    x (B, C, H, W), weight (C, O/groups, kh, kw), bias (O,) or None → (B, O, oh, ow) with
    oh = (H - 1) stride - 2 padding + dilation (kh - 1) + output_padding + 1.  Raises ShapeError.
    """
    outputs = weight.shape[1] * groups if weight.ndim == 4 else "O"
    _checked("conv_transpose2d", x, weight, bias, groups, len(weight), outputs)
    plan = pair(stride), pair(padding), pair(dilation), groups
    settings = zip(x.shape[2:], weight.shape[2:], *plan[:3], pair(output_padding))
    size = tuple((n - 1) * s - 2 * p + d * (k - 1) + more + 1 for n, k, s, p, d, more in settings)
    if output_size("conv_transpose2d", size, weight.shape[2:], *plan[:3]) != x.shape[2:]:
        raise ShapeError(f"conv_transpose2d: output_padding {output_padding} is not less than stride {stride}")
    y = _spread(x, weight, size, *plan)
    return y + bias[:, None, None] if bias is not None else y, (x, weight, plan)


def _conv_transpose2d_vjp(grad, saved, needs):
    x, weight, plan = saved
    to_x = _correlate(grad, weight, *plan) if needs[0] else None
    to_weight = _correlate_weight(x, grad, weight.shape, *plan) if needs[1] else None
    return to_x, to_weight, grad.sum(axis=(0, 2, 3)) if len(needs) > 2 and needs[2] else None


def _conv_transpose2d_reference(x, weight, bias=None, stride=1, padding=0, output_padding=0, dilation=1, groups=1):
    (sh, sw), (ph, pw), (eh, ew), (dh, dw) = map(pair, (stride, padding, output_padding, dilation))
    images, channels, h, w = x.shape
    _, inner, kh, kw = weight.shape
    full = (h - 1) * sh + dh * (kh - 1) + eh + 1, (w - 1) * sw + dw * (kw - 1) + ew + 1
    y = np.zeros((images, inner * groups, *full))
    for c in range(channels):
        first = c // (channels // groups) * inner
        for i, j in np.ndindex(h, w):
            y[:, first : first + inner, i * sh :: dh, j * sw :: dw][:, :, :kh, :kw] += (
                x[:, c, i, j, None, None, None] * weight[c]
            )
    y = y[:, :, ph : full[0] - ph, pw : full[1] - pw]
    return y + (0 if bias is None else bias[:, None, None])


def _conv_transpose2d_samples(rng):
    def draw(x, weight, outputs):
        return tuple(rng.standard_normal(shape) for shape in (x, weight, outputs))

    yield draw((2, 2, 2, 3), (2, 3, 2, 2), 3), {"stride": 2}
    yield draw((1, 2, 3, 2), (2, 2, 3, 2), 2), {"stride": (2, 3), "padding": 1, "dilation": (1, 2),
                                               "output_padding": (1, 2)}
    yield draw((1, 4, 2, 2), (4, 1, 2, 2), 2), {"groups": 2}


conv_transpose2d = primitive("conv_transpose2d", _conv_transpose2d_forward, _conv_transpose2d_vjp,
                             reference=_conv_transpose2d_reference, samples=_conv_transpose2d_samples, weak=True)


# ---------------------------------------------------------------------- windows as columns
def _columns(x, kernel, plan):
    counts = output_size("unfold", x.shape[2:], kernel, *plan)
    view = _windows(pad_image(x, plan[1]), kernel, plan[0], plan[2], counts)
    size = x.shape[1] * kernel[0] * kernel[1], counts[0] * counts[1]
    return view.transpose(0, 1, 4, 5, 2, 3).reshape(len(x), *size)


def _images(columns, size, kernel, plan):
    stride, padding, dilation = plan
    counts = output_size("fold", size, kernel, *plan)
    channels = columns.shape[1] // (kernel[0] * kernel[1])
    if columns.shape[1:] != (channels * kernel[0] * kernel[1], counts[0] * counts[1]):
        raise ShapeError(f"fold: x {columns.shape} does not hold {counts} windows of {kernel} over {size}")
    parts = columns.reshape(len(columns), channels, *kernel, *counts)
    padded = np.zeros((len(columns), channels, *(n + 2 * p for n, p in zip(size, padding))), columns.dtype)
    for (u, v), seen in taps(kernel, stride, dilation, counts):
        padded[seen] += parts[:, :, u, v]
    return padded[..., padding[0] : padding[0] + size[0], padding[1] : padding[1] + size[1]]


def _unfold_forward(x, kernel_size, stride=1, padding=0, dilation=1):
    """Every window of an image as a column: x (B, C, H, W) → (B, C · kh · kw, oh · ow).

    Multiplied by a flattened weight, this is :func:`conv2d`.  Raises ShapeError.
    """
    if x.ndim != 4:
        raise ShapeError(f"unfold: x {x.shape}; expected (B, C, H, W) (for one axis, see windows)")
    kernel, plan = pair(kernel_size), (pair(stride), pair(padding), pair(dilation))
    return _columns(x, kernel, plan), (x.shape[2:], kernel, plan)


def _unfold_vjp(grad, saved, needs):
    return (_images(grad, *saved),)


def _unfold_reference(x, kernel_size, stride=1, padding=0, dilation=1):
    taken = np.eye(x.shape[1] * np.prod(pair(kernel_size))).reshape(-1, x.shape[1], *pair(kernel_size))
    y = _conv2d_reference(x, taken, None, stride, padding, dilation)
    return y.reshape(*y.shape[:2], -1)


UNFOLD = {"kernel_size": (2, 3), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}


def _unfold_samples(rng):
    yield (rng.standard_normal((2, 2, 4, 6)),), UNFOLD
    yield (rng.standard_normal((1, 2, 3, 3)),), {"kernel_size": 1}
    yield (rng.standard_normal((3, 4, 2, 1)).T,), {"kernel_size": 3}


unfold = primitive("unfold", _unfold_forward, _unfold_vjp, reference=_unfold_reference, samples=_unfold_samples)


def _fold_forward(x, output_size, kernel_size, stride=1, padding=0, dilation=1):
    """The transpose of :func:`unfold`: windows (B, C · kh · kw, oh · ow) summed where they overlap → (B, C, H, W).

    output_size : (H, W).  Raises ShapeError.
    """
    kernel, plan = pair(kernel_size), (pair(stride), pair(padding), pair(dilation))
    return _images(x, pair(output_size), kernel, plan), (kernel, plan)


def _fold_vjp(grad, saved, needs):
    return (_columns(grad, *saved),)


def _fold_reference(x, output_size, kernel_size, stride=1, padding=0, dilation=1):
    channels = x.shape[1] // np.prod(pair(kernel_size))
    units = np.eye(channels * np.prod(pair(output_size))).reshape(-1, channels, *pair(output_size))
    matrix = _unfold_reference(units, kernel_size, stride, padding, dilation).reshape(len(units), -1)
    return (x.reshape(len(x), -1) @ matrix.T).reshape(len(x), channels, *pair(output_size))


def _fold_samples(rng):
    yield (rng.standard_normal((2, 6, 6)),), {"output_size": (4, 6), **UNFOLD}
    yield (rng.standard_normal((1, 8, 4)),), {"output_size": 3, "kernel_size": 2}


fold = primitive("fold", _fold_forward, _fold_vjp, reference=_fold_reference, samples=_fold_samples)


def patchify(x, size):
    """Images (B, C, H, W) as rows of patches (B, H/p · W/p, C · p · q), each flattened like a conv weight.

    size : p, or (p, q).  Raises ShapeError if patches do not tile the image.
    """
    p, q = pair(size)
    if len(x.shape) != 4 or x.shape[2] % p or x.shape[3] % q:
        raise ShapeError(f"patchify: patches of {p} × {q} do not tile images {tuple(x.shape)}")
    b, c, h, w = x.shape
    parts = transpose(reshape(x, shape=(b, c, h // p, p, w // q, q)), axes=(0, 2, 4, 1, 3, 5))
    return reshape(parts, shape=(b, h // p * (w // q), c * p * q))
