"""The laws of user-defined ops, of functions on gradients and modules, and of the search for anomalies."""

import asyncio
import gc
import itertools
import sys
import threading
import weakref

import numpy as np
import pytest

import xuracore as xc
from xuracore import nn, ops
from xuracore.errors import GradError, ShapeError
from xuracore.ops import registry


def leaf(*values, dtype=np.float32):
    return xc.tensor(list(values), dtype=dtype, requires_grad=True)


quietly = np.errstate(all="ignore")  # NumPy's own warnings come first


class Cube(xc.Function):
    """scale · x³."""

    def forward(save, x, *, scale=1.0):
        save(x, scale)
        return scale * x**3

    def vjp(grad, saved, needs):
        x, scale = saved
        return 3 * scale * grad * x * x


class Rotate(xc.Function):
    """(a cos t - b sin t, a sin t + b cos t)."""

    outputs = 2

    def forward(save, a, b, t):
        save(a, b, t)
        return a * np.cos(t) - b * np.sin(t), a * np.sin(t) + b * np.cos(t)

    def vjp(grad, saved, needs):
        (u, v), (a, b, t) = grad, saved
        sin, cos = np.sin(t), np.cos(t)
        to_t = u * (-a * sin - b * cos) + v * (a * cos - b * sin) if needs[2] else None
        return u * cos + v * sin, -u * sin + v * cos, to_t


# ---------------------------------------------------------------------- Function
def test_a_function_is_an_op():
    x = leaf(1.0, 2.0)
    y = Cube.apply(x, scale=2.0)
    np.testing.assert_array_equal(y.data, [2, 16])
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, [6, 24])
    assert type(Cube.apply(x.data)) is np.ndarray
    with xc.no_grad():
        assert not Cube.apply(x).requires_grad
    assert xc.gradcheck(lambda x: Cube.apply(x, scale=0.5), [np.random.default_rng(0).standard_normal((2, 3))])


def test_several_outputs_broadcasting_and_inputs_by_keyword():
    rng = np.random.default_rng(0)
    a, b, t = rng.standard_normal((2, 3)), rng.standard_normal((2, 3)), rng.standard_normal(3)
    assert xc.gradcheck(Rotate.apply, [a, b, t])
    assert xc.gradcheck(lambda a, b, t: Rotate.apply(a, b, t)[1], [a, b, t])
    assert xc.gradcheck(lambda a, t: Rotate.apply(a, b, t=t), [a, t])


def test_a_function_keeps_only_what_it_saved():
    class Double(xc.Function):
        def forward(save, x):
            return 2 * x

        def vjp(grad, saved, needs):
            assert saved == ()
            return 2 * grad

    h = leaf(1.0, 2.0) + 1.0
    array = weakref.ref(h.data)
    y = Double.apply(h)
    del h
    assert array() is None
    y.sum().backward()


def faulty(result):
    class Faulty(xc.Function):
        def forward(save, x, y):
            return x * y

        def vjp(grad, saved, needs):
            return result(grad)

    return Faulty.apply(leaf(1.0, 2.0), leaf(3.0)).sum()


@pytest.mark.parametrize(
    "result, error, message",
    [
        (lambda g: g, GradError, "returned 1 gradients for 2 inputs"),
        (lambda g: (g, g, g), GradError, "returned 3 gradients for 2 inputs"),
        (lambda g: (g[:1], g), ShapeError, r"shape \(1,\) for input 0, which has shape \(2,\)"),
        (lambda g: (g, np.ones(3, np.float32)), ShapeError, r"shape \(3,\) for input 1, which has shape \(1,\)"),
        (lambda g: (g.astype(np.float64), g), GradError, "returned float64 for input 0, which is float32"),
        (lambda g: (g, 3.0), GradError, "for input 1 a float; expected an array"),
        (lambda g: (xc.Tensor(g), g), GradError, "inside a Function everything is NumPy"),
    ],
)
def test_a_wrong_vjp_is_said(result, error, message):
    with pytest.raises((error, GradError), match=message):
        faulty(result).backward()


def test_a_wrong_forward_is_said():
    class Twice(xc.Function):
        def forward(save, x):
            save(x)
            save(x)
            return x

        def vjp(grad, saved, needs):
            return grad

    with pytest.raises(GradError, match="called save 2 times"):
        Twice.apply(leaf(1.0))

    class Single(Rotate):
        def forward(save, a, b, t):
            return a

    with pytest.raises(GradError, match="tuple of 2 arrays; it gave ndarray"):
        Single.apply(leaf(1.0), leaf(1.0), leaf(1.0))
    with pytest.raises(GradError, match="both a forward and a vjp"):
        xc.Function.apply(leaf(1.0))


# ---------------------------------------------------------------------- hooks
def test_hooks_see_whole_gradients_and_may_replace_them():
    x = leaf(1.0, 2.0)
    seen = []
    x.register_hook(lambda g: seen.append(("x", g.tolist())))
    h = x * 2.0
    doubling = h.register_hook(lambda g: g * 2)
    h.register_hook(lambda g: seen.append(("h", g.tolist())))
    (h + h * 3.0).sum().backward()
    assert seen == [("h", [8, 8]), ("x", [16, 16])]
    np.testing.assert_array_equal(x.grad, [16, 16])
    doubling.remove()
    doubling.remove()
    x.grad = None
    h = x * 2.0
    with h.register_hook(lambda g: np.zeros_like(g)):
        h.sum().backward(retain_graph=True)
    assert not x.grad.any()
    h.sum().backward()
    np.testing.assert_array_equal(x.grad, [2, 2])


def test_hooks_on_one_of_several_outputs_and_on_single_numbers():
    x = leaf(1.0, 2.0, 3.0)
    a, b = ops.unpack_2(x, sizes=(1, 2))
    b.register_hook(lambda g: xc.Tensor(-g))
    total = a.sum() + b.sum()
    total.register_hook(lambda g: g * 5.0)
    total.backward()
    np.testing.assert_array_equal(x.grad, [5, -5, -5])


def test_a_hook_keeps_shape_and_dtype():
    x = leaf(1.0, 2.0)
    with x.register_hook(lambda g: g.astype(np.float64)):
        (x * x).sum().backward()
    assert x.grad.dtype == np.float32
    with x.register_hook(lambda g: g[:1]), pytest.raises(ShapeError, match=r"returned a gradient of shape \(1,\)"):
        (x * x).sum().backward()
    with pytest.raises(GradError, match="this one is a constant"):
        xc.tensor([1.0]).register_hook(print)


def test_hooks_work_in_grad_and_through_checkpoints():
    x = leaf(1.0, 2.0)
    seen = []

    def inside(x):
        h = ops.exp(x)
        if h.requires_grad:  # not in the first call of a checkpoint
            h.register_hook(lambda g: seen.append(1))
        return h * h

    xc.checkpoint(inside, x).sum().backward()
    assert seen == [1]
    slope = xc.grad(lambda w: inside(w).sum())(np.ones(2, np.float32))
    assert seen == [1, 1] and slope.shape == (2,)


def test_module_hooks_change_arguments_and_results():
    layer = nn.Linear(2, 2, bias=False, rng=np.random.default_rng(0))
    x = np.ones((1, 2), np.float32)
    plain = layer(x).tolist() if isinstance(layer(x), np.ndarray) else layer(x).data
    calls = []
    before = layer.register_forward_pre_hook(lambda m, args: calls.append("before") or (args[0] * 2,))
    after = layer.register_forward_hook(lambda m, args, y: calls.append("after") or y + 1.0)
    np.testing.assert_allclose(layer(x).data, 2 * plain + 1, rtol=1e-6)
    assert calls == ["before", "after"]
    before.remove()
    after.remove()
    np.testing.assert_array_equal(layer(x).data, plain)
    assert nn.Module._hooks is None and list(layer.state_dict()) == ["weight"]


# ---------------------------------------------------------------------- detect_anomaly
@quietly
def test_the_op_and_its_line_are_named():
    x = leaf(0.0, 4.0)
    with xc.detect_anomaly(), pytest.raises(GradError) as caught:
        y = ops.sqrt(x)  # the culprit
        (y * y).sum().backward()
    message = str(caught.value)
    assert "input 0 of 'sqrt'" in message and "1 of 2 elements" in message
    assert "test_function.py" in message and "y = ops.sqrt(x)  # the culprit" in message


@quietly
def test_results_are_looked_at_when_asked_and_functions_too():
    class Bad(xc.Function):
        def forward(save, x):
            return x

        def vjp(grad, saved, needs):
            return grad * np.float32(np.nan)

    with xc.detect_anomaly(outputs=True), pytest.raises(GradError, match="result of 'log' is not finite.*infinite"):
        ops.log(xc.tensor([0.0]))
    with xc.detect_anomaly(), pytest.raises(GradError, match="input 0 of 'Bad' is not finite.*NaN.*Bad.apply"):
        Bad.apply(leaf(1.0)).sum().backward()
    with xc.detect_anomaly(), pytest.raises(GradError, match="gradient that reaches 'multiply'"):
        (leaf(1.0) * 2.0).backward([np.inf])


def test_a_gradient_nobody_wants_may_be_anything():
    x = xc.tensor([0.0])
    with xc.detect_anomaly():
        (leaf(1.0) / (x + 1.0)).sum().backward()
        (leaf(2.0) ** x).sum().backward()


@quietly
def test_graphs_cross_the_border_of_the_block():
    x = leaf(1.0)
    before = ops.exp(x)
    with xc.detect_anomaly():
        inside = ops.exp(x)
        before.backward([1.0])
    inside.backward([1.0])
    y = ops.sqrt(leaf(0.0))
    with xc.detect_anomaly(), pytest.raises(GradError, match="outside detect_anomaly"):
        y.backward([1.0])


@quietly
def test_other_threads_are_not_watched_and_nothing_stays_behind():
    results = []

    def other():
        x = leaf(0.0)
        with np.errstate(all="ignore"):
            ops.sqrt(x).sum().backward()
        results.append(np.isinf(x.grad).all())

    plain = registry.REGISTRY["sqrt"].bare
    with xc.detect_anomaly(), xc.detect_anomaly(outputs=True):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert results == [True]
    record = registry.REGISTRY["sqrt"]
    assert (record.forward, record.vjp) == plain and not registry._instruments


# ---------------------------------------------------------------------- guarantees
def test_a_kept_graph_gives_the_same_bits_again():
    rng = np.random.default_rng(0)
    layer = nn.Linear(4, 4, rng=rng)
    x = rng.standard_normal((3, 4)).astype(np.float32)

    def loss():
        y = ops.softmax(ops.gelu(layer(x)))
        return xc.checkpoint(lambda y: ops.layer_norm(y * y), y)[:, :2].mean()

    y = loss()
    y.backward(retain_graph=True)
    first = layer.weight.grad.tobytes()
    layer.zero_grad()
    y.backward()
    assert layer.weight.grad.tobytes() == first
    with pytest.raises(GradError, match="retain_graph=True"):
        y.backward()


def test_second_derivatives_are_refused_with_a_way_out():
    with pytest.raises(GradError, match="create_graph is not supported.*hvp"):
        (leaf(1.0) * 2.0).sum().backward(create_graph=True)


def test_every_vjp_may_run_twice():
    """What ``retain_graph`` rests on: no vjp destroys what its forward saved."""
    for record in xc.ops.REGISTRY.values():
        for inputs, attributes in itertools.islice(record.samples(np.random.default_rng(0)), 2):
            with np.errstate(all="ignore"):
                output, saved = record.forward(*inputs, **attributes)
                grad = tuple(map(np.ones_like, output)) if record.outputs > 1 else np.ones_like(output)
                needs = [isinstance(x, np.ndarray) and x.dtype.kind == "f" for x in inputs]
                if not any(needs):
                    continue
                first, second = (
                    [np.array(g) for g, need in zip(record.vjp(grad, saved, needs), needs) if need and g is not None]
                    for _ in range(2)
                )
            for one, other in zip(first, second):  # BLAS may round the last bit by where an array lies
                np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-13, err_msg=record.name)


def test_dropout_inside_a_checkpoint_draws_the_same_again():
    x = np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32)
    found = []
    for wrap in (lambda f, *xs, **_: f(*xs), xc.checkpoint):
        rng, own = np.random.default_rng(0), np.random.default_rng(7)
        layer, drop = nn.Linear(8, 8, rng=rng), nn.Dropout(0.5, rng=rng)

        def inner(h, drop=drop, layer=layer):
            return drop(ops.tanh(layer(h)))

        def outer(h, drop=drop, own=own, inner=inner, wrap=wrap):
            noise = own.standard_normal(h.shape).astype(np.float32)
            return wrap(inner, drop(h) * noise) + h

        h = xc.Tensor(x)
        for _ in range(3):
            h = wrap(outer, h, rng=own)
        h.sum().backward()
        found.append((layer.weight.grad.tobytes(), rng.random(), own.random()))
    assert found[0] == found[1]


def test_an_exception_inside_a_recomputation_frees_everything():
    kept, fail = [], [False]

    def inside(h):
        for _ in range(3):
            h = ops.tanh(h)
            kept.append(weakref.ref(h.data))
        if fail[0]:
            raise ZeroDivisionError
        return h

    gc.collect()
    gc.disable()
    try:
        y = xc.checkpoint(inside, leaf(1.0, 2.0)).sum()
        fail[0] = True
        with pytest.raises(ZeroDivisionError):
            y.backward()
        del y
        assert not any(reference() is not None for reference in kept) and xc.is_grad_enabled()
    finally:
        gc.enable()


def test_a_chain_of_200_000_ops():
    """Under the default recursion limit: differentiated, and freed, also where it was never used."""
    limit = sys.getrecursionlimit()
    x = leaf(1.0)
    y = z = x
    for _ in range(50_000):
        z = z + x
    del z
    for _ in range(200_000):
        y = y + 1.0
    end = weakref.ref(y)
    y.sum().backward()
    assert x.grad == 1
    del y
    assert end() is None and sys.getrecursionlimit() == limit


def test_backward_visits_every_node_once():
    """Also where paths multiply: 40 times y + y has 2⁴⁰ of them."""
    visits = []

    def count(record, forward, vjp):
        return forward, lambda *given: visits.append(record.name) or vjp(*given)

    registry.open_instrument(count)
    try:
        for depth in (40, 400):
            visits.clear()
            y = leaf(1e-30)
            for _ in range(depth):
                y = (y + y) * 0.5
            y.sum().backward()
            assert len(visits) == 2 * depth + 1
    finally:
        registry.close_instrument(count)


def test_recording_is_switched_per_task():
    async def worker(on, log):
        for _ in range(5):
            if on:
                log.append((leaf(1.0) * 2.0).requires_grad)
                await asyncio.sleep(0)
            else:
                with xc.no_grad():
                    await asyncio.sleep(0)
                    log.append(not (leaf(1.0) * 2.0).requires_grad)

    async def both():
        logs = [], []
        await asyncio.gather(worker(True, logs[0]), worker(False, logs[1]))
        return logs

    on, off = asyncio.run(both())
    assert on == [True] * 5 and off == [True] * 5
