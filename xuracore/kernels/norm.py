"""Layer norm of ``(rows, width)`` arrays and RMS norm of ``(rows, groups, width)``, over the last axis.

Layer norm (Ba et al. 2016):   n = (x - mean) / sqrt(var + eps),   y = n w + b
RMS norm (Zhang & Sennrich 2019):   n = x / sqrt(mean(x²) + eps),   y = n w

Backward, with d = grad·w and r the reciprocal deviation, per row:

    layer norm   dx = r (d - mean(d) - n mean(d n))        dw = Σ_rows grad n,   db = Σ_rows grad
    RMS norm     dx = r (d - n mean(d n))                  dw = Σ_rows grad n

One group is the ordinary RMS norm; Mamba-2 norms in groups.  The gated form multiplies by silu(z) either
before or after normalising:

    gate first   y = norm(x silu(z)) w          norm first   y = norm(x) w silu(z)

Sums over rows are taken as partial sums, one per block of rows, that the caller adds up: the number of
blocks depends on the shape alone, so the result does not depend on the thread count.  Everything is
C-contiguous, of one float dtype; outputs are allocated by the caller.  Each index runs from zero:
where Numba cannot see that an index is not negative, it handles negative ones, and the loop stays scalar.
"""

import numpy as np

from xuracore.jit import REDUCE, kernel, prange
from xuracore.kernels.fastmath import sigmoid, silu


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
    """y like x (rows, groups, width), rstd (rows, groups); weight (groups, width)."""
    rstd[...] = 1 / np.sqrt(np.mean(x * x, axis=2) + eps)
    y[...] = x * rstd[:, :, None] * weight


@kernel(twin=rms_norm_forward_numpy, parallel=True, fastmath=REDUCE)
def rms_norm_forward(x, weight, eps, y, rstd):
    rows, groups, width = x.shape
    number = x.dtype.type
    share, small = number(1 / width), number(eps)
    for i in prange(rows):
        for g in range(groups):
            square = number(0)
            for j in range(width):
                square += x[i, g, j] * x[i, g, j]
            scale = number(1) / np.sqrt(square * share + small)
            for j in range(width):
                y[i, g, j] = x[i, g, j] * scale * weight[g, j]
            rstd[i, g] = scale


def rms_norm_backward_numpy(grad, x, weight, rstd, dx, dweight):
    """dx (rows, groups, width); dweight (blocks, groups, width) holds partial sums over rows."""
    normal = x * rstd[:, :, None]
    d = grad * weight
    dx[...] = rstd[:, :, None] * (d - normal * np.mean(d * normal, axis=2, keepdims=True))
    for block, part in enumerate(_block_slices(len(x), len(dweight))):
        dweight[block] = np.sum(grad[part] * normal[part], axis=0)


@kernel(twin=rms_norm_backward_numpy, parallel=True, fastmath=REDUCE)
def rms_norm_backward(grad, x, weight, rstd, dx, dweight):
    rows, groups, width = x.shape
    blocks = dweight.shape[0]
    number = x.dtype.type
    share = number(1 / width)
    for index in prange(blocks):
        block = np.int64(index)
        for g in range(groups):
            for j in range(width):
                dweight[block, g, j] = number(0)
            for i in range(rows * block // blocks, rows * (block + 1) // blocks):
                scale = rstd[i, g]
                along = number(0)
                for j in range(width):
                    along += grad[i, g, j] * weight[g, j] * x[i, g, j]
                along *= share * scale
                for j in range(width):
                    normal = x[i, g, j] * scale
                    dweight[block, g, j] += grad[i, g, j] * normal
                    dx[i, g, j] = scale * (grad[i, g, j] * weight[g, j] - normal * along)


def _gate_numpy(z):
    """silu(z) and its derivative."""
    e = np.exp(-np.abs(z))
    s = np.where(z >= 0, 1 / (1 + e), e / (1 + e))
    return z * s, s * (1 + z * (1 - s))


def gated_rms_norm_forward_numpy(x, z, weight, eps, norm_first, y, rstd):
    """As :func:`rms_norm_forward_numpy`, with the gate z (rows, groups, width)."""
    gate, _ = _gate_numpy(z)
    if norm_first:
        rms_norm_forward_numpy(x, weight, eps, y, rstd)
        y *= gate
    else:
        rms_norm_forward_numpy(x * gate, weight, eps, y, rstd)


@kernel(twin=gated_rms_norm_forward_numpy, parallel=True, fastmath=REDUCE)
def gated_rms_norm_forward(x, z, weight, eps, norm_first, y, rstd):
    rows, groups, width = x.shape
    number = x.dtype.type
    share, small = number(1 / width), number(eps)
    for i in prange(rows):
        for g in range(groups):
            square = number(0)
            for j in range(width):
                y[i, g, j] = x[i, g, j] * silu(z[i, g, j])
            if norm_first:
                for j in range(width):
                    square += x[i, g, j] * x[i, g, j]
            else:
                for j in range(width):
                    square += y[i, g, j] * y[i, g, j]
            scale = number(1) / np.sqrt(square * share + small)
            for j in range(width):
                y[i, g, j] *= scale * weight[g, j]
            rstd[i, g] = scale


def gated_rms_norm_backward_numpy(grad, x, z, weight, norm_first, rstd, dx, dz, dweight):
    """As :func:`rms_norm_backward_numpy`, with the gradient dz of the gate."""
    gate, slope = _gate_numpy(z)
    if norm_first:
        rms_norm_backward_numpy(grad * gate, x, weight, rstd, dx, dweight)
        dz[...] = grad * weight * x * rstd[:, :, None] * slope
    else:
        rms_norm_backward_numpy(grad, x * gate, weight, rstd, dx, dweight)
        dz[...] = dx * x * slope
        dx *= gate


@kernel(twin=gated_rms_norm_backward_numpy, parallel=True, fastmath=REDUCE)
def gated_rms_norm_backward(grad, x, z, weight, norm_first, rstd, dx, dz, dweight):
    rows, groups, width = x.shape
    blocks = dweight.shape[0]
    number = x.dtype.type
    one, share = number(1), number(1 / width)
    for index in prange(blocks):
        block = np.int64(index)
        for g in range(groups):
            for j in range(width):
                dweight[block, g, j] = number(0)
            for i in range(rows * block // blocks, rows * (block + 1) // blocks):
                scale = rstd[i, g]
                along = number(0)
                for j in range(width):  # both orders need Σ grad w x silu(z); dz keeps the sigmoid meanwhile
                    s = sigmoid(z[i, g, j])
                    dz[i, g, j] = s
                    dweight[block, g, j] += grad[i, g, j] * x[i, g, j] * scale * z[i, g, j] * s
                for j in range(width):
                    along += grad[i, g, j] * weight[g, j] * x[i, g, j] * z[i, g, j] * dz[i, g, j]
                along *= share * scale
                if norm_first:
                    for j in range(width):
                        s, d = dz[i, g, j], grad[i, g, j] * weight[g, j]
                        gate, normal = z[i, g, j] * s, x[i, g, j] * scale
                        dx[i, g, j] = scale * (d * gate - normal * along)
                        dz[i, g, j] = d * normal * (s + gate * (one - s))
                else:
                    for j in range(width):
                        s, d = dz[i, g, j], grad[i, g, j] * weight[g, j]
                        gate = z[i, g, j] * s
                        inner = scale * (d - x[i, g, j] * gate * scale * along)
                        dx[i, g, j] = inner * gate
                        dz[i, g, j] = inner * x[i, g, j] * (s + gate * (one - s))
