"""Rotations are rotations, and the two pairings are one model."""

import numpy as np
import pytest

import xuracore as xc
from xuracore.errors import ConfigError
from xuramamba import Mamba3, rotary

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("kind", ["pair", "half"])
def test_rotation_keeps_lengths_and_adds_up(kind):
    x, one, two = RNG.standard_normal((3, 8)), RNG.uniform(0, 6, (3, 3)), RNG.uniform(0, 6, (3, 3))
    turned = rotary.rotate(x, one, kind)
    np.testing.assert_allclose((turned**2).sum(-1), (x**2).sum(-1))
    np.testing.assert_allclose(rotary.rotate(turned, two, kind), rotary.rotate(x, one + two, kind))
    np.testing.assert_allclose(rotary.rotate(turned, -one, kind), x)


def test_rotation_is_multiplication_by_a_unit_complex_number():
    x, theta = RNG.standard_normal(8), RNG.uniform(0, 6, 4)
    turned = rotary.rotate(x, theta)
    np.testing.assert_allclose(turned[::2] + 1j * turned[1::2], (x[::2] + 1j * x[1::2]) * np.exp(1j * theta))


def test_half_is_pair_in_another_order():
    x, theta, order = RNG.standard_normal(8), RNG.uniform(0, 6, 3), rotary.half_order(8)
    np.testing.assert_allclose(rotary.rotate(x[order], theta, "half"), rotary.rotate(x, theta, "pair")[order])


def test_cumulative_angles_are_those_of_the_scan():
    angles, dt = RNG.standard_normal((1, 6, 2)), RNG.uniform(0.1, 1, (1, 6, 1))
    start = np.array([[[0.3, 5.0]]])
    zeros = np.zeros((1, 6, 1, 1, 4))
    _, theta, *_ = xc.ops.trapezoidal_scan(
        zeros, zeros, np.zeros((1, 6, 1, 1)), dt, -dt, dt, angles, *np.zeros((2, 1, 1, 4)),
        None, None, start, *np.zeros((2, 1, 1, 1, 4)), np.zeros((1, 1, 1)),
    )  # fmt: skip
    np.testing.assert_allclose(theta[0, 0], rotary.cumulative_angles(angles, dt[..., 0], start[0])[0, -1])


@pytest.mark.parametrize("fields", [
    {}, {"ngroups": 2, "rope_fraction": 1.0}, {"is_mimo": True, "mimo_rank": 2, "d_conv": 3},
    {"bc_norm": False, "bc_bias": False},
])  # fmt: skip
def test_a_converted_mixer_computes_the_same(fields):
    rng = np.random.default_rng(1)
    mixer = Mamba3(8, d_state=6, headdim=4, rng=rng, **fields)
    for parameter in mixer.parameters():
        parameter.data += (0.2 * rng.standard_normal(parameter.shape)).astype(np.float32)
    mixer.to_dtype(np.float64)
    other = rotary.with_rotary(mixer, "half")
    back = rotary.with_rotary(other, "pair")
    x = xc.Tensor(rng.standard_normal((2, 7, 8)))
    with xc.no_grad():
        expected = mixer(x)[0].numpy()
        assert other.config.rotary == "half"
        np.testing.assert_allclose(other(x)[0].numpy(), expected, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(back(x)[0].numpy(), expected, rtol=1e-10, atol=1e-12)


def test_unknown_pairings_and_odd_sizes_are_refused():
    with pytest.raises(ConfigError):
        rotary.rotate(np.zeros(4), np.zeros(1), "both")
    with pytest.raises(ConfigError):
        rotary.half_order(5)
