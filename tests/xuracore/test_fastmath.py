"""The scalar functions of the kernels: accuracy in units in the last place, and the edges."""

import numpy as np
import pytest

from xuracore.jit import kernel
from xuracore.kernels import fastmath

exp, log1p_unit, log, softplus = fastmath.exp, fastmath.log1p_unit, fastmath.log, fastmath.softplus
sigmoid, silu, tanh = fastmath.sigmoid, fastmath.silu, fastmath.tanh
wrap_angle, cosine_sine = fastmath.wrap_angle, fastmath.cosine_sine


def _apply_numpy(x, out):
    with np.errstate(all="ignore"):
        for i, function in enumerate((exp, log1p_unit, log, softplus, sigmoid, silu, tanh, wrap_angle)):
            out[i] = [function(value) for value in (abs(x) if function in (log, log1p_unit) else x)]
        out[8], out[9] = np.transpose([cosine_sine(value) for value in x])


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


ROWS = {"exp": 0, "log1p_unit": 1, "log": 2, "softplus": 3, "sigmoid": 4, "silu": 5, "tanh": 6}


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
}


def _run(x):
    out = np.empty((10, x.size), x.dtype)
    _apply(x, out)
    return out


@pytest.mark.parametrize(
    "name, low, high, ulp",
    [
        ("exp", -87.3, 88.3, 1.1),
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
    assert np.isnan(_run(np.array([np.nan], np.float32))[[0, 3, 4, 5, 6, 7, 8, 9]]).all()
