"""What surprises people, each as a test: silent mistakes first, then refusals, then what is only unusual."""

import copy

import numpy as np
import pytest

import xuracore as xc
from xuracore import nn, ops
from xuracore.errors import DTypeError, GradError


# ---------------------------------------------------------------------- would be silently wrong
def test_transposing_with_axes_from_the_end():
    x = xc.Tensor(np.arange(24.0).reshape(2, 3, 4), requires_grad=True)
    weight = np.random.default_rng(0).standard_normal((2, 4, 3))
    (x.transpose(0, -1, 1) * weight).sum().backward()
    np.testing.assert_array_equal(x.grad, weight.transpose(0, 2, 1))


def test_powers_of_zero_have_finite_gradients():
    slopes = ((0, 0), (0.0, 0), (1, 1), (2, 0), (np.zeros(2), 0), (np.array([1.0, 2.0]), [1, 0]))
    for exponent, slope in slopes:
        x = xc.Tensor(np.zeros(2), requires_grad=True)
        (x**exponent).sum().backward()
        np.testing.assert_array_equal(x.grad, np.broadcast_to(slope, 2))


def test_logsumexp_of_nothing_is_minus_infinity_with_gradient_zero():
    x = xc.Tensor(np.full((2, 3), -np.inf, np.float32), requires_grad=True)
    y = ops.logsumexp(x)
    np.testing.assert_array_equal(y.data, [-np.inf, -np.inf])
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, np.zeros((2, 3)))


def test_picking_an_element_twice_adds_its_gradients():
    for key in (np.array([1, 1, -2]), [1, 1, -2], (np.array([1, 1, 1]),)):
        x = xc.Tensor(np.arange(3.0), requires_grad=True)
        x[key].sum().backward()
        np.testing.assert_array_equal(x.grad, [0, 3, 0])


def test_three_uses_of_a_single_number_count_three_times():
    """NumPy gives numbers, not 0-d arrays, and ``+=`` on a number changes nothing but the name."""
    x = xc.tensor(2.0, requires_grad=True)
    (x * 1.0 + x * 2.0 + x * 3.0 + x * 4.0).backward()
    assert x.grad == 10


def test_adding_in_place_makes_a_new_tensor():
    x = xc.tensor([1.0, 2.0], requires_grad=True)
    y = x
    y += 1.0
    assert y is not x
    np.testing.assert_array_equal(x.data, [1, 2])
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, [1, 1])


def test_a_tensor_shares_the_array_it_was_given_and_tensor_copies():
    array = np.ones(2)
    shared, copied = xc.Tensor(array), xc.tensor(array)
    array[0] = 5
    assert shared.data[0] == 5 and copied.data[0] == 1


def test_equality_is_by_element_so_membership_needs_identity():
    x, y = xc.tensor([1.0, 2.0]), xc.tensor([1.0, 2.0])
    assert (x == y).all() and x is not y
    assert {x: "x"}.get(y) is None
    assert any(item is x for item in [y, x])


def test_a_float64_number_from_numpy_does_not_widen_a_model():
    layer = nn.Linear(2, 2, rng=np.random.default_rng(0))
    scale = np.linspace(0, 1, 3)[1]
    assert (layer(np.ones((1, 2))) * scale + np.sqrt(2)).dtype == np.float32


def test_a_copied_model_is_independent_and_keeps_its_ties():
    model = nn.Module()
    model.first = nn.Linear(2, 2, rng=np.random.default_rng(0))
    model.second = nn.Linear(2, 2, rng=np.random.default_rng(1))
    model.second.weight = model.first.weight
    other = copy.deepcopy(model)
    assert other.second.weight is other.first.weight is not model.first.weight
    other.first(np.ones((1, 2), np.float32)).sum().backward()
    assert model.first.weight.grad is None and other.first.weight.grad.any()
    other.first.weight.data += 1
    assert (other.first.weight.data != model.first.weight.data).all()


def test_a_gradient_may_be_shared_so_it_is_replaced_not_changed():
    """``a + b`` hands both the same array; scaling ``.grad`` in place would scale two."""
    a, b = (xc.tensor([1.0], requires_grad=True) for _ in range(2))
    (a + b).backward([3.0])
    assert a.grad is b.grad
    a.grad = a.grad * 0.5
    assert a.grad == 1.5 and b.grad == 3


# ---------------------------------------------------------------------- is refused
def test_elements_are_not_assigned():
    x = xc.tensor([1.0, 2.0], requires_grad=True)
    with pytest.raises(GradError, match="no_grad"):
        x[0] = 3.0
    with xc.no_grad():
        x[0] = 3.0
    assert x.data.tolist() == [3, 2]


def test_the_truth_of_several_elements_is_not_defined():
    with pytest.raises(ValueError, match="ambiguous"):
        bool(xc.tensor([1.0, 2.0]))
    assert xc.tensor([0.5]) and not xc.tensor(0.0)


def test_a_single_number_cannot_be_counted_or_iterated():
    for call in (len, list):
        with pytest.raises(DTypeError, match="no length"):
            call(xc.tensor(1.0))


# ---------------------------------------------------------------------- is only unusual
def test_powers_and_comparisons_on_either_side():
    x = xc.tensor([1.0, 2.0], requires_grad=True)
    np.testing.assert_array_equal((2.0**x).data, [2, 4])
    np.testing.assert_array_equal((1 - x).data, [0, -1])
    np.testing.assert_array_equal(np.array([1.0, 1.0]) < x, [False, True])
    np.testing.assert_array_equal((np.eye(2) @ x).data, [1, 2])
    assert type(np.ones(2) * x) is type(np.float64(2) * x) is xc.Tensor


def test_arrays_in_arrays_out_tensors_in_tensors_out():
    x = np.ones((2, 2), np.float32)
    assert type(ops.exp(x)) is np.ndarray and type(ops.exp(xc.Tensor(x))) is xc.Tensor
    assert type(ops.unpack_2(x, sizes=(1, 1))[0]) is np.ndarray
    assert not ops.exp(xc.Tensor(x)).requires_grad
