"""The laws of the tape: what is recorded, how gradients add up, what is kept and what is not."""

import dataclasses
import gc
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest

import xuracore as xc
from xuracore import ops
from xuracore.autograd import Leaf, Node, Output, unbroadcast
from xuracore.errors import DTypeError, GradError, ShapeError
from xuracore.gradcheck import hvp


def leaf(*values, dtype=np.float32):
    return xc.tensor(values[0] if len(values) == 1 else list(values), dtype=dtype, requires_grad=True)


def random_leaf(*shape, seed=0, dtype=np.float32):
    return xc.tensor(np.random.default_rng(seed).standard_normal(shape), dtype=dtype, requires_grad=True)


# ---------------------------------------------------------------------- switches
def test_nothing_is_recorded_without_gradients():
    x = leaf(1.0, 2.0)
    with xc.no_grad():
        assert not xc.is_grad_enabled()
        assert not (x * 2.0).requires_grad
        with xc.enable_grad():
            assert (x * 2.0).requires_grad
        assert not (x * 2.0).requires_grad
    assert xc.is_grad_enabled() and (x * 2.0).requires_grad


def test_switches_are_decorators_and_keep_the_function():
    @xc.no_grad()
    def double(x):
        """Twice x."""
        return x * 2.0

    assert not double(leaf(1.0, 2.0)).requires_grad
    assert double.__name__ == "double" and double.__doc__ == "Twice x."
    assert xc.enable_grad()(lambda x: x * 2.0)(leaf(1.0)).requires_grad


def test_one_switch_may_be_entered_inside_itself():
    switch = xc.no_grad()
    with switch, switch:
        pass
    assert xc.is_grad_enabled()


def test_an_exception_leaves_no_switch_behind():
    with pytest.raises(ZeroDivisionError), xc.no_grad():
        _ = 1 / 0
    assert xc.is_grad_enabled()


def test_a_generator_cannot_be_decorated():
    with pytest.raises(GradError, match="with no_grad"):

        @xc.no_grad()
        def numbers():
            yield 1


def test_no_grad_in_one_thread_does_not_reach_another():
    inside, seen = threading.Event(), []

    def other():
        inside.wait(10)
        seen.append((leaf(1.0) * 2.0).requires_grad)

    thread = threading.Thread(target=other)
    thread.start()
    with xc.no_grad():
        inside.set()
        thread.join(10)
    assert seen == [True]


# ---------------------------------------------------------------------- how gradients add up
def test_a_leaf_adds_up_over_calls_of_backward():
    x = leaf(1.0, 2.0)
    for _ in range(3):
        (x * x).sum().backward()
    np.testing.assert_array_equal(x.grad, [6, 12])
    x.grad = None
    (x * x).sum().backward()
    np.testing.assert_array_equal(x.grad, [2, 4])


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
@pytest.mark.parametrize("uses", [1, 2, 3, 4, 7])
def test_every_use_of_a_tensor_counts(shape, uses):
    """Also of a 0-d tensor, whose gradients NumPy hands out as immutable numbers."""
    x = random_leaf(*shape)
    y = x * 1.0
    total = sum(y * float(n) for n in range(1, uses + 1))
    total.backward(np.ones(shape))
    np.testing.assert_allclose(x.grad, np.full(shape, uses * (uses + 1) / 2))
    assert isinstance(x.grad, np.ndarray) and x.grad.shape == shape


def test_one_tensor_as_both_inputs():
    x = leaf(3.0, -2.0)
    (x * x).sum().backward()
    np.testing.assert_array_equal(x.grad, [6, -4])
    x = random_leaf(3, 3)
    ops.matmul(x, x).sum().backward()
    ones = np.ones((3, 3), np.float32)
    np.testing.assert_allclose(x.grad, ones @ x.data.T + x.data.T @ ones, rtol=1e-5)


def test_gradients_that_share_memory_do_not_disturb_each_other():
    """``add`` hands one array to both inputs, ``reshape`` and ``transpose`` hand on views."""
    x, y = leaf(1.0, 2.0), leaf(3.0, 4.0)
    cotangent = np.array([1.0, 1.0], np.float32)
    for _ in range(3):
        (x + y).backward(cotangent)
        ((x + x) + (y.reshape(2, 1).transpose().reshape(2) + x)).backward(cotangent)
    np.testing.assert_array_equal(x.grad, [12, 12])
    np.testing.assert_array_equal(y.grad, [6, 6])
    np.testing.assert_array_equal(cotangent, [1, 1])


def test_an_intermediate_result_used_in_several_places():
    x = leaf(2.0)
    y = x * x
    z = y + y * y + y
    z.backward()
    assert x.grad == 4 * 2 + 4 * 2**3


def test_outputs_that_are_not_used_contribute_nothing():
    x = random_leaf(4, 6)
    first, second, third = ops.unpack_3(x, sizes=(1, 2, 3))
    (second * 2.0).sum().backward()
    expected = np.zeros((4, 6))
    expected[:, 1:3] = 2
    np.testing.assert_array_equal(x.grad, expected)
    assert first.requires_grad and third.requires_grad


def test_outputs_that_are_used_twice_add_up():
    x = random_leaf(2, 4)
    first, second = ops.unpack_2(x, sizes=(2, 2))
    (first * first + second + second).sum().backward()
    np.testing.assert_allclose(x.grad, np.concatenate([2 * x.data[:, :2], np.full((2, 2), 2)], axis=1))


def test_the_cotangent_weighs_the_result():
    x = leaf(1.0, 2.0)
    (x * 3.0).backward([1.0, 10.0])
    np.testing.assert_array_equal(x.grad, [3, 30])


# ---------------------------------------------------------------------- clear refusals
def test_a_graph_is_used_once():
    x = leaf(1.0, 2.0)
    y = ops.exp(x)
    y.sum().backward()
    before = x.grad
    with pytest.raises(GradError, match="'exp' was already used"):
        y.sum().backward()
    assert x.grad is before


def test_only_a_single_number_has_an_obvious_cotangent():
    y = leaf(1.0, 2.0) * 2.0
    with pytest.raises(GradError, match=r"shape \(2,\) needs a cotangent"):
        y.backward()
    with pytest.raises(ShapeError, match=r"cotangent has shape \(3,\)"):
        y.backward(np.ones(3))
    y.sum().reshape(1, 1).backward()


def test_nothing_recorded_is_said():
    with pytest.raises(GradError, match="nothing was recorded"):
        xc.tensor([1.0]).backward()
    with pytest.raises(GradError, match="does not require"):
        xc.autograd.gradients(leaf(1.0) * 2.0, [xc.tensor(1.0)])


def test_second_derivatives_are_refused():
    with pytest.raises(GradError, match="create_graph is not supported"):
        xc.grad(lambda x: x * x, create_graph=True)


def test_gradients_are_for_leaves_of_floating_point():
    x = leaf(1.0)
    with pytest.raises(DTypeError, match="float32 or float64"):
        xc.tensor([1, 2], requires_grad=True)
    with pytest.raises(GradError, match="detach"):
        (x * 2.0).requires_grad_(False)
    with pytest.raises(GradError, match="only a leaf"):
        (x * 2.0).grad = np.ones(())
    with pytest.raises(ShapeError, match="gradient has shape"):
        x.grad = np.ones(3)
    with pytest.raises(DTypeError, match="use .data"):
        x.astype(int)


def test_numpy_does_not_take_a_tensor_off_the_tape_unnoticed():
    with pytest.raises(GradError, match="lose its gradient"):
        np.asarray(leaf(1.0))
    with pytest.raises(TypeError):
        np.exp(leaf(1.0))
    np.testing.assert_array_equal(np.asarray(leaf(1.0, 2.0).detach()), [1, 2])


def test_a_wrong_vjp_is_named():
    y = ops.exp(random_leaf(3, 4))
    y.node.primitive = dataclasses.replace(y.node.primitive, vjp=lambda grad, saved, needs: (grad.T,))
    with pytest.raises(GradError, match=r"vjp of 'exp' is wrong: .*\(4, 3\)"):
        y.sum().backward()


@pytest.mark.parametrize("shape, wider", [((), (2, 3)), ((1,), (4,)), ((3, 1), (2, 3, 4)), ((2, 3), (2, 3))])
def test_unbroadcast_is_the_adjoint_of_broadcasting(shape, wider):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal(shape), rng.standard_normal(wider)
    np.testing.assert_allclose((np.broadcast_to(x, wider) * y).sum(), (x * unbroadcast(y, shape)).sum())


# ---------------------------------------------------------------------- value_and_grad
def test_value_and_grad():
    def f(a, b, scale=1.0):
        return (a * a * b).sum() * scale

    a, b = np.array([1.0, 2.0], np.float32), np.array([3.0, 4.0], np.float32)
    value, slope = xc.value_and_grad(f)(a, b, scale=2.0)
    assert type(value) is np.ndarray and value == 38
    np.testing.assert_array_equal(slope, 4 * a * b)
    value, (to_a, to_b) = xc.value_and_grad(f, argnums=(0, 1))(a, b)
    np.testing.assert_array_equal(to_a, 2 * a * b)
    np.testing.assert_array_equal(to_b, a * a)
    np.testing.assert_array_equal(xc.grad(f, argnums=1)(a, b), a * a)
    np.testing.assert_array_equal(xc.grad(f, argnums=-1)(xc.Tensor(a), xc.Tensor(b)), a * a)
    assert xc.grad(lambda x: x * x)(3.0).dtype == np.float32
    assert xc.grad(lambda x: x * x)(np.float64(3)).dtype == np.float64


def test_value_and_grad_leaves_other_gradients_alone():
    w = leaf(2.0, 3.0)
    slope = xc.grad(lambda x: (x * w).sum())(np.ones(2, np.float32))
    np.testing.assert_array_equal(slope, w.data)
    assert w.grad is None


def test_an_argument_without_influence_has_gradient_zero():
    np.testing.assert_array_equal(xc.grad(lambda x: xc.tensor(1.0))(np.ones(2)), [0, 0])
    slopes = xc.grad(lambda x, y: x.sum(), argnums=(0, 1))(np.ones(2), np.ones(3))
    np.testing.assert_array_equal(slopes[1], [0, 0, 0])


def test_value_and_grad_records_even_where_recording_is_off():
    with xc.no_grad():
        assert xc.grad(lambda x: x * x)(np.float32(3)) == 6


def test_value_and_grad_refuses_nonsense():
    with pytest.raises(DTypeError, match="argument 0 is int64"):
        xc.grad(lambda x: x * 1.0)(np.arange(3))
    with pytest.raises(GradError, match="no argument 1"):
        xc.grad(lambda x: x * 1.0, argnums=1)(np.ones(1))
    with pytest.raises(GradError, match="returned float"):
        xc.grad(lambda x: 1.0)(np.ones(1))
    with pytest.raises(GradError, match="needs a cotangent"):
        xc.grad(lambda x: x * 2.0)(np.ones(3))


def test_hvp_of_a_quadratic_is_its_matrix():
    rng = np.random.default_rng(0)
    a, x, v = rng.standard_normal((3, 3)), rng.standard_normal(3), rng.standard_normal(3)
    product = hvp(lambda x: (x * (a @ x)).sum(), x, v)
    np.testing.assert_allclose(product, (a + a.T) @ v, rtol=1e-6)


# ---------------------------------------------------------------------- float types
ARRAYS = {
    "Python float": 0.1,
    "Python int": 3,
    "np.float64": np.float64(0.1),
    "np.int64": np.int64(3),
    "float64 array": np.full((2, 2), 0.1),
    "int64 array": np.full((2, 2), 3),
    "list": [[1.0, 2.0], [3.0, 4.0]],
    "int Tensor": xc.Tensor(np.full((2, 2), 3)),
}
OPS = [ops.add, ops.multiply, ops.divide, ops.power, ops.maximum, ops.minimum]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("name", ARRAYS)
def test_constants_take_the_dtype_of_the_tensor(op, name):
    x, constant = leaf([[1.0, 2.0], [3.0, 4.0]]), ARRAYS[name]
    for y in (op(x, constant), op(constant, x)):
        assert y.dtype == np.float32
        y.sum().backward()
        assert x.grad.dtype == np.float32


@pytest.mark.parametrize("name", [n for n in ARRAYS if "array" in n or n in ("list", "int Tensor")])
def test_matrices_and_joins_take_the_dtype_of_the_tensor(name):
    x, constant = leaf([[1.0, 2.0], [3.0, 4.0]]), ARRAYS[name]
    condition = np.array([True, False])
    results = [
        ops.where(condition, x, constant), ops.concatenate(x, constant), ops.stack(constant, x),
        ops.linear(x, constant),
    ]
    results += [ops.matmul(x, constant), ops.einsum(x, constant, equation="ij,jk->ik")]
    assert {y.dtype for y in results} == {np.dtype(np.float32)}


def test_bounds_of_any_kind_leave_float32():
    assert ops.clip(leaf(1.0, 2.0), low=np.float64(0.5), high=np.int64(1)).dtype == np.float32
    assert ops.where(np.array([True, False]), leaf(1.0, 2.0), 0.0).dtype == np.float32


def test_integer_arrays_do_not_widen_floats_without_tensors_either():
    assert ops.multiply(np.ones(2, np.float32), np.arange(2)).dtype == np.float32
    assert ops.multiply(np.ones(2, np.float32), 2.0).dtype == np.float32
    assert ops.add([1.0], [2.0]).tolist() == [3.0]


def test_a_gradient_has_the_dtype_of_its_input():
    narrow, wide = random_leaf(3), random_leaf(3, dtype=np.float64)
    y = narrow * wide
    assert y.dtype == np.float64
    (y * narrow.astype(np.float64)).sum().backward()
    assert narrow.grad.dtype == np.float32 and wide.grad.dtype == np.float64


def test_python_numbers_become_float32_and_arrays_stay():
    assert xc.tensor([1.0, 2.0]).dtype == xc.Tensor([1.0, 2.0]).dtype == np.float32
    assert xc.tensor(0.1, dtype=np.float64).item() == 0.1
    assert xc.tensor([1, 2]).dtype == np.int64
    given = np.ones(2)
    assert xc.Tensor(given).data is given and xc.tensor(given).data is not given


def test_tensors_compare_by_element_and_hash_by_identity():
    x, y = xc.tensor([1.0, 2.0]), xc.tensor([1.0, 3.0])
    np.testing.assert_array_equal(x == y, [True, False])
    np.testing.assert_array_equal(x != 1.0, [False, True])
    np.testing.assert_array_equal(np.array([1.0, 0.0]) == x, [True, False])
    assert len({x, y, x}) == 2


def test_a_tensor_by_keyword_is_an_input_like_any_other():
    x, weight, bias = random_leaf(2, 3), random_leaf(4, 3, seed=1), random_leaf(4, seed=2)
    y = ops.linear(x, bias=bias, weight=weight)
    np.testing.assert_array_equal(y.data, ops.linear(x, weight, bias).data)
    y.sum().backward()
    assert weight.grad.any() and bias.grad.any()
    shift = random_leaf(3)
    ops.layer_norm(x, bias=shift).sum().backward()
    np.testing.assert_array_equal(shift.grad, [2, 2, 2])


# ---------------------------------------------------------------------- checkpoint
def grads_of(build):
    """Gradients of x, w and v after ``build(x, w, v, checkpoint or not)`` gave a scalar."""
    found = []
    for wrap in (lambda f, *xs: f(*xs), xc.checkpoint):
        x, w, v = random_leaf(3, 4), random_leaf(4, 4, seed=1), random_leaf(4, seed=2)
        build(x, w, v, wrap).backward()
        found.append((x.grad, w.grad, v.grad))
    return found


def assert_bit_equal(found):
    for plain, recomputed in zip(*found):
        assert plain.tobytes() == recomputed.tobytes() and plain.dtype == recomputed.dtype


def test_checkpointed_gradients_are_bit_equal():
    """Also where the function closes over parameters, and where these are used outside as well."""
    def build(x, w, v, wrap):
        before = ops.tanh(x @ w) + v

        def inside(h):
            h = ops.tanh(h @ w) * v
            return ops.silu(h @ w + v) * h

        y = wrap(inside, before)
        y = wrap(inside, y) + before
        return (ops.tanh(y @ w) * v * x).sum()

    assert_bit_equal(grads_of(build))


def test_a_checkpoint_with_several_outputs_that_share_their_past():
    def build(x, w, v, wrap):
        def inside(x, v):
            h = ops.exp(x @ w * 0.1)
            return h * v, h + v, h.sum()

        first, second, _ = wrap(inside, x, v)
        return (first * second * second).sum()

    assert_bit_equal(grads_of(build))


def test_checkpoints_inside_checkpoints_and_results_closed_over():
    def build(x, w, v, wrap):
        outside = ops.sin(x @ w)

        def inner(h):
            return ops.exp(h * 0.1) * outside

        def middle(h):
            return wrap(inner, h @ w) + outside * v

        return (wrap(middle, x) * outside).sum()

    assert_bit_equal(grads_of(build))


def test_a_checkpoint_keeps_nothing_inside():
    kept = []

    def inside(h):
        for _ in range(5):
            h = ops.tanh(h)
            kept.append(weakref.ref(h.data))
        return h

    y = xc.checkpoint(inside, random_leaf(3))
    assert [reference() is not None for reference in kept] == [False] * 4 + [True]
    y.sum().backward()
    del y
    assert not any(reference() is not None for reference in kept)


def test_a_checkpoint_is_used_once_and_passes_on_what_is_not_recorded():
    x = random_leaf(3)
    y, number = xc.checkpoint(lambda x: (ops.exp(x), 7), x)
    assert number == 7
    y.sum().backward()
    with pytest.raises(GradError, match="'checkpoint' was already used"):
        y.sum().backward()
    with xc.no_grad():
        assert not xc.checkpoint(ops.exp, x).requires_grad


# ---------------------------------------------------------------------- memory and depth
def test_a_training_step_leaves_nothing_to_the_garbage_collector():
    rng = np.random.default_rng(0)
    layer, norm = xc.nn.Linear(4, 3, rng=rng), xc.nn.LayerNorm(4)

    def step():
        x = xc.Tensor(rng.standard_normal((2, 5, 4)).astype(np.float32))
        h = norm(x)
        a, b = ops.unpack_2(h, sizes=(1, 3))
        y = xc.checkpoint(lambda h: ops.gelu(layer(h)), h)
        loss = ops.softmax(y).sum() + (a * a).mean() + (y[:, 1:] * b[:, :4]).sum() + y.max() + x.sum()
        loss.backward()
        layer.zero_grad()

    step()
    gc.collect()
    gc.disable()
    try:
        step()
        ours = [x for x in gc.get_objects() if isinstance(x, (xc.Tensor, Node, Output, Leaf, np.ndarray))]
        before = len(ours)
        del ours
        step()
        ours = [x for x in gc.get_objects() if isinstance(x, (xc.Tensor, Node, Output, Leaf, np.ndarray))]
        assert len(ours) == before
        del ours
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_arrays_live_only_while_someone_needs_them():
    x = random_leaf(100)
    a = x + 1.0  # add saves nothing
    b = ops.exp(a)  # exp saves its result, not its input
    reference = weakref.ref(a.data)
    del a
    assert reference() is None
    result = weakref.ref(b.data)
    loss = b.sum()
    del b
    assert result() is not None
    loss.backward()
    assert result() is None


def test_threads_train_their_own_models():
    results = {}

    def train(seed):
        w = random_leaf(8, 8, seed=seed)
        for _ in range(30):
            (ops.tanh(w @ w) * w).sum().backward()
        results[seed] = w.grad

    threads = [threading.Thread(target=train, args=(seed,)) for seed in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = dict(results)
    for seed in (1, 2, 3):
        train(seed)
        np.testing.assert_array_equal(together[seed], results[seed])


@pytest.mark.bench
def test_a_small_op_costs_little():
    """At most 1.5 µs recorded and 3 µs with its gradient where NumPy takes 0.31 µs; a quarter of slack."""
    code = """
import time, numpy as np, xuracore as xc
x, y = (xc.Tensor(np.ones(16, np.float32), requires_grad=True) for _ in range(2))
def chain(z, a, b):
    for _ in range(400):
        z = z * a
        z = z + b
    return z
def best(call):
    times = []
    for _ in range(30):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times) / 800 * 1e6
raw = best(lambda: chain(x.data, y.data, x.data))
print(best(lambda: chain(x, y, x)) / raw, best(lambda: chain(x, y, x).sum().backward()) / raw)
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    forward, both = map(float, output.split())
    assert forward < 1.25 * 4.8 and both < 1.25 * 9.7
