"""Each rule has the order of accuracy that it claims, and is exact where it claims to be."""

import numpy as np
import pytest

from xuramamba import discretize

A = -0.8 + 1.5j


def source(t):
    return np.sin(2 * t) + 0.5


def exact(time):
    """Integral of e**(A (time - s)) source(s) by Gauss-Legendre on many pieces."""
    nodes, weights = np.polynomial.legendre.leggauss(20)
    edges = np.linspace(0, time, 65)
    half = np.diff(edges)[:, None] / 2
    s = edges[:-1, None] + half * (nodes + 1)
    return (half * weights * np.exp(A * (time - s)) * source(s)).sum()


def run(rule, steps, time=2.0):
    dt, h = time / steps, 0j
    for n in range(steps):
        before, after = source(n * dt), source((n + 1) * dt)
        if rule in ("trapezoidal", "no look back"):
            mix = 0.5 if rule == "trapezoidal" else 1.0
            alpha, beta, gamma = discretize.exponential_trapezoidal(A, dt, mix)
            h = alpha * h + beta * before + gamma * after
        elif rule == "bilinear":
            keep, enter = discretize.bilinear(A, dt)
            h = keep * h + enter * (before + after) / 2
        else:
            keep, enter = getattr(discretize, rule)(A, dt)
            h = keep * h + enter * after
    return h


@pytest.mark.parametrize(
    "rule, order",
    [("zero_order_hold", 1), ("euler_input", 1), ("bilinear", 2), ("trapezoidal", 2), ("no look back", 1)],
)
def test_halving_the_step_divides_the_error_by_two_to_the_order(rule, order):
    errors = [abs(run(rule, steps) - exact(2.0)) for steps in (200, 400, 800)]
    found = np.log2([errors[0] / errors[1], errors[1] / errors[2]])
    np.testing.assert_allclose(found, order, atol=0.05)


def test_zero_order_hold_is_exact_for_a_constant_input():
    keep, enter = discretize.zero_order_hold(A, 0.3)
    h = 0j
    for _ in range(10):
        h = keep * h + enter
    np.testing.assert_allclose(h, (np.exp(A * 3) - 1) / A, rtol=1e-13)


def test_golden_values_of_the_hold_at_minus_one():
    keep, enter = discretize.zero_order_hold(-1.0, 0.1)
    np.testing.assert_allclose([keep, enter], [0.9048374180, 0.0951625820], rtol=1e-9)
    assert discretize.euler_input(-1.0, 0.1)[1] == 0.1


def test_the_mixed_rule_at_one_is_euler():
    alpha, beta, gamma = discretize.exponential_trapezoidal(A, 0.2, 1.0)
    keep, enter = discretize.euler_input(A, 0.2)
    assert (alpha, beta, gamma) == (keep, 0, enter)


def test_phi1_keeps_its_digits_near_zero():
    z = np.array([0, 1e-12, -1e-8, 9.9e-5, 1.01e-4, -0.5, 3.0])
    series = sum(z**n / np.prod(np.arange(1.0, n + 2)) for n in range(25))
    np.testing.assert_allclose(discretize.phi1(z), series, rtol=1e-12)


def test_the_bilinear_rule_never_grows_a_decaying_mode():
    a = -np.logspace(-3, 3, 30)[:, None] + 1j * np.linspace(-50, 50, 21)
    assert (np.abs(discretize.bilinear(a, 1.0)[0]) < 1).all()
