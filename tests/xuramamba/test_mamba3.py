"""What Mamba-3 is kin to, and its scan; the laws of every mixer stand in test_invariants."""

import numpy as np
import pytest

import xuracore as xc
from xuracore.errors import ConfigError, ShapeError
from xuramamba import Mamba3, Mamba3Config, rotary


def build(dtype=np.float64, **fields):
    rng = np.random.default_rng(3)
    mixer = Mamba3(8, d_state=8, headdim=4, rng=rng, dt_min=0.1, dt_max=1.0, **fields)
    for parameter in mixer.parameters():  # away from the symmetric start
        parameter.data += (0.1 * rng.standard_normal(parameter.shape)).astype(np.float32)
    return mixer.to_dtype(dtype)


def sequence(batch=2, length=11, dtype=np.float64, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, length, 8)).astype(dtype)


def run(mixer, x, state=None):
    with xc.no_grad():
        y, state = mixer(xc.Tensor(x), state)
    return y.numpy(), state


def close(x, y, tolerance=1e-10):
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def test_one_rank_with_unit_weights_is_the_single_input_model():
    mixer, x = build(), sequence()
    mimo = Mamba3(8, d_state=8, headdim=4, is_mimo=True, mimo_rank=1).to_dtype(np.float64)
    unit = {name: np.ones(getattr(mimo, name).shape) for name in ("mimo_x", "mimo_z", "mimo_o")}
    mimo.load_state_dict({**mixer.state_dict(), **unit})
    close(run(mimo, x)[0], run(mixer, x)[0])


# ---------------------------------------------------------------------- the scan itself
def scan_inputs(length=9, heads=1, size=6, width=3, turns=3, seed=1):
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal
    return {
        "q": normal((1, length, 1, 1, size)),
        "k": normal((1, length, 1, 1, size)),
        "v": normal((1, length, heads, width)),
        "dt": rng.uniform(0.1, 1, (1, length, heads)),
        "a": -rng.uniform(0.1, 1, (1, length, heads)),
        "trap": normal((1, length, heads)),
        "angles": normal((1, length, turns)),
        "q_bias": np.zeros((heads, 1, size)),
        "k_bias": np.zeros((heads, 1, size)),
    }


def random_scan(rng, batch=2, length=70, groups=2, heads=4, size=6, width=3, turns=2):
    normal = rng.standard_normal
    return [
        normal((batch, length, 1, groups, size)), normal((batch, length, 1, groups, size)),
        normal((batch, length, heads, width)), rng.uniform(0.1, 1, (batch, length, heads)),
        -rng.uniform(0.1, 1, (batch, length, heads)), normal((batch, length, heads)),
        normal((batch, length, turns)), normal((heads, 1, size)), normal((heads, 1, size)), normal(heads),
    ]  # fmt: skip


def test_rotation_is_a_complex_state():
    given = random_scan(np.random.default_rng(1))
    y, theta, h, *_ = xc.ops.trapezoidal_scan(*given)
    expected, c = rotary.complex_scan(*given)
    close(y[:, :, 0], expected)
    turned = c[..., :2] * np.exp(1j * theta)[:, :, None]  # c = e^{-i theta} h
    close(h[..., 0:4:2] + 1j * h[..., 1:4:2], turned)
    close(h[..., 4] + 1j * h[..., 5], c[..., 2])


def test_a_constant_turn_is_rotary_position_embedding():
    given = random_scan(np.random.default_rng(1))
    turns = np.array([1.0, 0.01])
    y, *_ = xc.ops.trapezoidal_scan(*given[:6], np.broadcast_to(turns, given[6].shape), *given[7:], radians=True)
    q, k, angle = given[0], given[1], np.arange(1, 71)[:, None] * turns
    heads = [np.repeat(x[:, :, 0], 2, axis=2) + bias[:, 0] for x, bias in zip((q, k), given[7:9])]
    q, k = (rotary.rotate(x, angle[:, None])[:, :, None] for x in heads)
    still, *_ = xc.ops.trapezoidal_scan(
        q, k, *given[2:6], 0 * given[6], *np.zeros((2, 4, 1, 6)), given[9]
    )  # fmt: skip
    close(y, still)


def test_without_look_back_rotation_and_biases_it_is_mamba2_without_convolution():
    """Outputs, state and gradients."""
    q, k, v, dt, _, trap, angles, _, _, skip = random_scan(np.random.default_rng(1))
    a = -np.array([0.1, 0.5, 1.0, 2.0])

    def results(function):
        shared = [xc.Tensor(x, requires_grad=True) for x in (v, dt, a, k[:, :, 0], q[:, :, 0], skip)]
        y, h = function(*shared)
        ((y * y).sum() + (h * h).sum()).backward()
        return [y.numpy(), h.numpy()] + [tensor.grad for tensor in shared]

    def three(x, step, rate, b, c, direct):
        y, _, h, _, _ = xc.ops.trapezoidal_scan(
            c.reshape(*q.shape), b.reshape(*k.shape), x, step, xc.ops.broadcast_to(rate, dt.shape),
            np.full(trap.shape, 60.0), 0 * angles, *np.zeros((2, 4, 1, 6)), direct,
        )  # fmt: skip
        return y.reshape(*v.shape), h

    for one, other in zip(results(xc.ops.ssd_scan), results(three)):
        close(one, other)


@pytest.mark.parametrize("trap, order", [(0.0, 2), (60.0, 1)])
def test_the_scan_has_the_order_of_its_rule(trap, order):
    """h' = a h + v(t) from 0 with v(0) as the token before the first; error after a fixed time."""
    a, time, errors = -0.7, 2.0, []
    exact = (a * np.exp(a * time) - a * np.cos(time) + np.sin(time)) / (1 + a * a)  # for v = cos
    for length in (50, 100, 200):
        t = time / length * np.arange(length + 1)
        one = np.ones((1, length, 1))
        key = np.ones((1, length, 1, 1, 1))
        y, *_ = xc.ops.trapezoidal_scan(
            key, key, np.cos(t[1:]).reshape(1, length, 1, 1), one * time / length, a * one, trap * one,
            np.zeros((1, length, 0)), *np.zeros((2, 1, 1, 1)), None, None,
            np.zeros((1, 1, 0)), np.zeros((1, 1, 1, 1)), np.ones((1, 1, 1, 1)), np.ones((1, 1, 1)),
        )  # fmt: skip
        errors.append(abs(y[0, -1, 0, 0, 0] - exact))
    np.testing.assert_allclose(np.log2([errors[0] / errors[1], errors[1] / errors[2]]), order, atol=0.05)


def test_fixed_options_are_special_cases_of_the_learned_ones():
    rng, x = np.random.default_rng(0), sequence()
    plain = build(rope_fraction=0.0)
    same = {name: p.numpy() for name, p in plain.named_parameters()}
    bare = Mamba3(8, d_state=8, headdim=4, rope="none", bc_bias=False, trap="half", rng=rng).to_dtype(np.float64)
    c = plain.config
    traps = slice(2 * c.d_inner + 2 * c.keys + 2 * c.heads, 2 * c.d_inner + 2 * c.keys + 3 * c.heads)
    bare.load_state_dict({
        **{name: value for name, value in same.items() if name not in ("B_bias", "C_bias")},
        "in_proj.weight": np.delete(same["in_proj.weight"], np.r_[traps], axis=0),
    })  # fmt: skip
    rows = same["in_proj.weight"].copy()
    rows[traps] = 0
    zeros = {name: np.zeros_like(same[name]) for name in ("B_bias", "C_bias")}
    plain.load_state_dict({**same, **zeros, "in_proj.weight": rows})
    close(run(bare, x)[0], run(plain, x)[0])


def test_a_step_of_no_duration_changes_nothing_but_the_memory_of_the_last_token():
    given = scan_inputs()
    _, theta, h, _, _ = xc.ops.trapezoidal_scan(*given.values())
    state = (theta, h, np.ones((1, 1, 1, 6)), np.ones((1, 1, 3)))
    given["dt"][:] = 0.0
    _, theta_after, h_after, _, _ = xc.ops.trapezoidal_scan(*given.values(), None, None, *state)
    close(theta_after, theta)
    close(h_after, h)


def parity(bits, dtype, decay):
    """Spec 6.3: one head, one pair, phi = pi * bit; the output's magnitude is the parity of the bits."""
    length = len(bits)
    one = np.ones((1, length, 1), dtype)
    axis = np.zeros((1, length, 1, 1, 2), dtype)
    axis[..., 0] = 1
    y, *_ = xc.ops.trapezoidal_scan(
        axis, axis, bits.reshape(1, length, 1, 1).astype(dtype), one, -decay * one, 60 * one,
        (40 * bits).reshape(1, length, 1).astype(dtype), *np.zeros((2, 1, 1, 2), dtype),
    )  # fmt: skip
    return y.reshape(-1)


@pytest.mark.parametrize(
    "length, decay", [(40, 0.0), (40, 1e-4), (256, 1e-4), (4096, 0.0), (4096, 1e-4), (100_000, 0.0)]
)
def test_hand_set_weights_count_parity_in_float32(length, decay):
    """With the least decay a layer may have it holds for thousands of tokens, without any for all."""
    bits = np.random.default_rng(4).integers(0, 2, length)
    found = np.rint(np.abs(parity(bits, np.float32, decay))).astype(int)
    assert (found == np.cumsum(bits) % 2).all()


# ---------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    "fields",
    [{"headdim": 5}, {"rotary": "both"}, {"a_activation": "relu"}, {"ngroups": 3}, {"d_sate": 4},
     {"rope_fraction": 1.5}, {"rope": "learned"}, {"trap": "quarter"}, {"rope_theta": 0},
      {"rotary": "half", "d_state": 7}],
)  # fmt: skip
def test_impossible_configurations_are_refused(fields):
    with pytest.raises(ConfigError):
        Mamba3(8, **{"headdim": 4, "d_state": 8, **fields})


def test_a_wrong_width_is_named():
    with pytest.raises(ShapeError, match="expected"):
        build()(xc.Tensor(np.zeros((1, 2, 9))))


def test_sizes_follow_the_published_model():
    config = Mamba3Config(768)
    assert (config.heads, config.angles) == (24, 32)
    assert sum(Mamba3(768)._row_counts()) == 3432
