"""Laws of the losses between embeddings, and of the terms that keep these apart."""

import numpy as np
import pytest

import xuracore as xc
from xuracore import ops
from xuracore.errors import ConfigError, ShapeError


def unit(seed, *shape):
    return ops.l2_normalize(np.random.default_rng(seed).standard_normal(shape))


def test_repeated_pairs_are_unique_targets_with_the_logarithm_of_their_counts():
    """Each target twice: the columns agree, the rows differ by the constant that no perfect model escapes."""
    p, q, index = unit(0, 6, 4), unit(1, 3, 4), np.array([0, 1, 2, 2, 1, 0])
    paired = ops.info_nce(p, q[index], 1.7)
    counted = ops.multi_positive_info_nce(p, q, index, 1.7, log_prior=np.log([2.0, 2.0, 2.0]))
    assert paired == pytest.approx(counted + 0.5 * np.log(2))


def test_a_target_that_never_occurs_may_have_the_prior_zero():
    p, q, index = unit(0, 3, 4), unit(1, 3, 4), np.array([0, 1, 0])
    without = ops.multi_positive_info_nce(p, q[:2], index, 1.0)
    assert ops.multi_positive_info_nce(p, q, index, 1.0, log_prior=np.array([0, 0, -np.inf])) == pytest.approx(without)


def test_a_perfect_model_has_no_gradient():
    index = np.array([0, 1, 1, 2])
    p = xc.Tensor(np.eye(3)[index], requires_grad=True)
    ops.multi_positive_info_nce(p, np.eye(3), index, np.log(50.0)).backward()
    np.testing.assert_allclose(p.grad, 0, atol=1e-12)


def test_uniformity_is_least_for_rows_that_lie_far_apart():
    apart, close = np.array([[1.0, 0], [-1, 0]]), np.array([[1.0, 0], [0.6, 0.8]])
    assert ops.uniformity_loss(apart) == pytest.approx(-8)
    assert ops.uniformity_loss(close) > -8
    assert ops.uniformity_loss(np.ones((4, 2))) == 0
    assert ops.uniformity_loss(np.ones((4, 2)), labels=np.zeros(4)) == 0  # meant to lie together
    far = xc.Tensor(np.array([[1e3, 0], [0, 1e3]], np.float32), requires_grad=True)
    ops.uniformity_loss(far).backward()
    assert np.isfinite(far.grad).all()


def test_vicreg_is_zero_for_equal_pairs_that_fill_the_space_and_dear_where_they_collapse():
    corners = np.array([[a, b, c] for a in (-1.0, 1.0) for b in (-1, 1) for c in (-1, 1)]) * np.sqrt(7 / 8)
    assert ops.vicreg_loss(corners, corners) == pytest.approx(0, abs=1e-3)  # the hinge's eps
    collapsed = np.ones((8, 3))
    assert ops.vicreg_loss(collapsed, collapsed) == pytest.approx(25 * 0.99)  # 1 - √eps
    line = corners[:, :1] * np.ones(3)
    assert ops.vicreg_loss(line, line, variance=0) == pytest.approx(2 * 6 / 3)


@pytest.mark.parametrize("call, error", [
    (lambda: ops.uniformity_loss(np.zeros((2, 0))), ShapeError),
    (lambda: ops.uniformity_loss(np.zeros((2, 3)), labels=np.zeros(3)), ShapeError),
    (lambda: ops.uniformity_loss(np.zeros((2, 3)), temperature=0.0), ConfigError),
    (lambda: ops.variance_hinge(np.zeros((1, 3))), ShapeError),
    (lambda: ops.covariance_penalty(np.zeros(3)), ShapeError),
    (lambda: ops.multi_positive_info_nce(unit(0, 2, 3), unit(0, 2, 3), np.array([0, 1]), 1.0, log_prior=np.zeros(3)),
     ShapeError),
])  # fmt: skip
def test_nonsense_is_refused(call, error):
    with pytest.raises(error):
        call()
