"""Every scan kernel does what its NumPy twin does, whatever the shapes, and the same on each run."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xuracore import jit
from xuracore.kernels import selective_scan, trapezoid


def _trapezoid_inputs(rng, batch, length, rank, groups, per_group, size, width, turns, shared, masked, dtype):
    heads = groups * per_group

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    mask = np.ones((batch, length), np.uint8)
    if masked:
        mask[rng.random((batch, length)) < 0.5] = 0
    return [
        normal(batch, length, rank, groups, size), normal(batch, length, rank, groups, size),
        normal(batch, length, heads, width), rng.uniform(0.01, 1, (batch, length, heads)).astype(dtype),
        -rng.uniform(0.1, 2, (batch, length, heads)).astype(dtype), normal(batch, length, heads),
        normal(batch, length, 1 if shared else heads, turns), normal(heads, rank, size),
        normal(heads, rank, size), normal(heads), normal(heads, rank, width), mask,
        rng.uniform(0, 6, (batch, heads, turns)).astype(dtype), normal(batch, heads, width, size),
        normal(batch, rank, heads, size), normal(batch, heads, width),
    ]  # fmt: skip


def _unwritten(shapes, dtype):
    return [np.full(shape, np.nan, dtype) for shape in shapes]


def _call(kernel, tasks, runs):
    """What to call: the twin (runs = 0), or the kernel with its tasks cut into runs."""
    if runs == 0 or jit.backend() == "numpy":
        return kernel.twin
    return functools.partial(jit._in_runs, kernel.compiled(), tasks, min(runs, tasks))


def _trapezoid_forward(inputs, half, block, runs, radians=False):
    q, v, angles = inputs[0], inputs[2], inputs[6]
    batch, length, rank, _, size = q.shape
    heads, width = v.shape[2:]
    blocks = -(-length // block)
    shapes = [(batch, length, rank, heads, width)] + [x.shape for x in inputs[12:]]
    shapes += [(batch, heads, blocks, size, width), (batch, heads, blocks, angles.shape[3])]
    out = _unwritten(shapes, q.dtype)
    _call(trapezoid.trapezoid_forward, batch * heads, runs)(*inputs, half, radians, block, *out)
    return out


def _trapezoid_backward(inputs, half, block, parts, saved, cotangents, runs, radians=False):
    q, angles = inputs[0], inputs[6]
    runs = q.shape[3] * parts if angles.shape[2] == 1 else 1
    shapes = [(parts, *q.shape), (parts, *q.shape)] + [x.shape for x in inputs[2:6]] + [(runs, *angles.shape)]
    shapes += [(len(q), *x.shape) for x in inputs[7:11]] + [x.shape for x in inputs[12:]]
    out = _unwritten(shapes, q.dtype)
    call = _call(trapezoid.trapezoid_backward, len(q) * q.shape[3] * parts, runs)
    call(*inputs[:12], *inputs[14:], half, radians, block, *saved, *cotangents, *out)
    return out


@settings(max_examples=25)
@given(
    st.integers(1, 3), st.integers(1, 9), st.integers(1, 3), st.integers(1, 2), st.integers(1, 2),
    st.sampled_from([2, 4, 6, 16]), st.integers(1, 5), st.integers(0, 3), st.booleans(), st.booleans(),
    st.booleans(), st.booleans(), st.integers(1, 5), st.booleans(), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_trapezoid_equals_its_twin(
    batch, length, rank, groups, per_group, size, width, turns, shared, masked, half, radians, block, split, seed
):  # fmt: skip
    rng = np.random.default_rng(seed)
    turns = min(turns, size // 2)
    inputs = _trapezoid_inputs(
        rng, batch, length, rank, groups, per_group, size, width, turns, shared, masked, np.float64
    )  # fmt: skip
    got = _trapezoid_forward(inputs, half, block, 1, radians)
    want = _trapezoid_forward(inputs, half, block, 0, radians)
    for i in (1, 6):  # angles near 0 and near 2 pi are the same
        np.testing.assert_allclose(np.exp(1j * got[i]), np.exp(1j * want[i]), atol=1e-12)
    for i in (0, 2, 3, 4, 5):
        np.testing.assert_allclose(got[i], want[i], rtol=1e-9, atol=1e-11)
    cotangents = [rng.standard_normal(x.shape) for x in got[:5]]
    parts = per_group if split else 1
    for x, y in zip(
        _trapezoid_backward(inputs, half, block, parts, got[5:], cotangents, 1, radians),
        _trapezoid_backward(inputs, half, block, parts, want[5:], cotangents, 0, radians),
    ):
        np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-10)


def test_trapezoid_in_float32_is_near_float64():
    rng = np.random.default_rng(1)
    wide = _trapezoid_inputs(rng, 2, 150, 1, 1, 2, 32, 8, 8, True, False, np.float64)
    narrow = [x if x.dtype == np.uint8 else x.astype(np.float32) for x in wide]
    got = _trapezoid_forward(narrow, False, 16, runs=1)
    want = _trapezoid_forward(wide, False, 16, runs=0)
    assert got[0].dtype == np.float32
    for i in (0, 2, 3):
        scale = np.abs(want[i]).max()
        np.testing.assert_allclose(got[i], want[i], rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("runs", [2, 3, 5])
def test_trapezoid_gives_the_same_bits_on_any_number_of_threads(runs):
    rng = np.random.default_rng(2)
    inputs = _trapezoid_inputs(rng, 3, 20, 1, 1, 2, 8, 4, 2, True, False, np.float32)
    one, several = (_trapezoid_forward(inputs, False, 8, n) for n in (1, runs))
    cotangents = [np.ones_like(x) for x in one[:5]]
    one += _trapezoid_backward(inputs, False, 8, 2, one[5:], cotangents, 1)
    several += _trapezoid_backward(inputs, False, 8, 2, several[5:], cotangents, runs)
    for x, y in zip(one, several):
        assert x.tobytes() == y.tobytes()


def _selective_inputs(rng, lengths, groups, per_group, size, gated, dtype):
    channels, tokens = groups * per_group, sum(lengths)

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    z = normal(tokens, channels) if gated else np.zeros((0, 0), dtype)
    return [
        normal(tokens, channels), normal(tokens, channels),
        -rng.uniform(0.1, 2, (channels, size)).astype(dtype), normal(tokens, groups, size),
        normal(tokens, groups, size), normal(channels), z, normal(channels),
        normal(len(lengths), channels, size),
    ]  # fmt: skip


def _selective_both(inputs, lengths, limits, soft, block, runs, cotangents):
    u, b, count = inputs[0], inputs[3], len(lengths)
    channels, (groups, size) = u.shape[1], b.shape[1:]
    edges = np.concatenate([[0], np.cumsum(lengths)])
    rows = np.concatenate([[0], np.cumsum(-(-np.array(lengths) // block))])
    options = edges, rows, *np.array(limits, u.dtype), soft, block
    tasks = selective_scan.tasks(count, channels, groups)
    shapes = [u.shape, (count, channels, size), (rows[-1], size, channels)]
    out = _unwritten(shapes, u.dtype)
    _call(selective_scan.selective_scan_forward, tasks, runs)(*inputs, *options, *out)
    partial = (selective_scan.runs(channels, groups), *b.shape)
    shapes = [u.shape, u.shape, (count, size, channels), partial, partial, (count, channels)]
    shapes += [inputs[6].shape, (count, channels), (count, channels, size)]
    back = _unwritten(shapes, u.dtype)
    call = _call(selective_scan.selective_scan_backward, tasks, runs)
    call(*inputs[:8], *options, out[2], *cotangents, *back)
    return out + back


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=3), st.integers(1, 3), st.sampled_from([1, 2, 5, 70, 256]),
    st.integers(1, 5), st.booleans(), st.booleans(), st.booleans(), st.integers(1, 5), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_selective_scan_equals_its_twin(lengths, groups, per_group, size, gated, soft, limited, block, seed):
    rng = np.random.default_rng(seed)
    inputs = _selective_inputs(rng, lengths, groups, per_group, size, gated, np.float64)
    if not soft:
        inputs[1] = np.abs(inputs[1]) + 2 + np.abs(inputs[7]).max()
    cotangents = [rng.standard_normal(x.shape) for x in (inputs[0], inputs[8])]
    limits = (0.5, 2.5) if limited else (-np.inf, np.inf)
    got, want = (_selective_both(inputs, lengths, limits, soft, block, runs, cotangents) for runs in (1, 0))
    for x, y in zip(got, want):
        np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("runs", [2, 3])
def test_selective_scan_gives_the_same_bits_on_any_number_of_threads(runs):
    rng = np.random.default_rng(2)
    inputs = _selective_inputs(rng, (20, 20), 1, 200, 4, True, np.float32)
    cotangents = [np.ones_like(inputs[0]), np.ones_like(inputs[8])]
    limits = -np.inf, np.inf
    one, several = (_selective_both(inputs, (20, 20), limits, True, 8, n, cotangents) for n in (1, runs))
    for x, y in zip(one, several):
        assert x.tobytes() == y.tobytes()
