"""Every kernel of the chunked scan does what its NumPy twin does, and the scan the same on any number of threads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import xuracore as xc
from xuracore import threads
from xuracore.kernels import ssd, trapezoid


def both(kernel, inputs, outputs):
    """What the kernel and its twin make of copies of ``outputs``."""
    results = []
    for function in (kernel.twin, kernel.sized(0)):
        out = [x.copy() for x in outputs]
        function(*inputs, *out)
        results.append(out)
    return results


def same(results, tolerance=1e-9):
    for want, got in zip(*results):
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)
    return results[0]


PIECES = st.lists(st.integers(1, 9), min_size=1, max_size=3)


def laid_out(lengths):
    """Row of the batch, first token and tokens of pieces that lie apart; and the shape (B, L) that holds them."""
    return np.array([(1, 2 + 12 * i, n) for i, n in enumerate(lengths)]), (2, 12 * len(lengths))


@settings(max_examples=25)
@given(
    st.integers(1, 3), PIECES, st.integers(1, 3), st.booleans(), st.sampled_from([2, 4, 6, 16]),
    st.integers(1, 5), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_the_elementwise_half_equals_its_twin(heads, lengths, rank, shared, size, width, seed):
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal
    places, (batch, length) = laid_out(lengths)
    head = int(rng.integers(heads))
    count, rows, pieces = heads - head, max(lengths) * rank, len(lengths)
    v, skip = normal((batch, length * rank, heads, width)), normal(heads)
    log_decay = -rng.uniform(0, 3, (batch, length, heads))
    gain, own = rng.uniform(0, 1, (2, batch, length, heads))
    q, k = normal((2, pieces, 1 if shared else count, rows, size))
    products = q @ k.swapaxes(2, 3)
    at = places, head
    a, x = np.zeros((pieces, count, rows, size + rows)), normal((pieces, count, size + rows, width))
    scaled, total = np.zeros((pieces, count, rows, width)), np.zeros((pieces, count))
    a, x, *_ = same(both(ssd.ssd_chunk, (q, v, log_decay, gain, own, skip, *at, products), (a, x, scaled, total)))

    grad, da, dx = normal((pieces, count, size, width)), normal(a.shape), normal(x.shape)
    back, dkeys = normal(scaled.shape), normal((pieces, count, rows, size))
    outputs = [np.zeros_like(products), np.zeros_like(q), np.zeros_like(q), normal(v.shape)]
    outputs += [normal(gain.shape) for _ in range(3)] + [normal(heads)]
    same(both(
        ssd.ssd_chunk_gradient, (v, log_decay, gain, own, *at, products, a, x, grad, da, dx, back, dkeys), outputs
    ))  # fmt: skip
    steps = (q, k, v, log_decay, gain, own, skip, *at)
    same(both(ssd.ssd_steps, steps, (normal(grad.shape), np.zeros_like(v))))


@settings(max_examples=25)
@given(
    PIECES, st.integers(1, 3), st.integers(1, 2), st.integers(1, 2), st.sampled_from([2, 4, 6, 16]),
    st.integers(0, 3), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_rotation_equals_its_twin(lengths, rank, groups, per_group, size, turns, half, shared, radians, seed):
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal
    heads, turns = groups * per_group, min(turns, size // 2)
    places, (batch, length) = laid_out(lengths)
    head = int(rng.integers(heads))
    shape = len(lengths), heads - head, max(lengths)
    q, k = normal((2, batch, length, rank, groups, size))
    biases = normal((2, heads, rank, size))
    rate, dt = normal((batch, length, 1 if shared else heads, turns)), rng.uniform(0, 1, (batch, length, heads))
    at = (places, head, half, radians)
    outputs = [rng.uniform(1, 3, (*shape[:2], turns)), *np.zeros((2, *shape, turns))]
    outputs += [*np.zeros((2, *shape[:2], shape[2] * rank, size))]
    results = both(trapezoid.rotated_keys, (q, k, *biases, rate, dt, *at), outputs)
    for one in results:
        one[0] = np.exp(1j * one[0])  # angles near 0 and near 2 pi are the same
    _, cosine, sine, queries, keys = same(results)
    gradients = [normal((*shape[:2], turns)), *np.zeros((2, *q.shape)), *np.zeros((2, heads, rank, size))]
    gradients += [np.zeros(rate.shape), normal(dt.shape)]
    wants = []
    for function in (trapezoid.unrotated_keys.twin, trapezoid.unrotated_keys):
        dq, dk = np.random.default_rng(1).standard_normal((2, *queries.shape))  # used up by each call
        out = [x.copy() for x in gradients]
        function(dq, dk, queries, keys, cosine, sine, rate, dt, *at, *out)
        wants.append(out)
    same(wants)


def test_the_share_of_the_token_before_equals_its_twin():
    normal = np.random.default_rng(0).standard_normal
    inputs = normal((2, 3, 4, 5)), normal((2, 3)), normal((2, 2, 3, 4)), normal((2, 2, 3, 5))
    same(both(trapezoid.previous_token, inputs, [np.zeros((2, 3, 4, 5))]))


def scan_inputs(name, length, dtype):
    rng = np.random.default_rng(2)
    normal, uniform = rng.standard_normal, rng.uniform
    if name == "ssd_scan":
        inputs = [
            normal((1, length, 8, 4)), uniform(0.01, 1, (1, length, 8)), -uniform(0.1, 8, 8),
            normal((1, length, 2, 16)), normal((1, length, 2, 16)), normal(8),
        ]  # fmt: skip
    else:
        inputs = [
            normal((1, length, 2, 1, 16)), normal((1, length, 2, 1, 16)), normal((1, length, 8, 4)),
            uniform(0.01, 1, (1, length, 8)), -uniform(0.1, 8, (1, length, 8)), normal((1, length, 8)),
            normal((1, length, 4)), normal((8, 2, 16)), normal((8, 2, 16)), normal(8), normal((8, 2, 4)),
        ]  # fmt: skip
    return [xc.Tensor(x.astype(dtype), requires_grad=True) for x in inputs]


def run(name, length, dtype):
    inputs = scan_inputs(name, length, dtype)
    y, *state = getattr(xc.ops, name)(*inputs)
    (y * y).sum().backward()
    return [y.numpy()] + [part.numpy() for part in state] + [x.grad for x in inputs]


@pytest.mark.parametrize("name", ["ssd_scan", "trapezoidal_scan"])
@pytest.mark.parametrize("length", [5, 150])
def test_a_scan_in_float32_is_near_float64(name, length):
    for got, want in zip(run(name, length, np.float32), run(name, length, np.float64)):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=0, atol=3e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", ["ssd_scan", "trapezoidal_scan"])
def test_a_scan_gives_the_same_bits_on_any_number_of_threads(name, monkeypatch):
    monkeypatch.setattr(threads, "SHARED_WORK", 0)
    results = []
    for count in (1, 2, 3):
        monkeypatch.setattr(threads, "get_num_threads", lambda: count)
        results.append(run(name, 150, np.float32))
    for other in results[1:]:
        for x, y in zip(results[0], other):
            assert x.tobytes() == y.tobytes()
