"""The selective scan's backward pass frees and reuses memory: its gradients do not show it."""

import numpy as np
import pytest

import xuracore as xc
from xuracore.ops import scan


def inputs(pair, size, dtype=np.float64, length=150, channels=3):
    rng = np.random.default_rng(0)
    arrays = [
        rng.standard_normal((1, length, channels)), rng.uniform(0.1, 1, (1, length, channels)),
        -rng.uniform(0.2, 2, (channels, size, *pair)), rng.standard_normal((1, length, size, *pair)),
        rng.standard_normal((1, length, size, *pair)), rng.standard_normal(channels),
        rng.standard_normal((1, length, channels)), rng.standard_normal(channels),
        rng.standard_normal((4, channels, size, *pair)),
    ]  # fmt: skip
    return [xc.Tensor(x.astype(dtype), requires_grad=True) for x in arrays]


def backward(given, times=1):
    """y, the last states and all gradients, of four sequences, one of them empty."""
    for x in given:
        x.grad = None
    cu_seqlens = np.array([0, 70, 70, 81, 150])
    y, last = xc.ops.selective_scan(*given, delta_softplus=True, cu_seqlens=cu_seqlens)
    total = (y * y).sum() + (last * last).sum()
    for i in range(times):
        for x in given:
            x.grad = None
        total.backward(retain_graph=i + 1 < times)
    return [y.data, last.data, *(x.grad for x in given)]


@pytest.mark.parametrize("pair", [(), (2,)])
@pytest.mark.parametrize("size, block", [(3, 16), (5, 7), (4, 2)])  # states fit between blocks; just so; do not
@pytest.mark.parametrize("sums", [1, 1 << 20])
def test_any_blocks_give_the_same_gradients(monkeypatch, pair, size, block, sums):
    given = inputs(pair, size)
    monkeypatch.setattr(scan, "block_length", lambda length, _: length)
    expected = backward(given)
    monkeypatch.setattr(scan, "block_length", lambda *_: block)
    monkeypatch.setattr(scan, "SUMS_BYTES", sums)
    for got, want in zip(backward(given), expected):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("pair", [(), (2,)])
def test_a_second_backward_pass_gives_the_same_bits(pair):
    given = inputs(pair, 3)
    once, twice = (backward(given, times) for times in (1, 2))
    for got, want in zip(twice, once):
        assert got.tobytes() == want.tobytes()


def test_what_nobody_asks_for_is_not_made():
    given = inputs((), 3)
    *_, h = given
    y, _ = xc.ops.selective_scan(*given[:5], None, None, None, h.data[:1], delta_softplus=True)
    y.sum().backward()
    assert all(x.grad is not None for x in given[:5]) and h.grad is None


def test_no_sequences():
    shapes = (0, 4, 2), (0, 4, 2), (2, 3), (0, 4, 3), (0, 4, 3)
    given = [xc.Tensor(np.ones(shape), requires_grad=True) for shape in shapes]
    y, last = xc.ops.selective_scan(*given)
    y.sum().backward()
    assert y.shape == (0, 4, 2) and last.shape == (0, 2, 3)
    assert [x.grad.shape for x in given] == [x.shape for x in given]
