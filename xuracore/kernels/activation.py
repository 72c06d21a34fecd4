"""Elementwise activations and their derivatives on flat arrays.

    sigmoid σ(x) = 1 / (1 + e^-x)             silu x σ(x),        silu' = σ + x σ (1 - σ)
    softplus log(1 + e^x), derivative σ(x)    gelu x Φ(x),        gelu' = Φ + x φ
    gelu, tanh form (Hendrycks & Gimpel 2016):   x σ(2u),  u = sqrt(2/π) (x + 0.044715 x³),
    which is the familiar ½ x (1 + tanh u) written with one exponential.

All arrays are one-dimensional, C-contiguous, of one float dtype and equal length; the last one is
the output.  Forward takes (x, y), backward (grad, x, dx).
"""

import math

import numpy as np

from xuracore.jit import kernel, prange
from xuracore.kernels.fastmath import erf, exp, sigmoid, silu, softplus

ROOT_HALF = math.sqrt(0.5)
ROOT_TWO_OVER_PI = math.sqrt(2 / math.pi)
ONE_OVER_ROOT_TWO_PI = 1 / math.sqrt(2 * math.pi)
CUBIC = 0.044715

_erf_objects = np.frompyfunc(math.erf, 1, 1)


def sigmoid_numpy(x, y):
    e = np.exp(-np.abs(x))
    y[...] = np.where(x >= 0, 1 / (1 + e), e / (1 + e))


@kernel(twin=sigmoid_numpy, parallel=True)
def sigmoid_forward(x, y):
    for i in prange(x.size):
        y[i] = sigmoid(x[i])


def softplus_numpy(x, y):
    y[...] = np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


@kernel(twin=softplus_numpy, parallel=True)
def softplus_forward(x, y):
    for i in prange(x.size):
        y[i] = softplus(x[i])


def softplus_backward_numpy(grad, x, dx):
    sigmoid_numpy(x, dx)
    dx *= grad


@kernel(twin=softplus_backward_numpy, parallel=True)
def softplus_backward(grad, x, dx):
    for i in prange(x.size):
        dx[i] = grad[i] * sigmoid(x[i])


def silu_numpy(x, y):
    sigmoid_numpy(x, y)
    y *= x


@kernel(twin=silu_numpy, parallel=True)
def silu_forward(x, y):
    for i in prange(x.size):
        y[i] = silu(x[i])


def silu_backward_numpy(grad, x, dx):
    sigmoid_numpy(x, dx)
    dx *= grad * (1 + x * (1 - dx))


@kernel(twin=silu_backward_numpy, parallel=True)
def silu_backward(grad, x, dx):
    one = x.dtype.type(1)
    for i in prange(x.size):
        s = sigmoid(x[i])
        dx[i] = grad[i] * s * (one + x[i] * (one - s))


def erf_numpy(x, y):
    y[...] = _erf_objects(x)


@kernel(twin=erf_numpy, parallel=True)
def erf_forward(x, y):
    for i in prange(x.size):
        y[i] = erf(x[i])


def gelu_numpy(x, y):
    erf_numpy(x * ROOT_HALF, y)
    y[...] = 0.5 * x * (1 + y)


@kernel(twin=gelu_numpy, parallel=True)
def gelu_forward(x, y):
    number = x.dtype.type
    half, one, scale = number(0.5), number(1), number(ROOT_HALF)
    for i in prange(x.size):
        y[i] = half * x[i] * (one + erf(scale * x[i]))


def gelu_backward_numpy(grad, x, dx):
    erf_numpy(x * ROOT_HALF, dx)
    dx[...] = grad * (0.5 * (1 + dx) + x * ONE_OVER_ROOT_TWO_PI * np.exp(-0.5 * x * x))


@kernel(twin=gelu_backward_numpy, parallel=True)
def gelu_backward(grad, x, dx):
    number = x.dtype.type
    half, one, scale = number(0.5), number(1), number(ROOT_HALF)
    density = number(ONE_OVER_ROOT_TWO_PI)
    for i in prange(x.size):
        below = half * (one + erf(scale * x[i]))
        dx[i] = grad[i] * (below + x[i] * density * exp(-half * x[i] * x[i]))


def gelu_tanh_numpy(x, y):
    sigmoid_numpy(2 * ROOT_TWO_OVER_PI * x * (1 + CUBIC * x * x), y)
    y *= x


@kernel(twin=gelu_tanh_numpy, parallel=True)
def gelu_tanh_forward(x, y):
    number = x.dtype.type
    one, cubic, scale = number(1), number(CUBIC), number(2 * ROOT_TWO_OVER_PI)
    for i in prange(x.size):
        y[i] = x[i] * sigmoid(scale * x[i] * (one + cubic * x[i] * x[i]))


def gelu_tanh_backward_numpy(grad, x, dx):
    sigmoid_numpy(2 * ROOT_TWO_OVER_PI * x * (1 + CUBIC * x * x), dx)
    slope = 2 * ROOT_TWO_OVER_PI * (1 + 3 * CUBIC * x * x)
    dx *= grad * (1 + x * (1 - dx) * slope)


@kernel(twin=gelu_tanh_backward_numpy, parallel=True)
def gelu_tanh_backward(grad, x, dx):
    number = x.dtype.type
    one, cubic, scale = number(1), number(CUBIC), number(2 * ROOT_TWO_OVER_PI)
    steep = number(3 * CUBIC)
    for i in prange(x.size):
        square = x[i] * x[i]
        s = sigmoid(scale * x[i] * (one + cubic * square))
        slope = scale * (one + steep * square)
        dx[i] = grad[i] * s * (one + x[i] * (one - s) * slope)
