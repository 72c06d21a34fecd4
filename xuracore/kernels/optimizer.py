"""Fused optimizer updates on flat arrays: one pass over memory instead of a dozen.

Parameter, gradient and moments are C-contiguous one-dimensional arrays of one float dtype and equal
length; parameter and moments are changed in place.
"""

import math

import numpy as np

from xuracore.jit import REDUCE, kernel, prange


def adamw_update_numpy(
    parameter, grad, mean, square, rate, beta1, beta2, eps, decay, correction1, correction2
):
    """One step of AdamW (Loshchilov & Hutter 2019), decoupled weight decay.

        m ← β₁ m + (1-β₁) g,   v ← β₂ v + (1-β₂) g²
        θ ← θ (1 - rate·decay) - rate · (m / correction₁) / (sqrt(v / correction₂) + eps)

    where correctionᵢ = 1 - βᵢ^step undoes the bias of moments that started from zero.
    """
    mean *= beta1
    mean += (1 - beta1) * grad
    square *= beta2
    square += (1 - beta2) * grad * grad
    parameter *= 1 - rate * decay
    parameter -= (rate / correction1) * mean / (np.sqrt(square) / math.sqrt(correction2) + eps)


@kernel(twin=adamw_update_numpy, parallel=True)
def adamw_update(parameter, grad, mean, square, rate, beta1, beta2, eps, decay, correction1, correction2):
    number = parameter.dtype.type
    keep1, keep2 = number(beta1), number(beta2)
    take1, take2 = number(1 - beta1), number(1 - beta2)
    shrink, step = number(1 - rate * decay), number(rate / correction1)
    widen, small = number(1 / np.sqrt(correction2)), number(eps)
    for i in prange(parameter.size):
        g = grad[i]
        m = keep1 * mean[i] + take1 * g
        v = keep2 * square[i] + take2 * g * g
        mean[i] = m
        square[i] = v
        parameter[i] = shrink * parameter[i] - step * m / (np.sqrt(v) * widen + small)


def sum_of_squares_numpy(x, out):
    """out[0] = Σ x², in float64; x (n,), out (1,) float64."""
    out[0] = np.sum(np.square(x, dtype=np.float64))


@kernel(twin=sum_of_squares_numpy, fastmath=REDUCE)
def sum_of_squares(x, out):
    total = 0.0
    for i in range(x.size):
        total += np.float64(x[i]) * np.float64(x[i])
    out[0] = total
