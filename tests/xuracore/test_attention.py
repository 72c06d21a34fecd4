"""Attention by tiles is attention: at every shape and mask, with gradients, in memory that grows with the length."""

import importlib
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import xuracore as xc
from xuracore import ops
from xuracore.errors import DTypeError, ShapeError

module = importlib.import_module("xuracore.ops.attention")  # ``ops.attention`` is the function
reference = ops.attention.primitive.reference


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that short sequences need many of them."""
    for name, value in {"QUERIES": 4, "KEYS": 3, "TILE": 30}.items():
        monkeypatch.setattr(module, name, value)


def tensors(rng, *shapes, dtype=np.float64):
    return [xc.Tensor(rng.standard_normal(shape).astype(dtype), requires_grad=True) for shape in shapes]


MASKS = {
    "none": lambda rng, shape: None,
    "bool": lambda rng, shape: rng.random(shape) < 0.6,
    "bool, keys": lambda rng, shape: rng.random((shape[0], 1, 1, shape[3])) < 0.6,
    "bool, two axes": lambda rng, shape: rng.random(shape[2:]) < 0.6,
    "added": lambda rng, shape: rng.standard_normal((1, shape[1], shape[2], 1)),
    "added, hidden": lambda rng, shape: np.where(rng.random(shape[2:]) < 0.5, 0.0, -np.inf),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sizes", [(2, 2, 2, 9, 7), (1, 4, 2, 5, 10), (3, 6, 1, 4, 3), (1, 1, 1, 1, 8)])
def test_tiles_make_plain_attention(small_tiles, sizes, mask, causal):
    batch, heads, groups, length, keys = sizes
    rng = np.random.default_rng(length)
    q, k, v = tensors(rng, (batch, heads, length, 3), (batch, groups, keys, 3), (batch, groups, keys, 2))
    given_mask = MASKS[mask](rng, (batch, heads, length, keys))
    y = ops.attention(q, k, v, given_mask, causal=causal)
    expected = reference(q.data, k.data, v.data, given_mask, causal=causal)
    np.testing.assert_allclose(y.data, expected, rtol=1e-11, atol=1e-12)
    assert xc.gradcheck(lambda *x: ops.attention(*x, given_mask, causal=causal), [x.data for x in (q, k, v)])


@given(length=st.integers(1, 40), keys=st.integers(1, 40), causal=st.booleans(), seed=st.integers(0, 9))
def test_float32_is_near_the_reference_whatever_the_lengths(length, keys, causal, seed):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((1, 2, n, 8)).astype(np.float32) for n in (length, keys, keys))
    y = ops.attention(q, k, v, causal=causal)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, reference(q, k, v, causal=causal), rtol=1e-5, atol=1e-5)


def test_lengths_beyond_one_tile_at_the_real_tile_size():
    rng = np.random.default_rng(0)
    length = module.KEYS + module.QUERIES + 3
    q, k, v = tensors(rng, *[(1, 2, length, 4)] * 3)
    y = ops.attention(q, k, v, causal=True)
    np.testing.assert_allclose(y.data, reference(q.data, k.data, v.data, causal=True), rtol=1e-10, atol=1e-12)
    assert xc.gradcheck(lambda *x: ops.attention(*x, causal=True), [x.data for x in (q, k, v)])


def test_an_added_mask_gets_the_gradient_of_its_own_shape(small_tiles):
    rng = np.random.default_rng(1)
    shapes = [(2, 4, 5, 3), (2, 2, 7, 3), (2, 2, 7, 3)]
    for shape in [(5, 7), (4, 1, 1), (2, 1, 5, 7), (1, 1, 1, 7)]:
        inputs = [rng.standard_normal(s) for s in (*shapes, shape)]
        assert xc.gradcheck(lambda *x: ops.attention(*x, causal=True), inputs)


def test_scores_of_any_size_keep_everything_finite():
    q = xc.Tensor(np.full((1, 1, 600, 4), 1e10, np.float32), requires_grad=True)
    k = xc.Tensor(np.linspace(-1e9, 1e9, 700 * 4, dtype=np.float32).reshape(1, 1, 700, 4), requires_grad=True)
    v = xc.Tensor(np.ones((1, 1, 700, 2), np.float32), requires_grad=True)
    y = ops.attention(q, k, v)
    y.sum().backward()
    np.testing.assert_allclose(y.data, 1, rtol=1e-6)
    assert all(np.isfinite(x.grad).all() for x in (q, k, v))


def test_not_a_number_stays_visible():
    q, k, v = (np.zeros((1, 1, 3, 2), np.float32) for _ in range(3))
    q[0, 0, 1, 0] = np.nan
    y = ops.attention(q, k, v)
    assert np.isnan(y[0, 0, 1]).all() and np.isfinite(y[0, 0, [0, 2]]).all()


def test_number_of_threads_changes_no_bit(monkeypatch):
    if xc.threads.available_cpus() < 2:
        pytest.skip("needs two cores")
    monkeypatch.setattr(module, "PARALLEL_WORK", 0)
    results, before = [], xc.get_num_threads()
    try:
        for count in (1, 2):
            xc.set_num_threads(count)
            rng = np.random.default_rng(3)
            q, k, v = tensors(rng, *[(2, 4, 300, 8)] * 3, dtype=np.float32)
            y = ops.attention(q, k, v, causal=True)
            y.backward(rng.standard_normal(y.shape).astype(np.float32))
            assert xc.threads.blas_threads() in (None, count), "the number of BLAS threads is given back"
            results.append([y.data, q.grad, k.grad, v.grad])
    finally:
        xc.set_num_threads(before)
    for one, two in zip(*results):
        np.testing.assert_array_equal(one, two)


def test_memory_grows_with_the_length_not_with_its_square():
    """A matrix of scores would take 64 MB a head at L = 4096."""
    def peak(length):
        q, k, v = tensors(np.random.default_rng(0), *[(1, 2, length, 8)] * 3, dtype=np.float32)
        tracemalloc.start()
        try:
            ops.attention(q, k, v, causal=True).sum().backward()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(64)  # what is loaded and compiled at a first call does not count
    assert peak(4096) < 12e6 and peak(4096) < 2.5 * peak(2048)


def test_masks_that_do_not_fit_are_refused():
    q = np.ones((1, 1, 2, 2), np.float32)
    with pytest.raises(ShapeError, match=r"mask \(3, 2\) does not broadcast to \(1, 1, 2, 2\)"):
        ops.attention(q, q, q, np.ones((3, 2), bool))
    with pytest.raises(DTypeError, match="mask is int64"):
        ops.attention(q, q, q, np.ones((2, 2), np.int64))
    q = xc.Tensor(q, requires_grad=True)
    with pytest.raises(DTypeError, match="mask is int64"):
        ops.attention(q, q, q, np.ones((2, 2), np.int64))
    with pytest.raises(ShapeError, match="batch size"):
        ops.attention(q, np.ones((2, 1, 2, 2)), np.ones((2, 1, 2, 2)))
