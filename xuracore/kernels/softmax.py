"""Softmax and log-softmax over the last axis of ``(rows, width)`` arrays, with their derivatives.

    softmax       p_j = e^(x_j - m) / Σ_i e^(x_i - m),   dx = p (grad - Σ grad p)
    log-softmax   l_j = x_j - m - log Σ_i e^(x_i - m),   dx = grad - e^l Σ grad

The row maximum m is taken over integers that are ordered like the scores, because LLVM will not vectorise a
maximum of floats that must keep NaN.  A score far below the maximum, -inf in particular, has weight exactly
zero.  Arrays are C-contiguous, of one float dtype; outputs are allocated by the caller.
"""

import numpy as np

from xuracore.jit import REDUCE, kernel, prange
from xuracore.kernels.fastmath import exp, log, order, unorder

LOWEST = -87.0  # in float32 the vectorised exp saturates here; what lies below counts as zero


def softmax_forward_numpy(x, y):
    """y from x, both (rows, width) with at least one column."""
    np.exp(x - x.max(axis=1, keepdims=True), out=y)
    y /= np.sum(y, axis=1, keepdims=True)


@kernel(twin=softmax_forward_numpy, parallel=True, fastmath=REDUCE)
def softmax_forward(x, y):
    rows, width = x.shape
    number = x.dtype.type
    zero, lowest = number(0), number(LOWEST)
    for i in prange(rows):
        best = order(x[i, 0])
        for j in range(width):
            place = order(x[i, j])
            best = place if place > best else best
        top = unorder(x[i, 0], best)
        for j in range(width):
            shifted = x[i, j] - top
            e = exp(shifted)
            y[i, j] = zero if shifted < lowest else e
        total = zero
        for j in range(width):
            total += y[i, j]
        scale = number(1) / total
        for j in range(width):
            y[i, j] *= scale


def softmax_backward_numpy(grad, y, dx):
    dx[...] = y * (grad - np.sum(grad * y, axis=1, keepdims=True))


@kernel(twin=softmax_backward_numpy, parallel=True, fastmath=REDUCE)
def softmax_backward(grad, y, dx):
    rows, width = y.shape
    for i in prange(rows):
        along = y.dtype.type(0)
        for j in range(width):
            along += grad[i, j] * y[i, j]
        for j in range(width):
            dx[i, j] = y[i, j] * (grad[i, j] - along)


def log_softmax_forward_numpy(x, y):
    """y from x, both (rows, width) with at least one column."""
    np.subtract(x, x.max(axis=1, keepdims=True), out=y)
    y -= np.log(np.sum(np.exp(y), axis=1, keepdims=True))


@kernel(twin=log_softmax_forward_numpy, parallel=True, fastmath=REDUCE)
def log_softmax_forward(x, y):
    rows, width = x.shape
    zero = x.dtype.type(0)
    for i in prange(rows):
        best = order(x[i, 0])
        for j in range(width):
            place = order(x[i, j])
            best = place if place > best else best
        top = unorder(x[i, 0], best)
        total = zero
        for j in range(width):
            total += exp(x[i, j] - top)
        shift = log(total)
        for j in range(width):
            y[i, j] = (x[i, j] - top) - shift


def log_softmax_backward_numpy(grad, y, dx):
    dx[...] = grad - np.exp(y) * np.sum(grad, axis=1, keepdims=True)


@kernel(twin=log_softmax_backward_numpy, parallel=True, fastmath=REDUCE)
def log_softmax_backward(grad, y, dx):
    rows, width = y.shape
    for i in prange(rows):
        total = y.dtype.type(0)
        for j in range(width):
            total += grad[i, j]
        for j in range(width):
            dx[i, j] = grad[i, j] - exp(y[i, j]) * total
