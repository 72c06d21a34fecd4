"""Laws of the Mamba-2 mixer."""

import numpy as np
import pytest

import xuracore as xc
import xuramamba
from xuracore.errors import ConfigError, ShapeError
from xuramamba import Mamba2, Mamba2Config

VARIANTS = {
    "plain": {},
    "groups, limits, biases": {"ngroups": 2, "dt_limit": (0.2, 0.7), "bias": True},
    "norm before gate": {"norm_before_gate": True, "D_has_hdim": True},
    "no norm": {"rmsnorm": False, "conv_bias": False, "d_conv": 2},
    "beside an MLP": {"d_ssm": 8, "d_conv": 1, "chunk_size": 3},
}


def build(dtype=np.float64, **fields):
    rng = np.random.default_rng(3)
    mixer = Mamba2(8, d_state=4, headdim=4, rng=rng, dt_min=0.1, dt_max=1.0, **fields)
    for parameter in mixer.parameters():  # away from the symmetric start
        parameter.data += (0.1 * rng.standard_normal(parameter.shape)).astype(np.float32)
    return mixer.to_dtype(dtype)


def sequence(batch=2, length=11, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, length, 8))


def run(mixer, x, state=None, **options):
    with xc.no_grad():
        y, state = mixer(xc.Tensor(x), state, **options)
    return y.numpy(), state


def close(x, y, tolerance=1e-10):
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def close_states(one, other):
    for x, y in zip(one, other):
        close(x.numpy(), y.numpy())


def naive(mixer, x):
    """One token at a time, from the definition."""
    c, w = mixer.config, {name: p.numpy() for name, p in mixer.named_parameters()}
    silu = lambda a: a / (1 + np.exp(-a))  # noqa: E731
    rows = x @ w["in_proj.weight"].T + w.get("in_proj.bias", 0)
    side, z, u, dt = np.split(rows, np.cumsum([2 * c.d_mlp, c.width, c.channels]), axis=-1)
    dt = np.clip(np.logaddexp(0, dt + w["dt_bias"]), *c.dt_limit)
    past = np.zeros((len(x), c.d_conv - 1, c.channels))
    padded = np.concatenate([past, u], axis=1)
    h, skip = np.zeros((len(x), c.heads, c.headdim, c.d_state)), w["D"].reshape(c.heads, -1)
    out = []
    for t in range(x.shape[1]):
        taps = padded[:, t : t + c.d_conv].transpose(0, 2, 1) * w["conv1d.weight"][:, 0]
        v, b, q = np.split(
            silu(taps.sum(-1) + w.get("conv1d.bias", 0)), [c.width, c.width + c.ngroups * c.d_state], axis=-1
        )
        v = v.reshape(-1, c.heads, c.headdim)
        b, q = (np.repeat(m.reshape(len(x), c.ngroups, -1), c.heads // c.ngroups, axis=1) for m in (b, q))
        step = dt[:, t]
        h = np.exp(-step * np.exp(w["A_log"]))[..., None, None] * h
        h += (step[..., None] * v)[..., None] * b[:, :, None, :]
        y = (np.einsum("bhpn,bhn->bhp", h, q) + skip * v).reshape(len(x), c.width)
        gate = silu(z[:, t])
        if c.rmsnorm:
            y = y if c.norm_before_gate else y * gate
            y = y.reshape(len(x), c.ngroups, -1)
            y = (y / np.sqrt((y**2).mean(-1, keepdims=True) + c.norm_eps)).reshape(len(x), -1) * w["norm.weight"]
            y = y * gate if c.norm_before_gate else y
        else:
            y = y * gate
        a, value = np.split(side[:, t], 2, axis=-1)
        out.append(np.concatenate([silu(a) * value, y], axis=-1) @ w["out_proj.weight"].T)
    return np.stack(out, axis=1) + w.get("out_proj.bias", 0), padded[:, x.shape[1] :], h


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_the_recurrence_of_its_definition(variant):
    mixer, x = build(**VARIANTS[variant]), sequence(length=70)
    y, (conv, ssm) = run(mixer, x)
    for got, want in zip((y, conv.numpy(), ssm.numpy()), naive(mixer, x)):
        close(got, want)


def test_rows_of_different_lengths_are_what_they_are_alone():
    mixer, x = build(), sequence(batch=3, length=7)
    mask = np.arange(7) < np.array([7, 0, 3])[:, None]
    _, start = run(mixer, sequence(batch=3, seed=6))
    y, state = run(mixer, x, start, mask=mask)
    for b, length in ((0, 7), (2, 3)):
        alone, last = run(mixer, x[b : b + 1, :length], [part[b : b + 1] for part in start])
        close(y[b : b + 1, :length], alone)
        close_states([part[b : b + 1] for part in state], last)
    close_states([part[1] for part in state], [part[1] for part in start])
    close(run(mixer, x, mask=np.ones((3, 7), bool))[0], run(mixer, x)[0], 0)


@pytest.mark.parametrize("kind", ["Mamba2", "Mamba3"])
def test_a_long_sequence_without_a_tape_is_what_it_is_with_one(kind):
    mixer = getattr(xuramamba, kind)(8, d_state=4, headdim=4).to_dtype(np.float64)
    x = xc.Tensor(sequence(length=1100))
    y, state = mixer(x)
    with xc.no_grad():
        piecewise, last = mixer(x)
    close(piecewise.numpy(), y.numpy())
    close_states(last, state)


@pytest.mark.parametrize("carried", [False, True])
def test_packed_sequences_are_separate_ones(carried):
    mixer, x = build(), sequence(batch=1, length=83)
    edges = np.array([0, 2, 2, 70, 83])
    start = run(mixer, sequence(batch=4, seed=6))[1] if carried else None
    y, state = run(mixer, x, start, cu_seqlens=edges)
    for i, (low, high) in enumerate(zip(edges, edges[1:])):
        before = [part[i : i + 1] for part in start] if carried else None
        if low < high:
            alone, last = run(mixer, x[:, low:high], before)
            close(y[:, low:high], alone)
            close_states([part[i : i + 1] for part in state], last)


@pytest.mark.parametrize(
    "fields",
    [{"headdim": 5}, {"ngroups": 3}, {"d_conv": 0}, {"d_ssm": 17}, {"dt_limit": (1.0, 0.5)}, {"d_stat": 4},
     {"A_init_range": (0.0, 1.0)}, {"chunk_size": 0}],
)  # fmt: skip
def test_impossible_configurations_are_refused(fields):
    with pytest.raises(ConfigError):
        Mamba2(8, **{"headdim": 4, "d_state": 4, **fields})


@pytest.mark.parametrize(
    "shape, options",
    [
        ((1, 2, 9), {}), ((1, 2, 8), {"mask": np.ones((1, 3), bool)}), ((1, 2, 8), {"mask": np.ones((1, 2))}),
        ((2, 2, 8), {"cu_seqlens": [0, 2]}), ((1, 2, 8), {"cu_seqlens": [0, 1]}),
        ((1, 4, 8), {"cu_seqlens": [0, 3, 2, 4]}), ((1, 2, 8), {"cu_seqlens": [0.0, 2.0]}),
        ((1, 2, 8), {"cu_seqlens": [0, 2], "mask": np.ones((1, 2), bool)}),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit_are_named(shape, options):
    with pytest.raises(ShapeError):
        build()(xc.Tensor(np.zeros(shape)), **options)


def test_sizes_follow_the_published_model():
    config = Mamba2Config(768)
    assert (config.heads, config.channels) == (24, 1792)
    assert Mamba2(768).in_proj.weight.shape == (3352, 768)
