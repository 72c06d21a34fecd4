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


def _selective_both(inputs, lengths, limits, soft, block, runs, cotangents, step=None):
    """All that forward and backward write; backward in calls of ``step`` blocks, by default in one."""
    u, a, b = inputs[0], inputs[2], inputs[3]
    count, lengths, (channels, groups) = len(lengths), np.array(lengths), (u.shape[1], b.shape[1])
    forward, backward = selective_scan.selective_scan_forward, selective_scan.selective_scan_backward
    if a.ndim == 3:  # (D, N, 2): complex
        forward, backward = selective_scan_complex.complex_scan_forward, selective_scan_complex.complex_scan_backward
    edges, height = np.concatenate([[0], np.cumsum(lengths)]), a[0].size
    places = np.concatenate([[0], np.cumsum(np.maximum(-(-lengths // block) - 1, 0))]) * height
    options = edges, *np.array(limits, u.dtype), soft, block, places, height
    tasks = selective_scan.tasks(count, channels, groups)
    out = _unwritten([(places[-1], channels), u.shape, (count, *a.shape)], u.dtype)
    _call(forward, tasks, runs)(*inputs, *options, *out)
    saved = out[0].copy()
    gu, graw, gz, gh_0 = _unwritten([u.shape, u.shape, inputs[6].shape, inputs[8].shape], u.dtype)
    ga, gskip, gbias = (np.zeros((count, *form), u.dtype) for form in ((*a.shape[1:], channels), *[(channels,)] * 2))
    sums, blocks = [], max(1, -(-lengths.max() // block))
    for begin in reversed(range(0, blocks, step or blocks)):
        left = np.clip(lengths - begin * block, 0, (step or blocks) * block)
        rows = np.cumsum(left) - left
        sums += _unwritten([(selective_scan.runs(channels, groups), left.sum(), *b.shape[1:])] * 2, u.dtype)
        _call(backward, tasks, runs)(
            *inputs, *options, saved, *cotangents, begin, begin + (step or blocks), rows,
            gu, graw, ga, *sums[-2:], gskip, gz, gbias, gh_0,
        )  # fmt: skip
    return *out, gu, graw, ga, gskip, gz, gbias, gh_0, *sums


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=3), st.integers(1, 3), st.sampled_from([1, 2, 5, 70, 256]),
    st.integers(1, 5), st.booleans(), st.booleans(), st.booleans(), st.sampled_from([(), (2,)]), st.integers(1, 5),
    st.sampled_from([None, 1, 2]), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_selective_scan_equals_its_twin(
    lengths, groups, per_group, size, gated, soft, limited, pair, block, step, seed
):  # fmt: skip
    rng = np.random.default_rng(seed)
    inputs = _selective_inputs(rng, lengths, groups, per_group, size, gated, np.float64, pair)
    if not soft:
        inputs[1] = np.abs(inputs[1]) + 2 + np.abs(inputs[7]).max()
    cotangents = [rng.standard_normal(x.shape) for x in (inputs[0], inputs[8])]
    limits = (0.5, 2.5) if limited else (-np.inf, np.inf)
    got, want = (
        _selective_both(inputs, lengths, limits, soft, block, runs, cotangents, step) for runs in (1, 0)
    )
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
