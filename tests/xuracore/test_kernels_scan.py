"""Every scan kernel does what its NumPy twin does, whatever the shapes, and the same on each run."""


import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xuracore import jit
from xuracore.kernels import selective_scan, selective_scan_complex


def _unwritten(shapes, dtype):
    return [np.full(shape, np.nan, dtype) for shape in shapes]


def _call(kernel, tasks, runs):
    """What to call: the twin (runs = 0), or the kernel with its tasks cut into runs."""
    if runs == 0 or jit.backend() == "numpy":
        return kernel.twin
    return kernel.in_runs(min(runs, tasks), tasks)


def _selective_inputs(rng, lengths, groups, per_group, size, gated, dtype, pair=()):
    channels, tokens = groups * per_group, sum(lengths)

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    z = normal(tokens, channels) if gated else np.zeros((0, 0), dtype)
    return [
        normal(tokens, channels), normal(tokens, channels),
        -rng.uniform(0.1, 2, (channels, size, *pair)).astype(dtype), normal(tokens, groups, size, *pair),
        normal(tokens, groups, size, *pair), normal(channels), z, normal(channels),
        normal(len(lengths), channels, size, *pair),
    ]  # fmt: skip


def _selective_both(inputs, lengths, limits, soft, block, runs, cotangents):
    u, b, count = inputs[0], inputs[3], len(lengths)
    channels, (groups, *size) = u.shape[1], b.shape[1:]  # size (N,), or (N, 2) where A is complex
    forward, backward = selective_scan.selective_scan_forward, selective_scan.selective_scan_backward
    if len(size) == 2:
        forward, backward = selective_scan_complex.complex_scan_forward, selective_scan_complex.complex_scan_backward
    edges = np.concatenate([[0], np.cumsum(lengths)])
    rows = np.concatenate([[0], np.cumsum(-(-np.array(lengths) // block))])
    options = edges, rows, *np.array(limits, u.dtype), soft, block
    tasks = selective_scan.tasks(count, channels, groups)
    shapes = [u.shape, (count, channels, *size), (rows[-1], *size, channels)]
    out = _unwritten(shapes, u.dtype)
    _call(forward, tasks, runs)(*inputs, *options, *out)
    partial = (selective_scan.runs(channels, groups), *b.shape)
    shapes = [u.shape, u.shape, (count, *size, channels), partial, partial, (count, channels)]
    shapes += [inputs[6].shape, (count, channels), (count, channels, *size)]
    back = _unwritten(shapes, u.dtype)
    call = _call(backward, tasks, runs)
    call(*inputs[:8], *options, out[2], *cotangents, *back)
    return out + back


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=3), st.integers(1, 3), st.sampled_from([1, 2, 5, 70, 256]),
    st.integers(1, 5), st.booleans(), st.booleans(), st.booleans(), st.sampled_from([(), (2,)]), st.integers(1, 5),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_selective_scan_equals_its_twin(lengths, groups, per_group, size, gated, soft, limited, pair, block, seed):
    rng = np.random.default_rng(seed)
    inputs = _selective_inputs(rng, lengths, groups, per_group, size, gated, np.float64, pair)
    if not soft:
        inputs[1] = np.abs(inputs[1]) + 2 + np.abs(inputs[7]).max()
    cotangents = [rng.standard_normal(x.shape) for x in (inputs[0], inputs[8])]
    limits = (0.5, 2.5) if limited else (-np.inf, np.inf)
    got, want = (_selective_both(inputs, lengths, limits, soft, block, runs, cotangents) for runs in (1, 0))
    for x, y in zip(got, want):
        np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("pair", [(), (2,)])
@pytest.mark.parametrize("runs", [2, 3])
def test_selective_scan_gives_the_same_bits_on_any_number_of_threads(runs, pair):
    rng = np.random.default_rng(2)
    inputs = _selective_inputs(rng, (20, 20), 1, 200, 4, True, np.float32, pair)
    cotangents = [np.ones_like(inputs[0]), np.ones_like(inputs[8])]
    limits = -np.inf, np.inf
    one, several = (_selective_both(inputs, (20, 20), limits, True, 8, n, cotangents) for n in (1, runs))
    for x, y in zip(one, several):
        assert x.tobytes() == y.tobytes()
