"""The linear probe finds the only minimum there is, and what is linear it learns."""

import numpy as np
import pytest

from training import probe
from xuracore.errors import ConfigError, ShapeError


def blobs(count, seed, spread=0.6):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    centres = np.array([[0, 0, 5.0, 0], [3, 0, 5, 0], [0, 3, 5, 0]])
    return centres[labels] + spread * rng.standard_normal((count, 4)), np.array(["a", "b", "c"])[labels]


def test_the_gradient_vanishes_where_it_stops_and_nowhere_is_lower():
    x, labels = blobs(60, 0)
    fitted = probe.fit(x, labels, penalty=0.01, tolerance=1e-9)
    z = (x - fitted.mean) / fitted.scale
    target = np.eye(3)[np.searchsorted(fitted.labels, labels)]

    def gradient(weight, bias):
        p = np.exp(z @ weight + bias)
        p = p / p.sum(axis=1, keepdims=True) - target
        return z.T @ p / len(z) + 0.01 * weight, p.mean(axis=0)

    for part in gradient(fitted.weight, fitted.bias):
        assert np.abs(part).max() < 1e-8
    assert np.abs(gradient(fitted.weight + 0.1, fitted.bias)[0]).max() > 1e-4


def test_a_quadratic_is_minimised_exactly():
    rng = np.random.default_rng(1)
    root = rng.standard_normal((12, 12))
    matrix, place = root @ root.T + np.eye(12), rng.standard_normal(12)
    found = probe.minimise(lambda x: (0.5 * (x - place) @ matrix @ (x - place), matrix @ (x - place)), np.zeros(12),
                           tolerance=1e-10)
    np.testing.assert_allclose(found, place, atol=1e-9)


def test_what_is_linear_is_learned_and_constant_inputs_do_no_harm():
    x, labels = blobs(200, 2)
    x[:, 2] = 7.0
    fitted = probe.fit_best(x, labels, folds=4)
    unseen, truth = blobs(400, 3)
    unseen[:, 2] = 7.0
    assert fitted.accuracy(unseen, truth) > 0.97
    shuffled = np.random.default_rng(4).permutation(truth)
    assert fitted.accuracy(unseen, shuffled) < 0.5


def test_senseless_inputs_are_refused():
    with pytest.raises(ShapeError, match="expected"):
        probe.fit(np.zeros((3, 2)), [1, 2])
    with pytest.raises(ConfigError, match="5 folds"):
        probe.fit_best(np.zeros((3, 2)), [1, 2, 3])
