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
NOTHING = np.float32(-0.0)  # the compiler may leave out x + -0.0, but not x + 0.0, which changes the sign of -0.0

LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # n * HIGH is exact
EXP_MIN, EXP_MAX = np.float32(-87.33), np.float32(88.376)  # above EXP_MAX the one-step scale is inf
ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer, kept in the low bits
E2, E3, E4 = np.float32(0.49999993432), np.float32(0.16666520399), np.float32(0.04166839079)
E5, E6 = np.float32(0.00836874512), np.float32(0.00138145400)

UP, DOWN = np.float32(2.0**64), np.float32(2.0**-64)
UP_BIAS = np.int32(127 + 64)
FAR = np.float32(110)  # x e**-x is zero from here on; e**-x keeps a normal 2**64 multiple
SIGN, UPPER = np.int32(-0x80000000), np.int32(-0x1000)  # masks: the sign; the upper half of the mantissa
TINY, TWO_23 = np.float32(1.1754944e-38), np.float32(2.0**23)
INFINITY, NOT_A_NUMBER = np.float32(np.inf), np.float32(np.nan)

D1, D2, D3 = np.float32(0.6931469776), np.float32(0.24022242085), np.float32(0.055507337437)
D4, D5 = np.float32(0.0096715126489), np.float32(0.0013264727065)
EXP2_MIN, EXP2_MAX = np.float32(-126), np.float32(127.49)

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

# With t² = s - 2n log 2: the normal density φ(t) = 2^n H(s) N_SLOPE, and Mills' ratio Φ(-t) / φ(t) =
# M(t) / Q(t) / N_SLOPE for t in [0, N_END]; N_SLOPE comes of M and Q beginning with 1, which saves two products.
N_END = np.float32(15)  # t Φ(-t) and t φ(t) are zero from here on
N_RATE, N_ROUND = np.float32(-0.5 * 1.4426950408889634), np.float32(12582912.0 + 64)
N_HIGH, N_LOW = np.float32(2 * 0.693359375), np.float32(2 * -2.12194440e-4)
N_SLOPE = np.float32(0.9999882132)
H0, H1, H2 = np.float32(0.3989469707), np.float32(-0.1994735003), np.float32(0.04986834526)
H3, H4 = np.float32(-0.008311269805), np.float32(0.001039115246)
H5, H6 = np.float32(-0.0001044193486), np.float32(8.395290024e-06)
M0, M1, M2, M3 = np.float32(121.6904831), np.float32(106.6239166), np.float32(44.55970764), np.float32(9.877098083)
Q0, Q1, Q2 = np.float32(97.09609985), np.float32(162.5460968), np.float32(116.6984406)
Q3, Q4 = np.float32(45.54558945), np.float32(9.877846718)

G_RATE, G_CUBIC = np.float32(2 * math.sqrt(2 / math.pi)), np.float32(0.044715)
G_END = np.float32(11)  # the tanh form is x or 0 to the last bit from here on

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


def _exp2_wide(x):
    return math.exp(0.6931471805599453 * (1024.0 if x > 1024.0 else x))


@device.narrow(wide=_exp2_wide)
def exp2(x):
    """``2**x``, saturating at 1.2e-38 and 2.4e38; at most 2 ulp.  NaN stays NaN.  Cheaper than :func:`exp`."""
    x = EXP2_MIN if x < EXP2_MIN else x
    x = EXP2_MAX if x > EXP2_MAX else x
    shifted = x + ROUND
    r = x - (shifted - ROUND)
    p = ONE + r * (D1 + r * (D2 + r * (D3 + r * (D4 + r * D5))))
    bits = np.int32(np.float32(p).view(np.int32) + np.int32(np.float32(shifted).view(np.int32) << np.int32(23)))
    return np.int32(bits).view(np.float32)


def _log1p_wide(u):
    return math.log1p(u)


@device.narrow(wide=_log1p_wide)
def log1p_unit(u):
    """``log(1 + u)`` for u in [0, 1]; at most 2 ulp, also for tiny u."""
    s = u / (TWO + u)
    z = s * s
    return TWO * s + TWO * s * z * (P1 + z * (P2 + z * (P3 + z * P4)))


def _log_wide(x):
    return math.log(x) if x > 0.0 else -math.inf if x == 0.0 else math.nan


@device.narrow(wide=_log_wide)
def log(x):
    """Natural logarithm; at most 2 ulp.  -inf at zero of either sign, NaN below."""
    small = x < TINY
    scaled = x * TWO_23 if small else x
    bits = np.float32(scaled).view(np.int32)
    k = np.int32((bits - np.int32(0x3F3504F3)) >> np.int32(23))
    mantissa = np.int32(bits - np.int32(k << np.int32(23)))
    f = np.int32(mantissa).view(np.float32) - ONE
    s = f / (TWO + f)
    z = s * s
    tail = TWO * s * z * (L1 + z * (L2 + z * L3))
    n = np.float32(k) - (np.float32(23) if small else ZERO)
    y = n * LN2_HIGH + (TWO * s + tail + n * LN2_LOW)
    y = y if x < INFINITY else x  # also NaN
    y = y if x > ZERO or x != x else NOT_A_NUMBER
    return y if x != ZERO else -INFINITY


@device
def _exp_up(a, b):
    """2**64 e**(a + b) in float32, for a + b in [-113, 0] and b tiny or zero; at most 1.1 ulp.

    A number below 1.2e-38 has fewer bits: who multiplies by 2**-64 last keeps them as long as possible.
    """
    shifted = (a + b) * LOG2_E + ROUND
    n = shifted - ROUND
    r = ((a - n * LN2_HIGH) - n * LN2_LOW) + b
    p = ONE + (r + r * r * (E2 + r * (E3 + r * (E4 + r * (E5 + r * E6)))))
    bits = np.int32((np.float32(shifted).view(np.int32) + UP_BIAS) << np.int32(23))
    return p * np.int32(bits).view(np.float32)


@device
def _with_sign(size, x):
    """``size`` (float32, not negative) with the sign bit of x."""
    return np.int32(np.float32(size).view(np.int32) | (np.float32(x).view(np.int32) & SIGN)).view(np.float32)


def _softplus_wide(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


@device.narrow(wide=_softplus_wide)
def softplus(x):
    """``log(1 + e**x)`` with relative accuracy far left and no overflow far right; at most 3 ulp."""
    positive = x if x > ZERO else ZERO
    size = abs(x)
    size = FAR if size > FAR else size
    return positive + log1p_unit(_exp_up(-size, NOTHING) * DOWN)


def _sigmoid_wide(x):
    e = math.exp(-abs(x))
    return 1.0 / (1.0 + e) if x >= 0.0 else e / (1.0 + e)


@device.narrow(wide=_sigmoid_wide)
def sigmoid(x):
    """``1 / (1 + e**-x)``; at most 3 ulp."""
    size = abs(x)
    size = FAR if size > FAR else size
    up = _exp_up(-size, NOTHING)
    r = ONE / (ONE + up * DOWN)
    return r if x >= ZERO else up * r * DOWN


def _silu_wide(x):
    return x * sigmoid(x) if x > -800.0 or x != x else -0.0


@device.narrow(wide=_silu_wide)
def silu(x):
    """``x * sigmoid(x)``; at most 4 ulp.  silu(-inf) = -0.0."""
    size = abs(x)
    size = FAR if size > FAR else size
    up = _exp_up(-size, NOTHING)
    r = ONE / (ONE + up * DOWN)
    return x * r if x >= ZERO else -size * up * r * DOWN


def _silu_slope_wide(x):
    held = max(-800.0, min(x, 800.0)) if x == x else x
    s = sigmoid(held)
    return s * (1.0 + held * sigmoid(-held))


@device.narrow(wide=_silu_slope_wide)
def silu_slope(x):
    """Derivative of :func:`silu`, s (1 + x (1 - s)); 1 and -0.0 at the infinities."""
    held = -FAR if x < -FAR else x
    held = FAR if held > FAR else held
    up = _exp_up(-abs(held), NOTHING)
    e = up * DOWN
    r = ONE / (ONE + e)
    right = r * (ONE + held * (e * r))  # 1 - s is e r here: subtracting would lose it
    left = up * r * (ONE + held * r) * DOWN
    return right if x >= ZERO else left


def _tanh_wide(x):
    return math.tanh(x)


@device.narrow(wide=_tanh_wide)
def tanh(x):
    """Hyperbolic tangent; at most 3 ulp.  Keeps the sign of zero."""
    size = abs(x)
    z = x * x
    small = size + size * z * (T1 + z * (T2 + z * (T3 + z * T4)))
    e = exp(-TWO * size)
    large = (ONE - e) / (ONE + e)
    return _with_sign(small if size < TANH_SMALL else large, x)


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


def _gelu_wide(x):
    return 0.5 * x * math.erfc(-x * math.sqrt(0.5)) if x > -40.0 or x != x else -0.0


@device.narrow(wide=_gelu_wide)
def gelu(x):
    """``x Φ(x)``, as max(x, 0) - |x| Φ(-|x|); at most 8 ulp, the left tail included.  gelu(-inf) = -0.0."""
    t = abs(x)
    t = N_END if t > N_END else t
    up, mills = _normal_tail(t)
    bits = np.float32(x).view(np.int32)
    right = np.int32(bits & (~(bits >> np.int32(31)) | SIGN)).view(np.float32)  # x, or -0.0 where it is negative
    return right - (up * (t * mills)) * DOWN


def _gelu_slope_wide(x):
    held = max(-40.0, min(x, 40.0)) if x == x else x
    density = math.exp(-0.5 * held * held) / math.sqrt(2 * math.pi)
    return 0.5 * math.erfc(-held * math.sqrt(0.5)) + held * density


@device.narrow(wide=_gelu_slope_wide)
def gelu_slope(x):
    """Derivative of :func:`gelu`, Φ(x) + x φ(x); 1 and -0.0 at the infinities."""
    t = abs(x)
    t = N_END if t > N_END else t
    up, mills = _normal_tail(t)
    left = (up * (mills - t * N_SLOPE)) * DOWN
    return ONE - left if x >= ZERO else left


@device
def _normal_tail(t):
    """(2**64 φ(t) / N_SLOPE, Φ(-t) / φ(t) N_SLOPE) for t in [0, N_END], float32.

    t² is split into the square of its upper bits, which is exact, and the rest.  Some fifty cycles pass from t to
    the result, and those under way at once are limited: the loop is as fast as this chain is short.
    """
    upper = np.int32(np.float32(t).view(np.int32) & UPPER).view(np.float32)
    square = upper * upper
    shifted = square * N_RATE + N_ROUND
    n = shifted - N_ROUND
    s = ((square + n * N_HIGH) + n * N_LOW) + (t - upper) * (t + upper)
    z = s * s
    e = (H0 + s * H1) + z * ((H2 + s * H3) + z * (H4 + s * (H5 + s * H6)))
    up = np.int32(np.float32(e).view(np.int32) + np.int32(np.float32(shifted).view(np.int32) << np.int32(23)))
    p = M0 + t * (M1 + t * (M2 + t * (M3 + t)))
    q = Q0 + t * (Q1 + t * (Q2 + t * (Q3 + t * (Q4 + t))))
    return np.int32(up).view(np.float32), p / q


def _gelu_tanh_wide(x):
    held = max(-30.0, min(x, 30.0)) if x == x else x
    argument = 2 * math.sqrt(2 / math.pi) * held * (1.0 + 0.044715 * held * held)
    return x * sigmoid(argument) if x > -30.0 or x != x else -0.0


@device.narrow(wide=_gelu_tanh_wide)
def gelu_tanh(x):
    """``x sigmoid(2u)``, u = sqrt(2/π) (x + 0.044715 x³).  -0.0 at -inf.

    Left of zero the rounding of u counts |2u| times: 4 ulp at -1, some 100 where the value is below 1e-30.
    """
    held = -G_END if x < -G_END else x
    size = abs(held)
    size = G_END if size > G_END else size
    up = _exp_up(-(G_RATE * size * (ONE + G_CUBIC * size * size)), NOTHING)
    r = ONE / (ONE + up * DOWN)
    return x * r if x >= ZERO else held * up * r * DOWN


def _gelu_tanh_slope_wide(x):
    held = max(-30.0, min(x, 30.0)) if x == x else x
    rate = 2 * math.sqrt(2 / math.pi)
    argument = rate * held * (1.0 + 0.044715 * held * held)
    slope = rate * (1.0 + 3 * 0.044715 * held * held)
    return sigmoid(argument) * (1.0 + held * sigmoid(-argument) * slope)


@device.narrow(wide=_gelu_tanh_slope_wide)
def gelu_tanh_slope(x):
    """Derivative of :func:`gelu_tanh`; 1 and -0.0 at the infinities."""
    held = -G_END if x < -G_END else x
    held = G_END if held > G_END else held
    square = held * held
    up = _exp_up(-(G_RATE * abs(held) * (ONE + G_CUBIC * square)), NOTHING)
    e = up * DOWN
    r = ONE / (ONE + e)
    slope = G_RATE * (ONE + np.float32(3) * G_CUBIC * square)
    right = r * (ONE + held * (e * r) * slope)
    left = up * r * (ONE + held * r * slope) * DOWN
    return right if x >= ZERO else left
