"""Laws of the norms, the convolution and the losses beyond what holds for every op."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import xuracore as xc
from xuracore import ops
from xuracore.errors import ConfigError, DTypeError, ShapeError


@given(length=st.integers(1, 9), cut=st.integers(0, 9), size=st.integers(1, 5), silu=st.booleans())
def test_convolution_cut_anywhere_is_the_whole(length, cut, size, silu):
    rng = np.random.default_rng(length)
    x, weight, bias = (rng.standard_normal(shape) for shape in ((2, length, 3), (3, size), 3))
    whole, end = ops.causal_conv1d(x, weight, bias, silu=silu)
    state, parts = None, []
    for part in (x[:, : min(cut, length)], x[:, min(cut, length) :]):
        y, state = ops.causal_conv1d(part, weight, bias, state, silu=silu)
        parts.append(y)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(state, end)


def test_convolution_does_not_see_the_future():
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((1, 8, 3)), rng.standard_normal((3, 4))
    changed = x.copy()
    changed[:, 5:] += 1
    before, _ = ops.causal_conv1d(x, weight)
    after, _ = ops.causal_conv1d(changed, weight)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (before[:, 5] != after[:, 5]).all()


def test_gradient_flows_through_the_carried_state():
    """Backward through two chunks equals backward through the whole."""
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((2, 4))
    for cut in (1, 2, 5):
        whole = xc.Tensor(rng.standard_normal((2, 6, 2)), requires_grad=True)
        y, _ = ops.causal_conv1d(whole, weight, silu=True)
        (y * y).sum().backward()
        parts = xc.Tensor(whole.data.copy(), requires_grad=True)
        first, state = ops.causal_conv1d(parts[:, :cut], weight, silu=True)
        second, _ = ops.causal_conv1d(parts[:, cut:], weight, None, state, silu=True)
        ((first * first).sum() + (second * second).sum()).backward()
        np.testing.assert_allclose(parts.grad, whole.grad, rtol=1e-10, atol=1e-12)


def test_layer_norm_forgets_shift_and_scale():
    x = np.random.default_rng(0).standard_normal((4, 16))
    plain, changed = ops.layer_norm(x, eps=0.0), ops.layer_norm(3 * x + 5, eps=0.0)
    np.testing.assert_allclose(changed, plain, rtol=1e-9, atol=1e-12)


def test_gate_orders_differ_and_one_group_of_all_is_the_default():
    x, z = np.random.default_rng(0).standard_normal((2, 4, 6))
    first = ops.gated_rms_norm(x, z, norm_before_gate=True)
    last = ops.gated_rms_norm(x, z)
    assert not np.allclose(first, last)
    np.testing.assert_array_equal(last, ops.gated_rms_norm(x, z, group_size=6))
    np.testing.assert_allclose(last, ops.rms_norm(x * ops.silu(z), eps=1e-5), rtol=1e-12)


@given(st.integers(1, 8), st.integers(1, 8))
def test_smoothed_loss_of_equal_logits_is_log_classes(rows, classes):
    target = np.arange(rows) % classes
    loss = ops.cross_entropy(np.zeros((rows, classes)), target, label_smoothing=0.3)
    assert abs(loss - np.log(classes)) < 1e-12


def test_ignored_positions_change_nothing():
    rng = np.random.default_rng(0)
    logits, target = rng.standard_normal((6, 5)), np.array([0, -100, 2, -100, 4, 1])
    kept = target != -100
    whole = ops.cross_entropy(logits, target, label_smoothing=0.1)
    alone = ops.cross_entropy(logits[kept], target[kept], label_smoothing=0.1)
    np.testing.assert_allclose(whole, alone, rtol=1e-13)
    leaf = xc.Tensor(logits, requires_grad=True)
    ops.cross_entropy(leaf, np.full(6, -100)).backward()
    assert (leaf.grad == 0).all()


@pytest.mark.parametrize("call, error", [
    (lambda: ops.cross_entropy(np.zeros((2, 3)), np.array([0, 3])), IndexError),
    (lambda: ops.cross_entropy(np.zeros((2, 3)), np.array([0, -1])), IndexError),
    (lambda: ops.cross_entropy(np.zeros((2, 3)), np.array([0.0, 1.0])), DTypeError),
    (lambda: ops.cross_entropy(np.zeros((2, 3)), np.array([0])), ShapeError),
    (lambda: ops.cross_entropy(np.zeros((2, 3)), np.array([0, 1]), reduction="average"), ConfigError),
    (lambda: ops.mse_loss(np.zeros(3), np.zeros((3, 1))), ShapeError),
    (lambda: ops.gelu(np.zeros(3), approximate="fast"), ConfigError),
    (lambda: ops.layer_norm(np.zeros((2, 3)), np.ones(4)), ShapeError),
    (lambda: ops.gated_rms_norm(np.zeros((2, 6)), np.zeros((2, 6)), group_size=4), ShapeError),
    (lambda: ops.causal_conv1d(np.zeros((2, 4, 3)), np.zeros((4, 2))), ShapeError),
    (lambda: ops.causal_conv1d(np.zeros((2, 4, 3)), np.zeros((3, 2)), None, np.zeros((2, 2, 3))), ShapeError),
    (lambda: ops.info_nce(np.zeros((2, 3)), np.zeros((4, 3)), 1.0), ShapeError),
    (lambda: ops.multi_positive_info_nce(np.ones((1, 3)), np.ones((4, 3)), np.array([4]), 1.0), IndexError),
])
def test_nonsense_is_refused(call, error):
    with pytest.raises(error):
        call()


def test_targets_nobody_has_are_negatives_in_the_rows_only():
    rng = np.random.default_rng(2)
    p, q = ops.l2_normalize(rng.standard_normal((4, 5))), ops.l2_normalize(rng.standard_normal((3, 5)))
    index = np.array([0, 1, 1, 0])
    used = xc.Tensor(q, requires_grad=True)
    more = ops.multi_positive_info_nce(p, used, index, 1.0)
    assert more.data > ops.multi_positive_info_nce(p, q[:2], index, 1.0)
    more.backward()
    assert (used.grad[2] != 0).any()


def test_order_of_the_batch_does_not_matter():
    rng = np.random.default_rng(3)
    p, q = ops.l2_normalize(rng.standard_normal((5, 4))), ops.l2_normalize(rng.standard_normal((3, 4)))
    index, order = np.array([2, 0, 1, 0, 2]), rng.permutation(5)

    def sigmoid(*inputs):
        return ops.sigmoid_contrastive_loss(*inputs, -2.0)

    for loss in (ops.multi_positive_info_nce, sigmoid):
        np.testing.assert_allclose(loss(p[order], q, index[order], 1.2), loss(p, q, index, 1.2), rtol=1e-12)


def test_logits_of_any_size_keep_the_loss_finite():
    logits = np.array([[1e30, -1e30, 0.0], [3e38, 3e38, -3e38]], np.float32)
    leaf = xc.Tensor(logits, requires_grad=True)
    loss = ops.cross_entropy(leaf, np.array([0, 1]))
    loss.backward()
    assert np.isfinite(loss.data) and np.isfinite(leaf.grad).all()


@pytest.mark.parametrize("name, attributes", [("silu", {}), ("gelu", {}), ("gelu", {"approximate": "tanh"})])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_activations_have_their_limits_at_the_infinities(name, attributes, dtype):
    x = xc.Tensor(np.array([-np.inf, np.inf, -1e30, 1e30], dtype), requires_grad=True)
    y = getattr(ops, name)(x, **attributes)
    y.sum().backward()
    np.testing.assert_array_equal(y.data, np.array([0, np.inf, 0, 1e30], dtype))
    np.testing.assert_array_equal(x.grad, [0, 1, 0, 1])
