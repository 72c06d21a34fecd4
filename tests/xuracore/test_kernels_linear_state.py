"""The kernels of S4 and S4D do what their NumPy twins do, and the same on any number of threads."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xuracore import jit
from xuracore.kernels import linear_state, vandermonde


def call(kernel, tasks, runs):
    """What to call: the twin (runs = 0), or the kernel with its tasks cut into runs."""
    if runs == 0 or jit.backend() == "numpy":
        return kernel.twin
    return kernel.in_runs(min(runs, tasks), tasks)


def scan(seed, batch, length, features, size, channels, low_rank, block, runs):
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal
    coefficients = [0.5 * normal((features, 2, size)) for _ in range(4)]
    if not low_rank:
        coefficients[2:] = np.zeros((2, features, 2, size))
    given = [
        normal((batch, length, features)), *coefficients, normal(features), normal((channels, features, 2, size))
    ]  # fmt: skip
    start, each = normal((batch, features, 2, size)), (batch, features, 2, size)
    y, last = np.full((batch, length, channels, features), np.nan), np.full(each, np.nan)
    stored = np.full((batch, -(-length // block), features, 2, size), np.nan)
    call(linear_state.linear_state_forward, batch * features, runs)(
        *given, start, low_rank, block, y, last, stored
    )
    shapes = [given[0].shape, *[each] * 4, (batch, features), (batch, *given[6].shape), each]
    out = [np.full(shape, np.nan) for shape in shapes]
    call(linear_state.linear_state_backward, batch * features, runs)(
        *given, low_rank, block, stored, normal(y.shape), normal(each), *out
    )
    if not low_rank:
        out[3:6] = []  # gradients of what is not there
    return [y, last, stored, *out]


def powers(seed, channels, features, size, length, runs):
    rng = np.random.default_rng(seed)
    weight, pole = rng.standard_normal((channels, features, 2, size)), 0.6 * rng.standard_normal((features, 2, size))
    k, out = np.full((channels, features, length), np.nan), [np.full(x.shape, np.nan) for x in (weight, pole)]
    call(vandermonde.vandermonde_forward, features, runs)(weight, pole, k)
    call(vandermonde.vandermonde_backward, features, runs)(weight, pole, rng.standard_normal(k.shape), *out)
    return [k, *out]


@settings(max_examples=15)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(1, 2), st.integers(1, 7), st.integers(1, 3), st.integers(1, 9), st.integers(1, 2)),
    st.booleans(), st.integers(1, 4),
)  # fmt: skip
def test_linear_state_equals_its_twin(seed, sizes, low_rank, block):
    for got, want in zip(*(scan(seed, *sizes, low_rank, block, runs) for runs in (1, 0))):
        np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-9)


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.tuples(*[st.integers(1, 4)] * 3, st.integers(1, 9)))
def test_vandermonde_equals_its_twin(seed, sizes):
    for got, want in zip(powers(seed, *sizes, 1), powers(seed, *sizes, 0)):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("runs", [2, 3])
def test_threads_change_no_bit(runs):
    for run in (functools.partial(scan, 0, 2, 9, 3, 5, 1, True, 4), functools.partial(powers, 0, 1, 5, 3, 9)):
        for one, several in zip(run(1), run(runs)):
            assert one.tobytes() == several.tobytes()
