"""A bidirectional layer is two one-way layers, one on the reversed sequence."""

import numpy as np
import pytest

import xuracore as xc
from xuracore.errors import ConfigError, ShapeError
from xuramamba import S4D, Bidirectional, Mamba1, Mamba3

KINDS = {
    "mamba1": (Mamba1, {"d_state": 3, "dt_min": 0.1, "dt_max": 1.0}),
    "mamba3": (Mamba3, {"d_state": 4, "headdim": 4}),
    "s4d": (S4D, {"d_state": 4}),
}


def build(kind="mamba1", combine="add"):
    mixer, fields = KINDS[kind]
    rng = np.random.default_rng(1)
    pair = [mixer(6 if kind != "mamba3" else 4, rng=rng, **fields) for _ in range(2)]
    return Bidirectional(*pair, combine=combine, rng=rng).to_dtype(np.float64)


def sequence(batch=2, length=6, width=6):
    return np.random.default_rng(0).standard_normal((batch, length, width))


def run(layer, x, **options):
    with xc.no_grad():
        return layer(xc.Tensor(x), **options)[0].numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_sum_of_two_one_way_layers(kind):
    layer, x = build(kind), sequence(width=4 if kind == "mamba3" else 6)
    expected = run(layer.forward_mixer, x) + run(layer.backward_mixer, x[:, ::-1].copy())[:, ::-1]
    np.testing.assert_allclose(run(layer, x), expected, rtol=1e-12, atol=1e-13)


def test_joined_outputs_follow_their_formulas():
    x = sequence()
    for combine in ("concat", "gate"):
        layer = build(combine=combine)
        ahead = run(layer.forward_mixer, x)
        back = run(layer.backward_mixer, x[:, ::-1].copy())[:, ::-1]
        mixed = np.concatenate([ahead, back], -1) @ layer.proj.weight.numpy().T + layer.proj.bias.numpy()
        gate = 1 / (1 + np.exp(-mixed))
        expected = mixed if combine == "concat" else gate * ahead + (1 - gate) * back
        np.testing.assert_allclose(run(layer, x), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["mamba1", "s4d"])
@pytest.mark.parametrize("combine", ["add", "gate"])
def test_rows_are_reversed_within_their_real_length(kind, combine):
    layer, x, lengths = build(kind, combine), sequence(batch=3), (6, 2, 4)
    for left in (False, True):
        places = np.arange(6)[::-1] if left else np.arange(6)
        mask = places < np.array(lengths)[:, None]
        y = run(layer, x, mask=mask)
        for row, real in enumerate(mask):
            np.testing.assert_allclose(y[row][real], run(layer, x[row : row + 1, real])[0], atol=1e-12)


def test_sequences_of_a_packed_row_do_not_mix():
    layer, x, edges = build(), sequence(batch=1, length=9), [0, 4, 5, 9]
    y = run(layer, x, cu_seqlens=np.array(edges))
    for low, high in zip(edges, edges[1:]):
        np.testing.assert_allclose(y[:, low:high], run(layer, x[:, low:high]), atol=1e-12)


def test_every_token_sees_both_sides():
    layer, x = build(), sequence()
    base = run(layer, x)
    for t in (0, 5):
        other = x.copy()
        other[:, t] += 1
        assert (np.abs(run(layer, other) - base).max(axis=(0, 2)) > 1e-9).all()


@pytest.mark.parametrize("combine", ["add", "concat", "gate"])
def test_gradients_reach_the_input_and_every_parameter(combine):
    layer, mask = build(combine=combine), np.array([[1, 1, 1], [1, 1, 0]], bool)
    assert xc.gradcheck(lambda x: layer(x, mask=mask)[0], [sequence(length=3)])
    y, _ = layer(xc.Tensor(sequence()))
    (y * y).sum().backward()
    assert all(np.abs(parameter.grad).max() > 0 for parameter in layer.parameters())


def test_one_mixer_may_serve_both_directions():
    mixer = Mamba1(6, d_state=3).to_dtype(np.float64)
    layer, x = Bidirectional(mixer, mixer), sequence()
    np.testing.assert_allclose(run(layer, x[:, ::-1].copy()), run(layer, x)[:, ::-1], rtol=1e-12)


def test_what_makes_no_sense_is_refused():
    layer, x = build(), sequence()
    with pytest.raises(ConfigError, match="whole"):
        layer(xc.Tensor(x), layer(xc.Tensor(x))[1])
    with pytest.raises(ConfigError):
        build(combine="max")
    with pytest.raises(ConfigError):
        Bidirectional(Mamba1(6), Mamba1(8))
    with pytest.raises(ShapeError):
        layer(xc.Tensor(x), mask=np.ones((2, 5)))
    with pytest.raises(ShapeError):
        layer(xc.Tensor(x[0]))
