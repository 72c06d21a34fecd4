"""Activations: sigmoid, silu, softplus, gelu, erf, tanh, relu.  See :mod:`xuracore.kernels.activation`."""

import math

import numpy as np

from xuracore.errors import ConfigError
from xuracore.kernels import activation as kernels
from xuracore.ops.arrays import flat, floating
from xuracore.ops.registry import primitive

COST = 8  # operations per element, to choose between one thread and several


def _samples(rng, **attributes):
    for shape in ((3, 4), (1,), (), (0, 2)):
        yield (np.asarray(4 * rng.standard_normal(shape)),), dict(attributes)
    yield (4 * rng.standard_normal((4, 3)).T,), dict(attributes)
    yield (np.array([-80.0, -20.0, -1e-4, 1e-4, 0.5, 20.0, 80.0]),), dict(attributes)


def _forward(kernel, x):
    """``kernel`` on the elements of ``x``: the input it saw (flat), and the output in x's shape."""
    x = floating(x)
    seen = flat(x)
    y = np.empty(x.shape, x.dtype)
    kernel.sized(COST * seen.size)(seen, y.ravel())
    return seen, y


def _backward(kernel, grad, seen):
    dx = np.empty(grad.shape, seen.dtype)
    kernel.sized(COST * seen.size)(flat(grad), seen, dx.ravel())
    return (dx,)


# ---------------------------------------------------------------------- sigmoid, tanh: from the output
def _sigmoid_forward(x):
    """1 / (1 + exp(-x)), without overflow."""
    y = _forward(kernels.sigmoid_forward, x)[1]
    return y, (y,)


def _sigmoid_vjp(grad, saved, needs):
    (y,) = saved
    return (grad * y * (1 - y),)


def _sigmoid_reference(x):
    return 0.5 * (1 + np.tanh(0.5 * x))


sigmoid = primitive("sigmoid", _sigmoid_forward, _sigmoid_vjp, reference=_sigmoid_reference, samples=_samples)


def _tanh_forward(x):
    """Hyperbolic tangent."""
    y = np.tanh(floating(x))
    return y, (y,)


def _tanh_vjp(grad, saved, needs):
    (y,) = saved
    return (grad * (1 - y * y),)


tanh = primitive("tanh", _tanh_forward, _tanh_vjp, reference=np.tanh, samples=_samples)


# ---------------------------------------------------------------------- the others: from the input
def _silu_forward(x):
    """x sigmoid(x) (Elfwing et al. 2018), also called swish."""
    seen, y = _forward(kernels.silu_forward, x)
    return y, (seen,)


def _silu_vjp(grad, saved, needs):
    return _backward(kernels.silu_backward, grad, *saved)


silu = primitive("silu", _silu_forward, _silu_vjp, samples=_samples,
                 reference=lambda x: x * _sigmoid_reference(x))


def _softplus_forward(x):
    """log(1 + exp(x)), without overflow and with relative accuracy far left."""
    seen, y = _forward(kernels.softplus_forward, x)
    return y, (seen,)


def _softplus_vjp(grad, saved, needs):
    return _backward(kernels.softplus_backward, grad, *saved)


softplus = primitive("softplus", _softplus_forward, _softplus_vjp, samples=_samples,
                     reference=lambda x: np.logaddexp(0, x))


def _gelu_forward(x, approximate="none"):
    """x Φ(x) (Hendrycks & Gimpel 2016).

    approximate : "none" for the exact form with erf, "tanh" for the cheaper one.
    """
    if approximate not in ("none", "tanh"):
        raise ConfigError(f"gelu: approximate={approximate!r}; expected 'none' or 'tanh'")
    exact = approximate == "none"
    seen, y = _forward(kernels.gelu_forward if exact else kernels.gelu_tanh_forward, x)
    return y, (seen, exact)


def _gelu_vjp(grad, saved, needs):
    seen, exact = saved
    return _backward(kernels.gelu_backward if exact else kernels.gelu_tanh_backward, grad, seen)


def _erf_reference(x):
    return np.vectorize(math.erf, otypes=[np.float64])(x)


def _gelu_reference(x, approximate="none"):
    if approximate == "none":
        return 0.5 * x * (1 + _erf_reference(x / np.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _gelu_samples(rng):
    yield from _samples(rng)
    yield from _samples(rng, approximate="tanh")


gelu = primitive("gelu", _gelu_forward, _gelu_vjp, reference=_gelu_reference, samples=_gelu_samples)


def _erf_forward(x):
    """Error function, 2/sqrt(π) ∫₀ˣ exp(-t²) dt."""
    seen, y = _forward(kernels.erf_forward, x)
    return y, (seen,)


def _erf_vjp(grad, saved, needs):
    x = saved[0].reshape(grad.shape)
    return (grad * (np.exp(-x * x) * (2 / math.sqrt(math.pi))),)


erf = primitive("erf", _erf_forward, _erf_vjp, reference=_erf_reference, samples=_samples)


def _relu_forward(x):
    """max(x, 0); the gradient at 0 is 0."""
    x = floating(x)
    return np.maximum(x, x.dtype.type(0)), (x,)


def _relu_vjp(grad, saved, needs):
    return (grad * (saved[0] > 0),)


relu = primitive("relu", _relu_forward, _relu_vjp, reference=lambda x: np.maximum(x, 0), samples=_samples)
