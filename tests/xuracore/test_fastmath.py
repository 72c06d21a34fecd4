"""The scalar functions of the kernels: accuracy in units in the last place (ulp), and the edges.

Largest errors over every float32 between 2**-30 and 128 in size, both signs, and every 101st beyond (``--slow``
measures them again, in minutes).  An ulp is that of the exact result, from 1.2e-38 up.  A derivative passes
through zero, where no relative error can be bounded: there an ulp is at least that of 1/8.

    log 2.0   softplus 2.9   sigmoid 2.8   silu 3.7   tanh 2.7   erf 1.0   gelu 7.2   gelu_tanh 233 (at values below
    1e-30; 40 above -5)   derivatives: silu 3.1   gelu 5.2   gelu_tanh 6.6
"""

import math

import numpy as np
import pytest

from xuracore.jit import backend, kernel
from xuracore.kernels import fastmath

erf, gelu, gelu_slope = fastmath.erf, fastmath.gelu, fastmath.gelu_slope
gelu_tanh, gelu_tanh_slope, silu_slope = fastmath.gelu_tanh, fastmath.gelu_tanh_slope, fastmath.silu_slope
exp, log1p_unit, log, softplus = fastmath.exp, fastmath.log1p_unit, fastmath.log, fastmath.softplus
sigmoid, silu, tanh = fastmath.sigmoid, fastmath.silu, fastmath.tanh
wrap_angle, cosine_sine, exp2 = fastmath.wrap_angle, fastmath.cosine_sine, fastmath.exp2


def _apply_numpy(x, out):
    with np.errstate(all="ignore"):
        for i, function in enumerate((exp, log1p_unit, log, softplus, sigmoid, silu, tanh, wrap_angle)):
            out[i] = [function(value) for value in (abs(x) if function in (log, log1p_unit) else x)]
        out[8], out[9] = np.transpose([cosine_sine(value) for value in x])
        out[10] = [exp2(value) for value in x]


@kernel(twin=_apply_numpy)
def _apply(x, out):
    for i in range(x.size):
        out[0, i] = exp(x[i])
        out[1, i] = log1p_unit(abs(x[i]))
        out[2, i] = log(abs(x[i]))
        out[3, i] = softplus(x[i])
        out[4, i] = sigmoid(x[i])
        out[5, i] = silu(x[i])
        out[6, i] = tanh(x[i])
        out[7, i] = wrap_angle(x[i])
        out[8, i], out[9, i] = cosine_sine(x[i])
        out[10, i] = exp2(x[i])


ROWS = {"exp": 0, "log1p_unit": 1, "log": 2, "softplus": 3, "sigmoid": 4, "silu": 5, "tanh": 6, "exp2": 10}


def _sigmoid(x):
    return np.where(x >= 0, 1 / (1 + np.exp(-abs(x))), np.exp(-abs(x)) / (1 + np.exp(-abs(x))))


REFERENCE = {
    "exp": np.exp,
    "log1p_unit": np.log1p,
    "log": np.log,
    "softplus": lambda x: np.logaddexp(0, x),
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "tanh": np.tanh,
    "exp2": np.exp2,
}


def _run(x):
    out = np.empty((11, x.size), x.dtype)
    _apply(x, out)
    return out


@pytest.mark.parametrize(
    "name, low, high, ulp",
    [
        ("exp", -87.3, 88.3, 1.1),
        ("exp2", -125.9, 127.4, 2.1),
        ("log1p_unit", 0, 1, 2.0),
        ("log", 1e-30, 1e30, 2.0),
        ("softplus", -87, 100, 3.0),
        ("sigmoid", -87, 100, 3.0),
        ("silu", -80, 100, 4.0),
        ("tanh", -20, 20, 3.0),
    ],
)
def test_float32_is_accurate_to_a_few_units_in_the_last_place(name, low, high, ulp):
    rng = np.random.default_rng(0)
    x = rng.uniform(low, high, 4000)
    if name == "log":
        x = np.exp(rng.uniform(np.log(low), np.log(high), 4000))
    x = np.concatenate([x, x / 1e3, x / 1e6] if name != "log" else [x]).astype(np.float32)
    expected = REFERENCE[name](x.astype(np.float64))
    spacing = np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)
    assert np.max(np.abs(_run(x)[ROWS[name]] - expected) / spacing) <= ulp


@pytest.mark.parametrize("name", list(ROWS))
def test_float64_is_the_library_function(name):
    x = np.linspace(0.01, 1, 60)
    np.testing.assert_allclose(_run(x)[ROWS[name]], REFERENCE[name](x), rtol=1e-15, atol=0)


def test_cosine_and_sine_of_angles_met_in_a_scan():
    x = np.linspace(-8 * np.pi, 8 * np.pi, 5001).astype(np.float32)
    out = _run(x)
    np.testing.assert_allclose(out[8], np.cos(x.astype(np.float64)), rtol=0, atol=1.5e-7)
    np.testing.assert_allclose(out[9], np.sin(x.astype(np.float64)), rtol=0, atol=1.5e-7)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_wrapping_keeps_the_direction_and_the_range(dtype):
    x = np.linspace(-40, 40, 3000).astype(dtype)
    wrapped = _run(x)[7].astype(np.float64)
    assert wrapped.min() >= -1e-5 and wrapped.max() <= 2 * np.pi + 1e-5
    np.testing.assert_allclose(np.exp(1j * wrapped), np.exp(1j * x.astype(np.float64)), atol=2e-6)


def test_exp_saturates_and_shows_nan():
    out = _run(np.array([-np.inf, -1e6, 1e6, np.inf, np.nan], np.float32))[0]
    assert 0 <= out[0] < 2e-38 and 0 <= out[1] < 2e-38
    assert out[2] > 1e38 and out[3] > 1e38
    assert np.isnan(out[4])


def test_nan_stays_nan_everywhere():
    assert np.isnan(_run(np.array([np.nan], np.float32))[[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]]).all()
    assert np.isnan(_whole(np.array([np.nan], np.float32))).all()


# ---------------------------------------------------------------------- whole ranges and edges
WHOLE = (log, softplus, sigmoid, silu, silu_slope, tanh, erf, gelu, gelu_slope, gelu_tanh, gelu_tanh_slope)
WHOLE_NAMES = [function.__name__ for function in WHOLE]
SLOPES = [name.endswith("slope") for name in WHOLE_NAMES]
ULP = dict(zip(WHOLE_NAMES, (2, 3, 3, 4, 4, 3, 2, 8, 6, None, None)))


def _whole_numpy(x, out):
    with np.errstate(all="ignore"):
        for i, function in enumerate(WHOLE):
            out[i] = [function(value) for value in x]


@kernel(twin=_whole_numpy)
def _whole_kernel(x, out):
    for i in range(x.size):
        out[0, i] = log(x[i])
        out[1, i] = softplus(x[i])
        out[2, i] = sigmoid(x[i])
        out[3, i] = silu(x[i])
        out[4, i] = silu_slope(x[i])
        out[5, i] = tanh(x[i])
        out[6, i] = erf(x[i])
        out[7, i] = gelu(x[i])
        out[8, i] = gelu_slope(x[i])
        out[9, i] = gelu_tanh(x[i])
        out[10, i] = gelu_tanh_slope(x[i])


def _whole(x):
    out = np.empty((len(WHOLE), x.size), x.dtype)
    _whole_kernel(x, out)
    return out


def _worst_numpy(found, exact, floor, worst):
    """worst (functions,) ← the largest error of found (float32) in ulp, those of |exact| but at least of floor."""
    with np.errstate(all="ignore"):
        rounded = exact.astype(np.float32)
        spacing = np.spacing(np.maximum(np.abs(rounded), floor[:, None].astype(np.float32))).astype(np.float64)
        errors = np.abs(found - exact) / spacing
    errors[(found == rounded) & np.isinf(rounded) | np.isnan(found) & np.isnan(exact)] = 0
    errors[np.isnan(errors)] = np.inf
    worst[...] = np.maximum(worst, errors.max(axis=1))


@kernel(twin=_worst_numpy)
def _worst_kernel(found, exact, floor, worst):
    for k in range(len(worst)):
        top = worst[k]
        for i in range(found.shape[1]):
            y, r = found[k, i], exact[k, i]
            size = np.float32(max(abs(r), floor[k]))
            if (np.float32(r) == y and math.isinf(y)) or (math.isnan(y) and math.isnan(r)):
                continue
            up = np.int32(np.float32(size).view(np.int32) + np.int32(1)).view(np.float32)
            error = abs(np.float64(y) - r) / (np.float64(up) - np.float64(size))
            top = top if error <= top else error if error == error else math.inf
        worst[k] = top


FLOOR = np.where(SLOPES, 0.125, 1.2e-38)


def _errors(x, worst=None):
    """(functions,) largest error in ulp; the float64 forms, which call the C library, are the reference."""
    worst = np.zeros(len(WHOLE)) if worst is None else worst
    with np.errstate(all="ignore"):
        _worst_kernel(_whole(x), _whole(x.astype(np.float64)), FLOOR, worst)
    return worst


def _floats(start, stop, step=1):
    """Every ``step``-th positive float32 with bits in [start, stop)."""
    return np.arange(start, stop, step, dtype=np.uint32).view(np.float32)


def _within(worst):
    return [f"{name}: {error:.3g}" for name, error in zip(WHOLE_NAMES, worst)
            if ULP[name] is not None and not error <= ULP[name]]


def test_the_whole_range_is_accurate_in_a_sample():
    x = _floats(0, 0x7F800000, 1_000_003)
    assert _within(_errors(np.concatenate([x, -x]))) == []


def test_the_tanh_form_of_gelu_is_accurate_where_it_is_not_tiny():
    """Its exponent is a cubic whose rounding grows with its size, as in every float32 implementation."""
    x = np.linspace(-5, 12, 3001).astype(np.float32)
    assert _errors(x[x > -1])[[9, 10]].max() <= 6 and _errors(x)[[9, 10]].max() <= 40


EDGES = {  # at -inf, -3e38, -0.0, 0.0, 1e-45, 3e38, inf
    "log": [np.nan, np.nan, -np.inf, -np.inf, np.float32(math.log(2) * -149), np.float32(math.log(3e38)), np.inf],
    "softplus": [0.0, 0.0, np.float32(math.log(2)), np.float32(math.log(2)), np.float32(math.log(2)), 3e38, np.inf],
    "sigmoid": [0.0, 0.0, 0.5, 0.5, 0.5, 1.0, 1.0],
    "silu": [-0.0, -0.0, -0.0, 0.0, 0.0, 3e38, np.inf],
    "silu_slope": [-0.0, -0.0, 0.5, 0.5, 0.5, 1.0, 1.0],
    "tanh": [-1.0, -1.0, -0.0, 0.0, 1e-45, 1.0, 1.0],
    "erf": [-1.0, -1.0, -0.0, 0.0, 1e-45, 1.0, 1.0],
    "gelu": [-0.0, -0.0, -0.0, 0.0, 0.0, 3e38, np.inf],
    "gelu_slope": [-0.0, -0.0, 0.5, 0.5, 0.5, 1.0, 1.0],
    "gelu_tanh": [-0.0, -0.0, -0.0, 0.0, 0.0, 3e38, np.inf],
    "gelu_tanh_slope": [-0.0, -0.0, 0.5, 0.5, 0.5, 1.0, 1.0],
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_edges(dtype):
    """The limits, not NaN, at the infinities; zeros keep their sign where the function is odd or tends to -0."""
    x = np.array([-np.inf, -3e38, -0.0, 0.0, 1e-45, 3e38, np.inf], np.float32).astype(dtype)
    for name, got in zip(WHOLE_NAMES, _whole(x)):
        want = np.array(EDGES[name], np.float32)
        np.testing.assert_allclose(got.astype(np.float32), want, rtol=3e-7, atol=2e-45, err_msg=name)
        zeros = want == 0
        if dtype == np.float32:
            np.testing.assert_array_equal(np.signbit(got[zeros]), np.signbit(want[zeros]), err_msg=name)


@pytest.mark.slow
def test_every_float32_is_accurate():
    """Prints the table at the head of this file."""
    if backend() == "numpy":
        pytest.skip("minutes compiled, days interpreted")
    worst, step = np.zeros(len(WHOLE)), 1 << 20
    low, high, end = (int(np.float32(v).view(np.uint32)) for v in (2.0**-30, 128.0, np.inf))
    pieces = [(start, min(start + step, high), 1) for start in range(low, high, step)]
    beyond = (*range(0, low, 101 * step), *range(high, end, 101 * step))
    pieces += [(start, start + 101 * step, 101) for start in beyond]
    for start, stop, stride in pieces:
        x = _floats(start, min(stop, end), stride)
        for side in (x, -x):
            _errors(side, worst)
    print("".join(f"\n{name:16s} {error:.3g}" for name, error in zip(WHOLE_NAMES, worst)))
    assert _within(worst) == []
