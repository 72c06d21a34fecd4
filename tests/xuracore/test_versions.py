"""The laws of changes in place: who may, what is counted, and what a backward pass then refuses."""

import gc

import numpy as np
import pytest

import xuracore as xc
from training import optim
from xuracore import nn, ops, versions
from xuracore.errors import GradError


def leaf(*values):
    return xc.tensor(list(values), requires_grad=True)


# ---------------------------------------------------------------------- who may
def test_a_leaf_is_changed_outside_the_tape_only():
    x = leaf(1.0, 2.0)
    for change in (lambda: x.add_(1.0), lambda: x.mul_(2.0), lambda: x.zero_(), lambda: x.copy_([3.0, 4.0])):
        before = x.data.copy()
        with pytest.raises(GradError, match="with xc.no_grad"):
            change()
        np.testing.assert_array_equal(x.data, before)
        with xc.no_grad():
            assert change() is x
    np.testing.assert_array_equal(x.data, [3, 4])
    with xc.no_grad():
        x.add_(leaf(1.0, 1.0), scale=-0.5).mul_(2.0)
    np.testing.assert_array_equal(x.data, [5, 7])
    assert x.dtype == np.float32


def test_the_result_of_an_op_is_never_changed():
    y = leaf(1.0, 2.0) * 2.0
    with xc.no_grad(), pytest.raises(GradError, match="result of an op"):
        y[0] = 3.0


def test_a_constant_takes_values_but_loses_no_gradient():
    x = xc.tensor([1.0, 2.0, 3.0])
    x[1:] = xc.tensor([5.0, 6.0])
    x[xc.tensor(0)] = 4
    np.testing.assert_array_equal(x.data, [4, 5, 6])
    with pytest.raises(GradError, match="detach"):
        x[0] = leaf(1.0)[0]
    assert x.version == 2


# ---------------------------------------------------------------------- what is refused
def test_a_change_between_forward_and_backward_is_named():
    layer = nn.Linear(2, 2, rng=np.random.default_rng(0))
    model = nn.ModuleList([layer])
    assert dict(model.named_parameters())["0.weight"] is layer.weight
    with xc.no_grad():
        layer.weight.mul_(0.5).add_(1.0)
    y = layer(leaf(1.0, 2.0)).sum()
    with xc.no_grad():
        layer.weight.add_(1.0).add_(1.0)
    with pytest.raises(GradError, match=r"'linear' saved '0.weight' \(2, 2\) at version 2, now 4: .*in place"):
        y.backward()


def test_views_share_the_version_of_their_memory():
    w = leaf(0.0, 1.0, 2.0, 3.0, 4.0, 5.0)
    y = (w.reshape(2, 3).transpose() * 2.0)[1:] * w[2:4]
    with xc.no_grad():
        w[0] = 9.0  # an element nobody saved, in memory that was
    with pytest.raises(GradError, match="at version 0, now 1"):
        y.sum().backward()
    part = xc.Tensor(w.data[1:3])
    assert part.version == w.version == 1


def test_inputs_that_are_constants_count_too():
    batch, w = xc.tensor([1.0, 2.0]), leaf(3.0, 4.0)
    y = (batch * w).sum()
    batch[...] = 0
    with pytest.raises(GradError, match="'multiply' saved an array"):
        y.backward()


def test_what_saved_nothing_of_it_is_not_disturbed():
    w, x = leaf(1.0, 2.0), leaf(3.0, 4.0)
    y = (ops.exp(w) + w).sum() + (x * x).sum()
    with xc.no_grad():
        w.add_(1.0)
    y.backward()
    np.testing.assert_allclose(w.grad, np.exp([1, 2]) + 1, rtol=1e-6)


def test_optimizers_and_loading_count_as_changes():
    for change in ("step", "load", "average"):
        layer = nn.Linear(2, 1, rng=np.random.default_rng(0))
        average = optim.ExponentialMovingAverage(layer.named_parameters())
        optimizer = optim.SGD(layer, lr=0.1)
        layer(np.ones((1, 2), np.float32)).sum().backward()
        late = layer(leaf(1.0, 2.0)).sum()
        if change == "step":
            optimizer.step()
        elif change == "load":
            layer.load_state_dict(layer.state_dict())
        else:
            with average.applied():
                pass
        with pytest.raises(GradError, match="'linear' saved 'weight'"):
            late.backward()


def test_a_checkpoint_looks_at_its_inputs():
    x = xc.tensor([1.0, 2.0])
    w = leaf(1.0, 1.0)
    y = xc.checkpoint(lambda x: ops.tanh(x * w), x).sum()
    x[0] = 5
    with pytest.raises(GradError, match="'checkpoint' saved"):
        y.backward()


def test_writing_to_the_array_goes_unseen_unless_it_is_said():
    w = leaf(1.0, 2.0)
    y = (w * w).sum()
    w.data[0] = 7.0
    w.mark_changed()
    with pytest.raises(GradError, match="now 1"):
        y.backward()
    y = (w * w).sum()
    w.data[0] = 1.0
    y.backward()
    np.testing.assert_array_equal(w.grad, [2, 4])  # of the new numbers: NumPy told nobody


def test_a_long_history_keeps_the_verdict():
    w = leaf(1.0)
    y = (w * w).sum()
    with xc.no_grad():
        for _ in range(50):
            w.add_(1.0)
    with pytest.raises(GradError, match="at version 42 or earlier, now 50"):
        y.backward()


def test_versions_die_with_their_memory():
    gc.collect()
    before = len(versions._changes)
    tensors = [xc.tensor([1.0]).zero_() for _ in range(100)]
    assert len(versions._changes) == before + 100
    del tensors
    assert len(versions._changes) == before
