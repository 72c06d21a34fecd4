"""What surprises people, each as a test: silent mistakes first, then refusals, then what is only unusual."""

import copy
import importlib.util
import os
import threading
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest

import xuracore as xc
from xuracore import nn, ops
from xuracore.errors import DTypeError, GradError, ShapeError


# ---------------------------------------------------------------------- silently wrong, here or elsewhere
def test_transposing_with_axes_from_the_end():
    """Negative axes have to be counted from the end in the gradient too."""
    x = xc.Tensor(np.arange(24.0).reshape(2, 3, 4), requires_grad=True)
    weight = np.random.default_rng(0).standard_normal((2, 4, 3))
    (x.transpose(0, -1, 1) * weight).sum().backward()
    np.testing.assert_array_equal(x.grad, weight.transpose(0, 2, 1))


def test_powers_of_zero_have_finite_gradients():
    """The formula b·a^(b-1) is 0·∞ at a = 0, b = 0; here the slope there is 0."""
    slopes = ((0, 0), (0.0, 0), (1, 1), (2, 0), (np.zeros(2), 0), (np.array([1.0, 2.0]), [1, 0]))
    for exponent, slope in slopes:
        x = xc.Tensor(np.zeros(2), requires_grad=True)
        (x**exponent).sum().backward()
        np.testing.assert_array_equal(x.grad, np.broadcast_to(slope, 2))


def test_logsumexp_of_nothing_is_minus_infinity_with_gradient_zero():
    """A row that is masked altogether is an empty sum, not a NaN."""
    x = xc.Tensor(np.full((2, 3), -np.inf, np.float32), requires_grad=True)
    y = ops.logsumexp(x)
    np.testing.assert_array_equal(y.data, [-np.inf, -np.inf])
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, np.zeros((2, 3)))


def test_picking_an_element_twice_adds_its_gradients():
    """``grad[key] += g`` in NumPy would count a repeated index once."""
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
    """``y += 1`` is ``y = y + 1``: other names of the tensor do not see it. A leaf is changed by ``add_``."""
    x = xc.tensor([1.0, 2.0], requires_grad=True)
    y = x
    y += 1.0
    assert y is not x
    np.testing.assert_array_equal(x.data, [1, 2])
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, [1, 1])


def test_a_tensor_shares_the_array_it_was_given_and_tensor_copies():
    """``xc.Tensor(array)`` refers to it, ``xc.tensor(array)`` copies."""
    array = np.ones(2)
    shared, copied = xc.Tensor(array), xc.tensor(array)
    array[0] = 5
    assert shared.data[0] == 5 and copied.data[0] == 1


def test_equality_is_by_element_so_membership_needs_identity():
    """``==`` gives an array; sets, dicts and ``is`` go by identity."""
    x, y = xc.tensor([1.0, 2.0]), xc.tensor([1.0, 2.0])
    assert (x == y).all() and x is not y
    assert {x: "x"}.get(y) is None
    assert any(item is x for item in [y, x])


def test_a_float64_number_from_numpy_does_not_widen_a_model():
    """NumPy's own float64 numbers and arrays are constants here, and take the tensor's type."""
    layer = nn.Linear(2, 2, rng=np.random.default_rng(0))
    scale = np.linspace(0, 1, 3)[1]
    assert (layer(np.ones((1, 2))) * scale + np.sqrt(2)).dtype == np.float32


def test_a_copied_model_is_independent_and_keeps_its_ties():
    """``copy.deepcopy`` gives a model of its own; tied parameters are tied in the copy."""
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


def test_broadcasting_makes_a_square_of_a_column_and_a_row():
    """Predictions (n, 1) minus targets (n) are (n, n), and their mean is a number that trains nothing sensible."""
    predictions, targets = xc.tensor([[1.0], [2.0], [3.0]]), np.array([1.0, 2.0, 3.0], np.float32)
    assert (predictions - targets).shape == (3, 3)
    assert ((predictions - targets) ** 2).mean().item() > 0 == ((predictions[:, 0] - targets) ** 2).mean().item()
    with pytest.raises(ShapeError):
        ops.mse_loss(predictions, targets)  # losses want equal shapes


def test_writing_to_data_goes_unseen():
    """``x.data[...] =`` is NumPy's own affair: no version, no refusal, a wrong gradient. Use the methods, or say it."""
    x = xc.tensor([2.0], requires_grad=True)
    y = x * x
    x.data[0] = 5.0
    y.backward([1.0])
    assert x.grad == 10  # the slope at 5 of a value computed at 2
    y = x * x
    x.data[0] = 7.0
    x.mark_changed()
    with pytest.raises(GradError, match="changed in place"):
        y.backward([1.0])


def test_views_share_memory():
    """``detach``, ``reshape`` and slices refer to the same numbers, as in NumPy; ``xc.tensor(x)`` is a copy."""
    x = xc.tensor([1.0, 2.0, 3.0], requires_grad=True)
    part, flipped, copied = x[1:].detach(), x.reshape(3, 1).detach(), xc.tensor(x)
    with xc.no_grad():
        x.zero_()
    assert not part.data.any() and not flipped.data.any() and copied.data.all()


def test_gradients_add_up_until_they_are_forgotten():
    """Each ``backward`` adds to ``.grad``; a training step needs ``zero_grad``."""
    layer = nn.Linear(1, 1, bias=False, rng=np.random.default_rng(0))
    for expected in (1, 2, 3):
        layer(np.ones((1, 1), np.float32)).sum().backward()
        assert layer.weight.grad == expected
    layer.zero_grad()
    assert layer.weight.grad is None


def test_a_float64_array_makes_a_float64_tensor():
    """Python numbers become float32; a NumPy array of float64 asked for it, and its tensor widens what it meets."""
    assert xc.tensor([0.5]).dtype == np.float32
    wide = xc.tensor(np.array([0.5]))
    assert wide.dtype == np.float64 and (xc.tensor([1.0]) * wide).dtype == np.float64
    assert (xc.tensor([1.0]) * wide.data).dtype == np.float32  # the array itself is only a constant


def test_where_hides_a_nan_but_not_its_gradient():
    """The branch not taken still has a derivative, and 0 · ∞ is NaN: make its input harmless before, not after."""
    def slope(f):
        x = xc.tensor([0.0, 4.0], requires_grad=True)
        with np.errstate(all="ignore"):
            f(x).sum().backward()
        return x.grad

    def after(x):
        return ops.where(x.data > 0, ops.sqrt(x), 0.0)

    def before(x):
        positive = x.data > 0
        return ops.where(positive, ops.sqrt(ops.where(positive, x, 1.0)), 0.0)

    np.testing.assert_array_equal(slope(after), [np.nan, 0.25])
    np.testing.assert_array_equal(slope(before), [0, 0.25])


def test_a_default_argument_is_made_once():
    """A tensor as default is the same tensor in every call, with the gradients of all of them."""
    def scaled(x, scale=xc.tensor([2.0], requires_grad=True)):
        return (x * scale).sum(), scale

    for expected in (3, 6):
        y, scale = scaled(xc.tensor([3.0]))
        y.backward()
        assert scale.grad == expected


def test_a_new_thread_records_even_inside_no_grad():
    """The switch belongs to a thread or task. A thread that must not record says so itself."""
    x, seen = xc.tensor([1.0], requires_grad=True), []
    with xc.no_grad():
        thread = threading.Thread(target=lambda: seen.append((x * 2.0).requires_grad))
        thread.start()
        thread.join()
    assert seen == [True]


def test_a_kept_loss_keeps_its_graph():
    """A list of losses holds everything their graphs saved until backward; keep ``loss.item()``."""
    x = xc.tensor(np.ones(1000, np.float32), requires_grad=True)
    h = x * 2.0
    saved = weakref.ref(h.data)
    loss = (h * h).sum()
    del h
    assert saved() is not None
    number = loss.item()
    del loss
    assert saved() is None and number == 4000


# ---------------------------------------------------------------------- is refused
def test_integers_have_no_gradients():
    """A list of Python integers is an integer tensor."""
    assert xc.tensor([1, 2]).dtype == np.int64
    with pytest.raises(DTypeError, match="float32 or float64"):
        xc.tensor([1, 2], requires_grad=True)
    assert xc.tensor([1, 2], dtype=np.float32, requires_grad=True).requires_grad


def test_a_graph_is_used_once():
    """``backward`` frees what was saved as it goes; ``retain_graph=True`` keeps it."""
    x = xc.tensor([1.0], requires_grad=True)
    y = ops.exp(x)
    y.backward([1.0], retain_graph=True)
    y.backward([1.0])
    with pytest.raises(GradError, match="'exp' was already used"):
        y.backward([1.0])


def test_second_derivatives_do_not_exist():
    """Gradients are arrays and on no tape; :func:`xuracore.gradcheck.hvp` differentiates them numerically."""
    with pytest.raises(GradError, match="create_graph is not supported"):
        xc.grad(lambda x: x * x, create_graph=True)


def test_a_change_between_forward_and_backward_is_caught():
    """An optimizer step, ``add_`` or loading a state between the two would make the gradient one of other weights."""
    x = xc.tensor([2.0], requires_grad=True)
    y = x * x
    with xc.no_grad():
        x.add_(1.0)
    with pytest.raises(GradError, match="at version 0, now 1"):
        y.backward([1.0])


def test_numpy_functions_do_not_take_recorded_tensors():
    """``np.exp(x)`` would drop the gradient in silence. ``x.data`` says that this is meant."""
    x = xc.tensor([1.0], requires_grad=True)
    with pytest.raises(TypeError):
        np.exp(x)
    with pytest.raises(GradError, match="lose its gradient"):
        np.asarray(x)
    assert np.exp(x.data).shape == (1,)


def test_a_list_of_modules_would_be_forgotten():
    """Nobody looks into lists: ``ModuleList`` does, and names with an underscore are private on purpose."""
    model = nn.Module()
    with pytest.raises(DTypeError, match="use ModuleList"):
        model.layers = [nn.LayerNorm(2)]
    model.layers = nn.ModuleList([nn.LayerNorm(2)])
    assert model.parameter_count() == 4


def test_elements_are_not_assigned():
    """Assignment to a tensor that requires gradients needs no_grad, so that nobody expects a gradient through it."""
    x = xc.tensor([1.0, 2.0], requires_grad=True)
    with pytest.raises(GradError, match="no_grad"):
        x[0] = 3.0
    with xc.no_grad():
        x[0] = 3.0
    assert x.data.tolist() == [3, 2]


def test_the_truth_of_several_elements_is_not_defined():
    """As in NumPy: say ``.any()`` or ``.all()`` of a comparison."""
    with pytest.raises(ValueError, match="ambiguous"):
        bool(xc.tensor([1.0, 2.0]))
    assert xc.tensor([0.5]) and not xc.tensor(0.0)


def test_a_single_number_cannot_be_counted_or_iterated():
    """A 0-d tensor has no length and no elements to iterate over; ``float(x)`` or ``x.item()``."""
    for call in (len, list):
        with pytest.raises(DTypeError, match="no length"):
            call(xc.tensor(1.0))


# ---------------------------------------------------------------------- is only unusual
def test_powers_and_comparisons_on_either_side():
    """NumPy arrays on the left ask the tensor, and comparisons give plain arrays of bool."""
    x = xc.tensor([1.0, 2.0], requires_grad=True)
    np.testing.assert_array_equal((2.0**x).data, [2, 4])
    np.testing.assert_array_equal((1 - x).data, [0, -1])
    np.testing.assert_array_equal(np.array([1.0, 1.0]) < x, [False, True])
    np.testing.assert_array_equal((np.eye(2) @ x).data, [1, 2])
    assert type(np.ones(2) * x) is type(np.float64(2) * x) is xc.Tensor


def test_arrays_in_arrays_out_tensors_in_tensors_out():
    """Ops on plain arrays are plain functions of NumPy arrays: nothing is recorded."""
    x = np.ones((2, 2), np.float32)
    assert type(ops.exp(x)) is np.ndarray and type(ops.exp(xc.Tensor(x))) is xc.Tensor
    assert type(ops.unpack_2(x, sizes=(1, 1))[0]) is np.ndarray
    assert not ops.exp(xc.Tensor(x)).requires_grad


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_starts_threads_of_its_own():
    """Threads do not survive a fork; kernels start new ones in the child, and give the same bits."""
    x = np.linspace(-3, 3, 100_000, dtype=np.float32)
    expected = ops.silu(x).tobytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, in new Pythons
        child = os.fork()
    if not child:
        os._exit(0 if ops.silu(x).tobytes() == expected else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_the_page_is_what_the_tests_say():
    """After a change here: ``python tests/xuracore/footguns_page.py``."""
    spec = importlib.util.spec_from_file_location("footguns_page", Path(__file__).with_name("footguns_page.py"))
    footguns_page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(footguns_page)
    installed = Path(xc.__file__).with_name(footguns_page.PAGE.name)
    assert installed.read_text("utf-8") == footguns_page.page()
