"""Layer norm and RMS norm over the last axis of ``(rows, width)`` arrays.

Layer norm (Ba et al. 2016):   n = (x - mean) / sqrt(var + eps),   y = n w + b
RMS norm (Zhang & Sennrich 2019):   n = x / sqrt(mean(x²) + eps),   y = n w

Backward, with d = grad·w and r the reciprocal deviation, per row:

    layer norm   dx = r (d - mean(d) - n mean(d n))        dw = Σ_rows grad n,   db = Σ_rows grad
    RMS norm     dx = r (d - n mean(d n))                  dw = Σ_rows grad n

RMS norm works in ``groups`` of equal width (one group is the ordinary norm; Mamba-2 gates and norms
in groups), and the gated form multiplies by silu(z) either before or after normalising:

    gate first   y = norm(x silu(z)) w          norm first   y = norm(x) w silu(z)

Sums over rows are taken as ``(blocks, width)`` partial sums that the caller adds up: the
number of blocks depends on the shape alone, so the result does not depend on the thread count.
Everything is C-contiguous, of one float dtype; outputs are allocated by the caller.
"""

import numpy as np

from xuracore.jit import REDUCE, kernel, prange
from xuracore.kernels.fastmath import sigmoid


def row_blocks(rows):
    """How many partial sums to keep for ``rows`` rows: at most 8, at least 64 rows each."""
    return max(1, min(8, rows // 64))


def _block_slices(rows, blocks):
    edges = [rows * block // blocks for block in range(blocks + 1)]
    return [slice(start, stop) for start, stop in zip(edges, edges[1:])]


def layer_norm_forward_numpy(x, weight, bias, eps, y, mean, rstd):
    """y (rows, width), mean and rstd (rows,) from x (rows, width), weight and bias (width,)."""
    mean[...] = x.mean(axis=1)
    centred = x - mean[:, None]
    rstd[...] = 1 / np.sqrt(np.mean(centred * centred, axis=1) + eps)
    y[...] = centred * rstd[:, None] * weight + bias


@kernel(twin=layer_norm_forward_numpy, parallel=True, fastmath=REDUCE)
def layer_norm_forward(x, weight, bias, eps, y, mean, rstd):
    rows, width = x.shape
    number = x.dtype.type
    share, small = number(1 / width), number(eps)
    for i in prange(rows):
        total = number(0)
        for j in range(width):
            total += x[i, j]
        centre = total * share
        square = number(0)
        for j in range(width):
            square += (x[i, j] - centre) * (x[i, j] - centre)
        scale = number(1) / np.sqrt(square * share + small)
        for j in range(width):
            y[i, j] = (x[i, j] - centre) * scale * weight[j] + bias[j]
        mean[i] = centre
        rstd[i] = scale


def layer_norm_backward_numpy(grad, x, weight, mean, rstd, dx, dweight, dbias):
    """dx (rows, width); dweight and dbias (blocks, width) are partial sums over rows."""
    normal = (x - mean[:, None]) * rstd[:, None]
    d = grad * weight
    along = np.mean(d * normal, axis=1, keepdims=True)
    dx[...] = rstd[:, None] * (d - d.mean(axis=1, keepdims=True) - normal * along)
    for block, rows in enumerate(_block_slices(len(x), len(dweight))):
        dweight[block] = np.sum(grad[rows] * normal[rows], axis=0)
        dbias[block] = np.sum(grad[rows], axis=0)


@kernel(twin=layer_norm_backward_numpy, parallel=True, fastmath=REDUCE)
def layer_norm_backward(grad, x, weight, mean, rstd, dx, dweight, dbias):
    rows, width = x.shape
    blocks = dweight.shape[0]
    number = x.dtype.type
    share = number(1 / width)
    for index in prange(blocks):
        block = np.int64(index)
        for j in range(width):
            dweight[block, j] = number(0)
            dbias[block, j] = number(0)
        for i in range(rows * block // blocks, rows * (block + 1) // blocks):
            centre, scale = mean[i], rstd[i]
            total, along = number(0), number(0)
            for j in range(width):
                d = grad[i, j] * weight[j]
                total += d
                along += d * ((x[i, j] - centre) * scale)
            total *= share
            along *= share
            for j in range(width):
                normal = (x[i, j] - centre) * scale
                dweight[block, j] += grad[i, j] * normal
                dbias[block, j] += grad[i, j]
                dx[i, j] = scale * (grad[i, j] * weight[j] - total - normal * along)


def rms_norm_forward_numpy(x, weight, eps, y, rstd):
    """y (rows, width) and rstd (rows, groups) from x (rows, width), weight (width,)."""
    rows, groups = rstd.shape
    grouped = x.reshape(rows, groups, x.shape[1] // groups)
    rstd[...] = 1 / np.sqrt(np.mean(grouped * grouped, axis=2) + eps)
    y[...] = (grouped * rstd[:, :, None]).reshape(x.shape) * weight


@kernel(twin=rms_norm_forward_numpy, parallel=True, fastmath=REDUCE)
def rms_norm_forward(x, weight, eps, y, rstd):
    rows, groups = rstd.shape
    width = x.shape[1] // groups
    number = x.dtype.type
    share, small = number(1 / width), number(eps)
    for i in prange(rows):
        for g in range(groups):
            square = number(0)
            for j in range(g * width, (g + 1) * width):
                square += x[i, j] * x[i, j]
            scale = number(1) / np.sqrt(square * share + small)
            for j in range(g * width, (g + 1) * width):
                y[i, j] = x[i, j] * scale * weight[j]
            rstd[i, g] = scale


def rms_norm_backward_numpy(grad, x, weight, rstd, dx, dweight):
    """dx (rows, width); dweight (blocks, width) holds partial sums over rows."""
    rows, groups = rstd.shape
    normal = x.reshape(rows, groups, x.shape[1] // groups) * rstd[:, :, None]
    d = (grad * weight).reshape(normal.shape)
    along = np.mean(d * normal, axis=2, keepdims=True)
    dx[...] = (rstd[:, :, None] * (d - normal * along)).reshape(x.shape)
    normal = normal.reshape(x.shape)
    for block, part in enumerate(_block_slices(rows, len(dweight))):
        dweight[block] = np.sum(grad[part] * normal[part], axis=0)


@kernel(twin=rms_norm_backward_numpy, parallel=True, fastmath=REDUCE)
def rms_norm_backward(grad, x, weight, rstd, dx, dweight):
    rows, groups = rstd.shape
    width = x.shape[1] // groups
    blocks = dweight.shape[0]
    number = x.dtype.type
    share = number(1 / width)
    for index in prange(blocks):
        block = np.int64(index)
        for j in range(groups * width):
            dweight[block, j] = number(0)
        for i in range(rows * block // blocks, rows * (block + 1) // blocks):
            for g in range(groups):
                scale = rstd[i, g]
                along = number(0)
                for j in range(g * width, (g + 1) * width):
                    along += grad[i, j] * weight[j] * x[i, j]
                along *= share * scale
                for j in range(g * width, (g + 1) * width):
                    normal = x[i, j] * scale
                    dweight[block, j] += grad[i, j] * normal
                    dx[i, j] = scale * (grad[i, j] * weight[j] - normal * along)


def _gate_numpy(z):
    """silu(z) and its derivative."""
    e = np.exp(-np.abs(z))
    s = np.where(z >= 0, 1 / (1 + e), e / (1 + e))
    return z * s, s * (1 + z * (1 - s))


def gated_rms_norm_forward_numpy(x, z, weight, eps, norm_first, y, rstd):
    """y (rows, width) and rstd (rows, groups) from x, z (rows, width), weight (width,)."""
    gate, _ = _gate_numpy(z)
    if norm_first:
        rms_norm_forward_numpy(x, weight, eps, y, rstd)
        y *= gate
    else:
        rms_norm_forward_numpy(x * gate, weight, eps, y, rstd)


@kernel(twin=gated_rms_norm_forward_numpy, parallel=True, fastmath=REDUCE)
def gated_rms_norm_forward(x, z, weight, eps, norm_first, y, rstd):
    rows, groups = rstd.shape
    width = x.shape[1] // groups
    number = x.dtype.type
    share, small = number(1 / width), number(eps)
    for i in prange(rows):
        for g in range(groups):
            square = number(0)
            if norm_first:
                for j in range(g * width, (g + 1) * width):
                    square += x[i, j] * x[i, j]
                    y[i, j] = x[i, j] * z[i, j] * sigmoid(z[i, j])
            else:
                for j in range(g * width, (g + 1) * width):
                    gated = x[i, j] * z[i, j] * sigmoid(z[i, j])
                    square += gated * gated
                    y[i, j] = gated
            scale = number(1) / np.sqrt(square * share + small)
            for j in range(g * width, (g + 1) * width):
                y[i, j] *= scale * weight[j]
            rstd[i, g] = scale


def gated_rms_norm_backward_numpy(grad, x, z, weight, norm_first, rstd, dx, dz, dweight):
    """dx, dz (rows, width); dweight (blocks, width) holds partial sums over rows."""
    gate, slope = _gate_numpy(z)
    if norm_first:
        rms_norm_backward_numpy(grad * gate, x, weight, rstd, dx, dweight)
        normal = x.reshape(*rstd.shape, x.shape[1] // rstd.shape[1]) * rstd[:, :, None]
        dz[...] = grad * weight * normal.reshape(x.shape) * slope
    else:
        rms_norm_backward_numpy(grad, x * gate, weight, rstd, dx, dweight)
        dz[...] = dx * x * slope
        dx *= gate


@kernel(twin=gated_rms_norm_backward_numpy, parallel=True, fastmath=REDUCE)
def gated_rms_norm_backward(grad, x, z, weight, norm_first, rstd, dx, dz, dweight):
    rows, groups = rstd.shape
    width = x.shape[1] // groups
    blocks = dweight.shape[0]
    number = x.dtype.type
    one, share = number(1), number(1 / width)
    for index in prange(blocks):
        block = np.int64(index)
        for j in range(groups * width):
            dweight[block, j] = number(0)
        for i in range(rows * block // blocks, rows * (block + 1) // blocks):
            for g in range(groups):
                scale = rstd[i, g]
                along = number(0)
                for j in range(g * width, (g + 1) * width):  # both orders need Σ grad w x silu(z)
                    gate = z[i, j] * sigmoid(z[i, j])
                    along += grad[i, j] * weight[j] * x[i, j] * gate
                along *= share * scale
                for j in range(g * width, (g + 1) * width):
                    s = sigmoid(z[i, j])
                    gate = z[i, j] * s
                    slope = s + gate * (one - s)
                    d = grad[i, j] * weight[j]
                    dweight[block, j] += grad[i, j] * x[i, j] * scale * gate
                    if norm_first:
                        normal = x[i, j] * scale
                        dx[i, j] = scale * (d * gate - normal * along)
                        dz[i, j] = d * normal * slope
                    else:
                        inner = scale * (d - x[i, j] * gate * scale * along)
                        dx[i, j] = inner * gate
                        dz[i, j] = inner * x[i, j] * slope
