"""Functions of one number, each with its derivative beside it: powers, roots, logarithms, angles, rounding.

A derivative is written from the output where that is the smaller or the cheaper thing to keep.
"""

import math

import numpy as np

from xuracore.ops.registry import primitive

LN2, LN10 = math.log(2), math.log(10)


def samples_between(low, high):
    """Samples of one input in [low, high]: a matrix, size 1, 0-d, empty, non-contiguous."""

    def samples(rng):
        for shape in ((3, 4), (1,), (), (0, 2)):
            yield (np.asarray(rng.uniform(low, high, shape)),), {}
        yield (rng.uniform(low, high, (4, 3)).T,), {}

    return samples


def _function(name, value, samples, explanation, *, of_input=None, of_output=None, reference=None):
    """An op of one number from its value and its slope, written of the input or of the output."""
    if of_output is None:

        def forward(x):
            return value(x), (x,)

        def vjp(grad, saved, needs):
            return (grad * of_input(saved[0]),)

    else:

        def forward(x):
            y = value(x)
            return y, (y,)

        def vjp(grad, saved, needs):
            return (grad * of_output(saved[0]),)

    forward.__doc__ = explanation
    return primitive(name, forward, vjp, reference=reference or value, samples=samples)


# ---------------------------------------------------------------------- powers and roots
reciprocal = _function("reciprocal", lambda x: 1 / x, samples_between(0.3, 3), "1 / x.",
                       of_output=lambda y: -y * y, reference=np.reciprocal)
square = _function("square", lambda x: x * x, samples_between(-2, 2), "x².",
                   of_input=lambda x: 2 * x, reference=np.square)
rsqrt = _function("rsqrt", lambda x: 1 / np.sqrt(x), samples_between(0.3, 3), "1 / √x.",
                  of_output=lambda y: -0.5 * y * y * y, reference=lambda x: x**-0.5)

# ---------------------------------------------------------------------- exponentials and logarithms
exp2 = _function("exp2", np.exp2, samples_between(-3, 3), "2 to the power x.",
                 of_output=lambda y: y * LN2)
log2 = _function("log2", np.log2, samples_between(0.2, 4), "Logarithm to base 2.",
                 of_input=lambda x: 1 / (x * LN2))
log10 = _function("log10", np.log10, samples_between(0.2, 4), "Logarithm to base 10.",
                  of_input=lambda x: 1 / (x * LN10))

# ---------------------------------------------------------------------- angles
tan = _function("tan", np.tan, samples_between(-1.2, 1.2), "Tangent of an angle in radians.",
                of_output=lambda y: 1 + y * y)
asin = _function("asin", np.arcsin, samples_between(-0.9, 0.9), "Arc sine, in [-π/2, π/2].",
                 of_input=lambda x: 1 / np.sqrt(1 - x * x))
acos = _function("acos", np.arccos, samples_between(-0.9, 0.9), "Arc cosine, in [0, π].",
                 of_input=lambda x: -1 / np.sqrt(1 - x * x))
atan = _function("atan", np.arctan, samples_between(-3, 3), "Arc tangent, in (-π/2, π/2).",
                 of_input=lambda x: 1 / (1 + x * x))
sinh = _function("sinh", np.sinh, samples_between(-2, 2), "Hyperbolic sine.", of_input=np.cosh)
cosh = _function("cosh", np.cosh, samples_between(-2, 2), "Hyperbolic cosine.", of_input=np.sinh)
asinh = _function("asinh", np.arcsinh, samples_between(-3, 3), "Inverse of sinh.",
                  of_input=lambda x: 1 / np.sqrt(x * x + 1))
acosh = _function("acosh", np.arccosh, samples_between(1.2, 4), "Inverse of cosh, for x ≥ 1.",
                  of_input=lambda x: 1 / np.sqrt(x * x - 1))
atanh = _function("atanh", np.arctanh, samples_between(-0.9, 0.9), "Inverse of tanh, for |x| < 1.",
                  of_input=lambda x: 1 / (1 - x * x))


# ---------------------------------------------------------------------- steps
def _between_steps(low, high):
    """Samples a tenth away, at least, from every half integer and integer."""

    def samples(rng):
        for (x,), attributes in samples_between(low, high)(rng):
            x = np.floor(2 * x) / 2 + rng.uniform(0.1, 0.4, x.shape)
            yield (np.asarray(x),), attributes

    return samples


def _step(name, value, explanation):
    """An op that is constant but for jumps; its gradient is 0 everywhere."""

    def forward(x):
        return value(x), ()

    def vjp(grad, saved, needs):
        return (np.zeros_like(grad),)

    forward.__doc__ = explanation + "  The gradient is 0 everywhere."
    return primitive(name, forward, vjp, reference=value, samples=_between_steps(-3, 3))


sign = _step("sign", np.sign, "-1, 0 or 1: the sign of x.")
floor = _step("floor", np.floor, "The largest integer not above x.")
ceil = _step("ceil", np.ceil, "The smallest integer not below x.")
round = _step("round", np.round, "The nearest integer; halves go to the even one.")
trunc = _step("trunc", np.trunc, "The integer part of x.")


# ---------------------------------------------------------------------- further activations
# The usual ones have kernels of their own, see :mod:`xuracore.ops.activation`.
def _sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * x))


log_sigmoid = _function(
    "log_sigmoid", lambda x: np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x))), samples_between(-30, 30),
    "log(1 / (1 + exp(-x))), without overflow.", of_output=lambda y: -np.expm1(y),
    reference=lambda x: -np.logaddexp(0, -x))  # fmt: skip
softsign = _function("softsign", lambda x: x / (1 + np.abs(x)), samples_between(0.1, 3), "x / (1 + |x|).",
                     of_input=lambda x: 1 / np.square(1 + np.abs(x)))


def _tanh_of_softplus(x):
    """tanh(log(1 + eˣ)) = (e²ˣ + 2eˣ) / (e²ˣ + 2eˣ + 2), which is 1 in float64 from x = 20."""
    e = np.exp(np.minimum(x, 20))
    top = e * (e + 2)
    return top / (top + 2)


def _mish_slope(x):
    t = _tanh_of_softplus(x)
    return t + x * (1 - t) * (1 + t) * _sigmoid(x)


mish = _function("mish", lambda x: x * _tanh_of_softplus(x), samples_between(-5, 30),
                 "x tanh(log(1 + eˣ)) (Misra 2019).", of_input=_mish_slope,
                 reference=lambda x: x * np.tanh(np.logaddexp(0, x)))
heavy_tail = _function(
    "heavy_tail", lambda x: np.maximum(x, 0) + 1 / (1 - np.minimum(x, 0)), samples_between(-3, 3),
    "1 + x for x ≥ 0, 1 / (1 - x) below: positive, slope 1 at 0, a slow approach to 0.",
    of_output=lambda y: np.square(np.minimum(y, 1)),
    reference=lambda x: np.where(x >= 0, 1 + x, 1 / (1 + np.abs(x))))  # fmt: skip
hardswish = _function(
    "hardswish", lambda x: x * np.clip(x / 6 + 0.5, 0, 1), samples_between(-2.8, 2.8),
    "x clip(x/6 + 1/2, 0, 1) (Howard et al. 2019).",
    of_input=lambda x: np.where(x <= -3, 0, np.where(x < 3, x / 3 + 0.5, 1)).astype(x.dtype))  # fmt: skip


def _away_from_zero(rng):
    for (x,), attributes in samples_between(-3, 3)(rng):
        yield (np.asarray(x + 0.1 * np.sign(x)),), attributes


def _leaky_relu_forward(x, slope=0.01):
    """x where it is positive, ``slope`` · x elsewhere; the gradient at 0 is ``slope``."""
    factor = np.where(x > 0, x.dtype.type(1), x.dtype.type(slope))
    return x * factor, (factor,)


def _leaky_relu_vjp(grad, saved, needs):
    return (grad * saved[0],)


leaky_relu = primitive("leaky_relu", _leaky_relu_forward, _leaky_relu_vjp, samples=_away_from_zero,
                       reference=lambda x, slope=0.01: np.where(x > 0, x, slope * x))


def _elu_forward(x, alpha=1.0):
    """x where it is positive, α (eˣ - 1) elsewhere (Clevert et al. 2016)."""
    kind = x.dtype.type
    low = kind(alpha) * np.expm1(np.minimum(x, kind(0)))
    return np.where(x > 0, x, low), (np.where(x > 0, kind(1), low + kind(alpha)),)


def _elu_vjp(grad, saved, needs):
    return (grad * saved[0],)


elu = primitive("elu", _elu_forward, _elu_vjp, samples=_away_from_zero,
                reference=lambda x, alpha=1.0: np.where(x > 0, x, alpha * np.expm1(x)))
