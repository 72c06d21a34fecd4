"""Elementwise activations and their derivatives on flat arrays.

    sigmoid σ(x) = 1 / (1 + e^-x)             silu x σ(x),        silu' = σ + x σ (1 - σ)
    softplus log(1 + e^x), derivative σ(x)    gelu x Φ(x),        gelu' = Φ + x φ
    gelu, tanh form (Hendrycks & Gimpel 2016):   x σ(2u),  u = sqrt(2/π) (x + 0.044715 x³),
    which is the familiar ½ x (1 + tanh u) written with one exponential.

The limits hold at the infinities, where the formulas alone give NaN: silu and gelu tend to -0.0 and x, their
derivatives to -0.0 and 1.

All arrays are one-dimensional, C-contiguous, of one float dtype and equal length; the last one is
the output.  Forward takes (x, y), backward (grad, x, dx).
"""

import math

import numpy as np

from xuracore.jit import kernel, prange
from xuracore.kernels.fastmath import (
    erf, gelu, gelu_slope, gelu_tanh, gelu_tanh_slope, sigmoid, silu, silu_slope, softplus,
)  # fmt: skip

ROOT_HALF = math.sqrt(0.5)
ROOT_TWO_OVER_PI = math.sqrt(2 / math.pi)
ONE_OVER_ROOT_TWO_PI = 1 / math.sqrt(2 * math.pi)
CUBIC = 0.044715

_erf_objects = np.frompyfunc(math.erf, 1, 1)
_erfc_objects = np.frompyfunc(math.erfc, 1, 1)


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
    y *= np.maximum(x, -800)  # -inf · 0 would be NaN


@kernel(twin=silu_numpy, parallel=True)
def silu_forward(x, y):
    for i in prange(x.size):
        y[i] = silu(x[i])


def silu_backward_numpy(grad, x, dx):
    sigmoid_numpy(x, dx)
    dx *= grad * (1 + np.clip(x, -800, 800) * (1 - dx))


@kernel(twin=silu_backward_numpy, parallel=True)
def silu_backward(grad, x, dx):
    for i in prange(x.size):
        dx[i] = grad[i] * silu_slope(x[i])


def erf_numpy(x, y):
    y[...] = _erf_objects(x)


@kernel(twin=erf_numpy, parallel=True)
def erf_forward(x, y):
    for i in prange(x.size):
        y[i] = erf(x[i])


def gelu_numpy(x, y):
    y[...] = 0.5 * np.maximum(x, -40) * _erfc_objects(-ROOT_HALF * x).astype(x.dtype)


@kernel(twin=gelu_numpy, parallel=True)
def gelu_forward(x, y):
    for i in prange(x.size):
        y[i] = gelu(x[i])


def gelu_backward_numpy(grad, x, dx):
    held = np.clip(x, -40, 40)
    below = 0.5 * _erfc_objects(-ROOT_HALF * held).astype(x.dtype)
    dx[...] = grad * (below + held * ONE_OVER_ROOT_TWO_PI * np.exp(-0.5 * held * held))


@kernel(twin=gelu_backward_numpy, parallel=True)
def gelu_backward(grad, x, dx):
    for i in prange(x.size):
        dx[i] = grad[i] * gelu_slope(x[i])


def gelu_tanh_numpy(x, y):
    held = np.clip(x, -30, 30)
    sigmoid_numpy(2 * ROOT_TWO_OVER_PI * held * (1 + CUBIC * held * held), y)
    y *= np.maximum(x, -30)


@kernel(twin=gelu_tanh_numpy, parallel=True)
def gelu_tanh_forward(x, y):
    for i in prange(x.size):
        y[i] = gelu_tanh(x[i])


def gelu_tanh_backward_numpy(grad, x, dx):
    held = np.clip(x, -30, 30)
    sigmoid_numpy(2 * ROOT_TWO_OVER_PI * held * (1 + CUBIC * held * held), dx)
    slope = 2 * ROOT_TWO_OVER_PI * (1 + 3 * CUBIC * held * held)
    dx *= grad * (1 + held * (1 - dx) * slope)


@kernel(twin=gelu_tanh_backward_numpy, parallel=True)
def gelu_tanh_backward(grad, x, dx):
    for i in prange(x.size):
        dx[i] = grad[i] * gelu_tanh_slope(x[i])
