"""The laws of a mixer, for every mixer: what ``y, state = mixer(x, state)`` promises.

A mixer joins by one line in ``MIXERS``.
"""

from typing import NamedTuple

import numpy as np
import pytest

import xuracore as xc
from xuracore.errors import ShapeError
from xuramamba import S4, S4D, Mamba1, Mamba2, Mamba3

D_MODEL, LENGTH = 8, 20


class Row(NamedTuple):
    mixer: type
    fields: dict
    clock: tuple = ()  # (parameter, value) pairs that stop time; () where no parameters can


MAMBA1 = {"d_state": 3, "dt_min": 0.1, "dt_max": 1.0}
MAMBA2 = {"d_state": 3, "headdim": 4, "dt_min": 0.1, "dt_max": 1.0}
MAMBA3 = {"d_state": 6, "headdim": 4, "dt_min": 0.1, "dt_max": 1.0}
LINEAR = {"d_state": 4, "dt_min": 0.1, "dt_max": 0.5}
STOP_1 = (("dt_proj.weight", 0.0), ("dt_proj.bias", -1e4))

MIXERS = {
    "mamba1": Row(Mamba1, MAMBA1, STOP_1),
    "mamba1 options": Row(
        Mamba1, {**MAMBA1, "d_conv": 3, "bias": True, "conv_bias": False, "dt_limit": (0.3, 0.9)}
    ),
    "mamba1 falcon": Row(Mamba1, {**MAMBA1, "d_conv": 1, "mixer_rms_eps": 1e-6}, STOP_1),
    "mamba2": Row(Mamba2, MAMBA2, (("dt_bias", -1e4),)),
    "mamba2 groups": Row(
        Mamba2, {**MAMBA2, "ngroups": 2, "dt_limit": (0.2, 0.7), "bias": True, "D_has_hdim": True}
    ),
    "mamba2 beside an MLP": Row(Mamba2, {**MAMBA2, "d_ssm": 8, "d_conv": 1, "rmsnorm": False, "chunk_size": 3}),
    "mamba2 norm before gate": Row(Mamba2, {**MAMBA2, "norm_before_gate": True, "d_ssm": 8, "d_conv": 1}),
    "mamba2 no norm": Row(Mamba2, {**MAMBA2, "rmsnorm": False, "conv_bias": False, "d_conv": 2}),
    "mamba3": Row(Mamba3, MAMBA3),
    "mamba3 groups": Row(Mamba3, {**MAMBA3, "ngroups": 2, "rope_fraction": 1.0, "is_outproj_norm": True}),
    "mamba3 no turns": Row(Mamba3, {**MAMBA3, "rope_fraction": 0.0, "a_activation": "softplus"}),
    "mamba3 no rope": Row(Mamba3, {**MAMBA3, "rope": "none", "bc_bias": False}),
    "mamba3 euler": Row(Mamba3, {**MAMBA3, "trap": "euler", "bc_norm": False, "is_mimo": True, "mimo_rank": 2}),
    "mamba3 mimo norm": Row(
        Mamba3, {**MAMBA3, "is_mimo": True, "mimo_rank": 3, "is_outproj_norm": True, "rotary": "half"}
    ),
    "mamba3 mimo": Row(Mamba3, {**MAMBA3, "is_mimo": True, "mimo_rank": 2, "rotary": "half", "ngroups": 2}),
    "mamba3 ablated": Row(
        Mamba3, {**MAMBA3, "rope": "standard", "trap": "half", "bc_bias": False, "bc_norm": False, "d_conv": 3}
    ),
    "s4": Row(S4, LINEAR, (("inv_dt", -40.0),)),
    "s4 conv": Row(S4, {**LINEAR, "mode": "conv", "channels": 2}),
    "s4d": Row(S4D, LINEAR, (("log_dt", -40.0),)),
    "s4d conv": Row(S4D, {**LINEAR, "mode": "conv", "init": "legs", "channels": 2, "output": "linear"}),
    "s4d bilinear": Row(S4D, {**LINEAR, "init": "inv", "discretization": "bilinear", "output": None}),
}  # fmt: skip


def build(name, dtype=np.float64):
    """The mixer of a row, moved away from its symmetric start."""
    row, rng = MIXERS[name], np.random.default_rng(3)
    mixer = row.mixer(D_MODEL, rng=rng, **row.fields)
    for parameter in mixer.parameters():
        parameter.data += (0.1 * rng.standard_normal(parameter.shape)).astype(parameter.dtype)
    return mixer.to_dtype(dtype)


def sequence(batch=2, length=LENGTH, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal((batch, length, D_MODEL)).astype(dtype)


def run(mixer, x, state=None, **options):
    with xc.no_grad():
        y, state = mixer(xc.Tensor(x), state, **options)
    return y.numpy(), state


def close(x, y, tolerance=1e-10):
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def close_states(one, other, tolerance=1e-10):
    assert type(one) is type(other)
    for name, x, y in zip(one._fields, one, other):
        x, y = x.numpy(), y.numpy()
        assert x.shape == y.shape
        close(*((np.exp(1j * x), np.exp(1j * y)) if name == "theta" else (x, y)), tolerance)


every_mixer = pytest.mark.parametrize("name", MIXERS)


def part(state, rows):
    """Rows of a state's batch."""
    return type(state)(*(x[rows] for x in state))


@every_mixer
@pytest.mark.parametrize("chunk", [1, 3, 16, LENGTH, LENGTH + 5])
def test_any_chunking_gives_the_full_result(name, chunk):
    mixer, x = build(name), sequence(length=LENGTH)
    whole, last = run(mixer, x)
    state, pieces = None, []
    for start in range(0, LENGTH, chunk):
        y, state = run(mixer, x[:, start : start + chunk], state)
        pieces.append(y)
    close(np.concatenate(pieces, axis=1), whole)
    close_states(state, last)


@every_mixer
def test_steps_after_a_prefill_give_the_full_result(name):
    mixer, x = build(name), sequence(length=LENGTH)
    y, state = run(mixer, x[:, :13])
    pieces = [y]
    for t in range(13, LENGTH):
        y, state = run(mixer, x[:, t : t + 1], state)
        pieces.append(y)
    close(np.concatenate(pieces, axis=1), run(mixer, x)[0])


@every_mixer
def test_a_fresh_start_is_the_initial_state(name):
    mixer, x = build(name), sequence(length=3)
    y, state = run(mixer, x, mixer.initial_state(2))
    close(y, run(mixer, x)[0])
    assert [part.shape for part in mixer.initial_state(2)] == [part.shape for part in state]
    assert all(part.dtype == np.float64 for part in state)


@every_mixer
def test_float32_stays_float32_and_near(name):
    x = sequence()
    y, state = run(build(name, np.float32), x.astype(np.float32))
    assert y.dtype == np.float32 and all(part.dtype == np.float32 for part in state)
    want = run(build(name), x)[0]
    np.testing.assert_allclose(y, want, rtol=0, atol=2e-5 * max(1, np.abs(want).max()))


@every_mixer
def test_the_past_does_not_see_the_future(name):
    mixer, x = build(name), sequence()
    other = x.copy()
    other[:, 11:] += 1
    close(run(mixer, x)[0][:, :11], run(mixer, other)[0][:, :11], 1e-13)


@every_mixer
def test_sequences_of_a_batch_do_not_meet(name):
    mixer, x, order = build(name), sequence(batch=4), [2, 0, 3, 1]
    _, start = run(mixer, sequence(batch=4, seed=1))
    y, state = run(mixer, x, start)
    turned, after = run(mixer, x[order], part(start, order))
    close(turned, y[order], 1e-12)
    close_states(after, part(state, order), 1e-12)


@every_mixer
@pytest.mark.parametrize("side", ["right", "left", "inside"])
def test_padding_is_truncation(name, side):
    mixer, x = build(name), sequence(batch=1, length=6)
    _, start = run(mixer, sequence(batch=1, seed=1))
    keep = {"right": range(6), "left": range(3, 9), "inside": [0, 1, 4, 5, 6, 8]}[side]
    padded, mask = np.full((1, 9, x.shape[-1]), 7.0), np.zeros((1, 9), bool)
    padded[:, keep], mask[:, keep] = x, True
    for state in (None, start):
        y, after = run(mixer, padded, state, mask=mask)
        short, last = run(mixer, x, state)
        close(y[:, keep], short)
        close(y[~mask], 0)
        close_states(after, last)


@every_mixer
def test_rows_of_different_length_go_together(name):
    mixer, x, lengths = build(name), sequence(batch=3, length=7), (7, 2, 4)
    mask = np.arange(7) < np.array(lengths)[:, None]
    y, state = run(mixer, x, mask=mask)
    for row, length in enumerate(lengths):
        alone, last = run(mixer, x[row : row + 1, :length])
        close(y[row : row + 1, :length], alone)
        close_states(part(state, [row]), last)


@every_mixer
def test_only_padding_leaves_the_state_alone(name):
    mixer, x = build(name), sequence()
    _, state = run(mixer, x)
    y, after = run(mixer, x, state, mask=np.zeros(x.shape[:2], bool))
    close(y, 0)
    close_states(after, state)


@every_mixer
def test_gradients_of_a_padded_batch_are_those_of_its_real_tokens(name):
    mixer, x = build(name), sequence(length=6)
    mask = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], bool)

    def gradients(run_rows):
        mixer.zero_grad()
        tensor = xc.Tensor(x, requires_grad=True)
        total = None
        for y in run_rows(tensor):
            total = (y * y).sum() if total is None else total + (y * y).sum()
        total.backward()
        return [tensor.grad] + [parameter.grad for parameter in mixer.parameters()]

    together = gradients(lambda tensor: [mixer(tensor, mask=mask)[0]])
    alone = gradients(lambda tensor: [mixer(tensor[:1, 2:])[0], mixer(tensor[1:, :3])[0]])
    for one, other in zip(together, alone):
        close(one, other, 1e-9)


@every_mixer
def test_packed_sequences_are_separate_sequences(name):
    mixer, edges = build(name), [0, 5, 5, 6, 13]
    x = sequence(batch=1, length=13)
    _, start = run(mixer, sequence(batch=4, seed=1))
    for state in (None, start):
        y, after = run(mixer, x, state, cu_seqlens=np.array(edges))
        for i, (low, high) in enumerate(zip(edges, edges[1:])):
            own = part(start if state else mixer.initial_state(4), [i])
            want, last = run(mixer, x[:, low:high], own) if high > low else (x[:, :0], own)
            close(y[:, low:high], want)
            close_states(part(after, [i]), last)


@every_mixer
def test_packed_gradients_are_those_of_separate_sequences(name):
    mixer, edges = build(name), [0, 4, 5, 11]
    x = sequence(batch=1, length=11)

    def gradients(packed):
        mixer.zero_grad()
        tensor = xc.Tensor(x, requires_grad=True)
        if packed:
            y, last = mixer(tensor, cu_seqlens=np.array(edges))
            loss = (y * y).sum()
            for value in last:
                loss = loss + (value * value).sum()
        else:
            loss = None
            for low, high in zip(edges, edges[1:]):
                y, last = mixer(tensor[:, low:high])
                for value in (y, *last):
                    loss = (value * value).sum() if loss is None else loss + (value * value).sum()
        loss.backward()
        return [tensor.grad] + [parameter.grad for parameter in mixer.parameters()]

    for one, other in zip(gradients(True), gradients(False)):
        close(one, other, 1e-9)


@every_mixer
def test_gradient_through_a_carried_state_is_the_full_gradient(name):
    mixer, x = build(name), sequence(length=9)

    def gradients(cut):
        mixer.zero_grad()
        tensor, state = xc.Tensor(x, requires_grad=True), None
        loss = None
        for low, high in zip(cut, cut[1:]):
            y, state = mixer(tensor[:, low:high], state)
            loss = (y * y).sum() if loss is None else loss + (y * y).sum()
        loss.backward()
        return [tensor.grad] + [parameter.grad for parameter in mixer.parameters()]

    for whole, chained in zip(gradients((0, 9)), gradients((0, 4, 5, 9))):
        close(chained, whole, 1e-9)


@every_mixer
def test_gradient_reaches_input_and_initial_state(name):
    mixer, x = build(name), sequence(batch=1, length=3)
    _, start = run(mixer, sequence(batch=1, length=4, seed=5))

    def function(x, *state):
        y, after = mixer(x, state)
        return y, *after

    assert xc.gradcheck(function, [x] + [part.numpy() for part in start])


@pytest.mark.parametrize("name", [name for name, row in MIXERS.items() if row.clock])
def test_steps_of_no_duration_leave_the_state_alone(name):
    mixer, x = build(name), sequence()
    _, start = run(mixer, x)
    named = dict(mixer.named_parameters())
    for path, value in MIXERS[name].clock:
        named[path].data[...] = value
    _, after = run(mixer, x, start)
    close(after[-1].numpy(), start[-1].numpy(), 1e-8)


@every_mixer
def test_a_state_and_options_that_do_not_fit_are_refused(name):
    mixer, x = build(name), sequence()
    with pytest.raises(ShapeError):
        run(mixer, x, mixer.initial_state(3))
    with pytest.raises(ShapeError):
        run(mixer, x[:, :, :-1])
    with pytest.raises(ShapeError):
        run(mixer, x, mask=np.ones((2, 3), bool))
    for edges in ([0, 20], [0, 9, 5, 20]):
        with pytest.raises(ShapeError):
            run(mixer, x, cu_seqlens=np.array(edges))
    for edges in ([1, 20], [0, 12, 9, 20], [0, 19], [0.0, 20.0]):
        with pytest.raises(ShapeError):
            run(mixer, x[:1], cu_seqlens=np.array(edges))
    with pytest.raises(ShapeError):
        run(mixer, x[:1], mask=np.ones((1, 20), bool), cu_seqlens=np.array([0, 20]))
