"""Laws that hold for every registered op, generated from the registry."""

import numpy as np
import pytest

import xuracore as xc
from xuracore.ops.registry import REGISTRY


def _cases():
    for name, record in REGISTRY.items():
        for i, _ in enumerate(record.samples(np.random.default_rng(0))):
            yield pytest.param(name, i, id=f"{name}-{i}")


CASES = list(_cases())


def sample(name, index):
    record = REGISTRY[name]
    inputs, attributes = list(record.samples(np.random.default_rng(0)))[index]
    return record, inputs, attributes


def call(name, inputs, attributes):
    """Run an op through its public function on Tensors where the inputs are floats."""
    function = next(f for f in vars(xc.ops).values() if getattr(f, "primitive", None) is REGISTRY[name])
    result = function(*inputs, **attributes)
    return result if isinstance(result, tuple) else (result,)


def is_float(x):
    return isinstance(x, np.ndarray) and x.dtype.kind == "f"


def floats_of(name, index):
    return sum(map(is_float, sample(name, index)[1]))


def to32(x):
    return x.astype(np.float32) if is_float(x) else x


@pytest.mark.parametrize("name, index", CASES)
def test_gradient_equals_central_difference(name, index):
    record, inputs, attributes = sample(name, index)
    assert xc.gradcheck(lambda *x: call(name, x, attributes), inputs)


@pytest.mark.parametrize("name, index", CASES)
def test_forward_equals_reference_in_float64(name, index):
    record, inputs, attributes = sample(name, index)
    expected = record.reference(*inputs, **attributes)
    for got, want in zip(call(name, inputs, attributes), expected if record.outputs > 1 else (expected,)):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name, index", CASES)
def test_float32_stays_float32_and_near_the_reference(name, index):
    record, inputs, attributes = sample(name, index)
    if "dtype" in attributes:
        pytest.skip("this op's purpose is to change the dtype")
    tensors = [xc.Tensor(to32(x), requires_grad=True) if is_float(x) else x for x in inputs]
    outputs = call(name, tensors, attributes)
    expected = record.reference(*inputs, **attributes)
    for got, want in zip(outputs, expected if record.outputs > 1 else (expected,)):
        assert got.dtype == np.float32
        scale = max(1.0, float(np.max(np.abs(want), initial=0)))
        np.testing.assert_allclose(got.data, want, rtol=record.tolerance, atol=record.tolerance * scale)
    total = None
    for y in outputs:
        total = y.sum() if total is None else total + y.sum()
    total.backward()
    for tensor in tensors:
        if isinstance(tensor, xc.Tensor) and tensor.grad is not None:
            assert tensor.grad.dtype == np.float32 and tensor.grad.shape == tensor.shape


@pytest.mark.parametrize("name, index", CASES)
def test_inputs_are_never_changed_and_no_grad_saves_nothing(name, index):
    record, inputs, attributes = sample(name, index)
    before = [x.copy() if isinstance(x, np.ndarray) else x for x in inputs]
    tensors = [xc.Tensor(x, requires_grad=True) if is_float(x) else x for x in inputs]
    with xc.no_grad():
        assert all(y.node is None for y in call(name, tensors, attributes))
    total = None
    for y in call(name, tensors, attributes):
        total = (y * y).sum() if total is None else total + (y * y).sum()
    total.backward()
    for x, was in zip(inputs, before):
        np.testing.assert_array_equal(x, was)


@pytest.mark.parametrize("name, index", [case for case in CASES if floats_of(*case.values) > 1])
def test_each_subset_of_needed_gradients_gives_the_same_numbers(name, index):
    record, inputs, attributes = sample(name, index)
    floats = [i for i, x in enumerate(inputs) if is_float(x)]

    def gradient(chosen):
        tensors = [xc.Tensor(x, requires_grad=i in chosen) if is_float(x) else x for i, x in enumerate(inputs)]
        total = None
        for y in call(name, tensors, attributes):
            if y.node is not None:
                total = (y * y).sum() if total is None else total + (y * y).sum()
        if total is None:
            return None
        total.backward()
        return {i: tensors[i].grad for i in chosen}

    every = gradient(floats)
    for i in floats:
        alone = gradient([i])
        if alone is not None and every[i] is not None:
            np.testing.assert_allclose(alone[i], every[i], rtol=1e-12, atol=1e-14)


def test_arrays_in_arrays_out():
    assert type(xc.ops.add(np.ones(2), np.ones(2))) is np.ndarray


def test_an_op_without_samples_cannot_be_registered():
    with pytest.raises(TypeError):
        xc.ops.primitive("nothing", lambda x: (x, ()), lambda g, s, n: (g,), reference=np.copy)
    with pytest.raises(ValueError, match="already registered"):
        xc.ops.primitive("add", None, None, reference=None, samples=None)
