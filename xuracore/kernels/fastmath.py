"""Scalar functions for kernels that LLVM can turn into vector code.

The pip packages bring no vector maths library, so ``math.exp`` in a compiled loop is a scalar libm
call (3.4 ns an element here, against 0.25 ns for the polynomial below).  Each function is
branch-free: range reduction, a short polynomial (weighted least squares close to minimax), selects.
float64 callers get ``math.*``, which is what gradient checks want.

Errors in float32, in units in the last place, are pinned by ``tests/xuracore/test_fastmath.py``.
"""

import math

import numpy as np

from xuracore.jit import device

ZERO, ONE, TWO, HALF = np.float32(0), np.float32(1), np.float32(2), np.float32(0.5)

LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # n * HIGH is exact
EXP_MIN, EXP_MAX = np.float32(-87.33), np.float32(88.376)  # above EXP_MAX the one-step scale is inf
ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer, kept in the low bits
E2, E3, E4 = np.float32(0.49999993432), np.float32(0.16666520399), np.float32(0.04166839079)
E5, E6 = np.float32(0.00836874512), np.float32(0.00138145400)

P1, P2 = np.float32(0.33333206566), np.float32(0.20010849530)
P3, P4 = np.float32(0.13999570533), np.float32(0.14012229456)

L1, L2, L3 = np.float32(0.33333388275), np.float32(0.19988759289), np.float32(0.14936200319)

T1, T2 = np.float32(-0.33332376117), np.float32(0.13308713866)
T3, T4 = np.float32(-0.05197161808), np.float32(0.01522690273)
TANH_SMALL = np.float32(0.625)

F1, F2, F3 = np.float32(1.28379166e-1), np.float32(-3.76125336e-1), np.float32(1.12819925e-1)
F4, F5, F6 = np.float32(-2.67681349e-2), np.float32(4.99119423e-3), np.float32(-5.96761703e-4)
G1, G2, G3 = np.float32(3.83197126e-4), np.float32(-1.72853470e-5), np.float32(2.42546219e-2)
G4, G5, G6 = np.float32(-3.88396438e-3), np.float32(-1.28717512e-1), np.float32(-6.34846687e-1)
G7 = np.float32(-1.06777877e-1)
ERF_SMALL = np.float32(0.927734375)

TWO_PI = 2 * math.pi
TWO_PI_HIGH, TWO_PI_LOW = np.float32(6.28125), np.float32(2 * math.pi - 6.28125)
ONE_OVER_TWO_PI, TWO_OVER_PI = np.float32(0.5 / math.pi), np.float32(2 / math.pi)
PIO2_HIGH = np.float32(1.5703125)  # few bits, so that n * PIO2_HIGH is exact
PIO2_MIDDLE = np.float32(4.83751296997e-4)
PIO2_LOW = np.float32(math.pi / 2 - 1.5703125 - float(np.float32(4.83751296997e-4)))
S3, S5, S7 = np.float32(-1.6666654611e-1), np.float32(8.3321608736e-3), np.float32(-1.9515295891e-4)
C4, C6, C8 = np.float32(4.1666645683e-2), np.float32(-1.3887316255e-3), np.float32(2.4433157118e-5)


def _exp_wide(x):
    return math.exp(709.78 if x > 709.78 else x)


@device.narrow(wide=_exp_wide)
def exp(x):
    """``e**x``, saturating at 1.2e-38 and 2.4e38; at most 1.03 ulp.  NaN stays NaN."""
    x = EXP_MIN if x < EXP_MIN else x
    x = EXP_MAX if x > EXP_MAX else x
    shifted = x * LOG2_E + ROUND
    n = shifted - ROUND
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = ONE + (r + r * r * (E2 + r * (E3 + r * (E4 + r * (E5 + r * E6)))))
    bits = np.int32((np.float32(shifted).view(np.int32) + np.int32(127)) << np.int32(23))
    return p * np.int32(bits).view(np.float32)


def _log1p_wide(u):
    return math.log1p(u)


@device.narrow(wide=_log1p_wide)
def log1p_unit(u):
    """``log(1 + u)`` for u in [0, 1]; at most 2 ulp, also for tiny u."""
    s = u / (TWO + u)
    z = s * s
    return TWO * s + TWO * s * z * (P1 + z * (P2 + z * (P3 + z * P4)))


def _log_wide(x):
    return math.log(x)


@device.narrow(wide=_log_wide)
def log(x):
    """Natural logarithm of a normal, positive x; at most 2 ulp.  Zero and below are not handled."""
    bits = np.float32(x).view(np.int32)
    k = np.int32((bits - np.int32(0x3F3504F3)) >> np.int32(23))
    mantissa = np.int32(bits - np.int32(k << np.int32(23)))
    f = np.int32(mantissa).view(np.float32) - ONE
    s = f / (TWO + f)
    z = s * s
    tail = TWO * s * z * (L1 + z * (L2 + z * L3))
    n = np.float32(k)
    return n * LN2_HIGH + (TWO * s + tail + n * LN2_LOW)


def _softplus_wide(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


@device.narrow(wide=_softplus_wide)
def softplus(x):
    """``log(1 + e**x)`` with relative accuracy far left and no overflow far right."""
    positive = x if x > ZERO else ZERO
    return positive + log1p_unit(exp(-abs(x)))


def _sigmoid_wide(x):
    e = math.exp(-abs(x))
    return 1.0 / (1.0 + e) if x >= 0.0 else e / (1.0 + e)


@device.narrow(wide=_sigmoid_wide)
def sigmoid(x):
    """``1 / (1 + e**-x)``; at most 3 ulp."""
    e = exp(-abs(x))
    r = ONE / (ONE + e)
    return r if x >= ZERO else e * r


@device
def silu(x):
    """``x * sigmoid(x)``; at most 4 ulp."""
    return x * sigmoid(x)


def _tanh_wide(x):
    return math.tanh(x)


@device.narrow(wide=_tanh_wide)
def tanh(x):
    """Hyperbolic tangent; at most 3 ulp."""
    size = abs(x)
    z = x * x
    small = x + x * z * (T1 + z * (T2 + z * (T3 + z * T4)))
    e = exp(-TWO * size)
    large = (ONE - e) / (ONE + e)
    large = large if x >= ZERO else -large
    return small if size < TANH_SMALL else large


def _order_wide(x):
    bits = np.float64(x).view(np.int64)
    return bits ^ ((bits >> np.int64(63)) & np.int64(0x7FFFFFFFFFFFFFFF))


@device.narrow(wide=_order_wide)
def order(x):
    """An integer that is larger for a larger x, and largest for NaN: LLVM vectorises a maximum of integers.

    Only NaN with its sign bit set comes out smallest.
    """
    bits = np.float32(x).view(np.int32)
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


def _unorder_wide(like, place):
    return np.int64(place ^ ((place >> np.int64(63)) & np.int64(0x7FFFFFFFFFFFFFFF))).view(np.float64)


@device.narrow(wide=_unorder_wide)
def unorder(like, place):
    """The x of :func:`order`; ``like`` is any number of x's type."""
    return np.int32(place ^ ((place >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


def _wrap_angle_wide(x):
    return x - TWO_PI * math.floor(x / TWO_PI)


@device.narrow(wide=_wrap_angle_wide)
def wrap_angle(x):
    """x modulo 2 pi, in [0, 2 pi] up to rounding; for |x| below about a thousand turns."""
    turns = np.floor(x * ONE_OVER_TWO_PI)
    return (x - turns * TWO_PI_HIGH) - turns * TWO_PI_LOW


def _cosine_sine_wide(x):
    return math.cos(x), math.sin(x)


@device.narrow(wide=_cosine_sine_wide)
def cosine_sine(x):
    """``(cos x, sin x)`` for |x| up to about a thousand; absolute error below 1e-7."""
    shifted = x * TWO_OVER_PI + ROUND
    n = shifted - ROUND
    quadrant = np.float32(shifted).view(np.int32) & np.int32(3)
    r = ((x - n * PIO2_HIGH) - n * PIO2_MIDDLE) - n * PIO2_LOW
    z = r * r
    s = r + r * z * (S3 + z * (S5 + z * S7))
    c = ONE - HALF * z + z * z * (C4 + z * (C6 + z * C8))
    swap = (quadrant & np.int32(1)) == np.int32(1)
    cosine = s if swap else c
    sine = c if swap else s
    negative_cosine = quadrant == np.int32(1) or quadrant == np.int32(2)
    cosine = -cosine if negative_cosine else cosine
    sine = -sine if quadrant >= np.int32(2) else sine
    return cosine, sine


def _erf_wide(x):
    return math.erf(x)


@device.narrow(wide=_erf_wide)
def erf(x):
    """Error function; at most 2 ulp.  Two polynomials after N. Juffa: near zero, and in the exponent."""
    size = abs(x)
    z = x * x
    near = F1 + z * (F2 + z * (F3 + z * (F4 + z * (F5 + z * F6))))
    small = x + x * near
    far = (G1 + G2 * size) * z + (G3 + G4 * size)
    far = size * (G5 + size * (G6 + size * (G7 + size * far)))
    large = ONE - exp(far - size)
    large = large if x >= ZERO else -large
    return small if size < ERF_SMALL else large
