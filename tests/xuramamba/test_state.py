"""States can be copied, cut, joined, saved and loaded, whatever the mixer."""

import numpy as np
import pytest

import xuracore as xc
from xuracore import io
from xuracore.errors import FormatError, ShapeError
from xuramamba import S4, S4D, LanguageModel, LanguageModelConfig, Mamba1, Mamba2, Mamba3, state

MIXERS = {
    "s4": lambda: S4(8, d_state=4),
    "s4d": lambda: S4D(8, d_state=4),
    "mamba1": lambda: Mamba1(8, d_state=3),
    "mamba2": lambda: Mamba2(8, d_state=4, headdim=4),
    "mamba3": lambda: Mamba3(8, d_state=4, headdim=4),
    "mimo": lambda: Mamba3(8, d_state=4, headdim=4, is_mimo=True, mimo_rank=2, rotary="half"),
}
every_mixer = pytest.mark.parametrize("name", MIXERS)


def sequence(batch=3, length=5, seed=0):
    return xc.Tensor(np.random.default_rng(seed).standard_normal((batch, length, 8)).astype(np.float32))


def after(mixer, x, start=None):
    with xc.no_grad():
        return mixer(x, start)


def same(one, other):
    assert type(one) is type(other)
    for x, y in zip(state.leaves(one), state.leaves(other), strict=True):
        np.testing.assert_array_equal(x.numpy(), y.numpy())


def language_model():
    fields = {"d_state": 3}
    return LanguageModel(LanguageModelConfig(11, 8, 2, "mamba1", fields), rng=np.random.default_rng(0))


@every_mixer
def test_a_saved_state_goes_on_as_the_one_kept(name, tmp_path):
    mixer = MIXERS[name]()
    _, kept = after(mixer, sequence())
    state.save(kept, tmp_path / "state")
    loaded = state.load(tmp_path / "state", like=mixer.initial_state(1))
    same(loaded, kept)
    same(state.load(tmp_path / "state"), kept)
    np.testing.assert_array_equal(
        after(mixer, sequence(seed=1), loaded)[0].numpy(), after(mixer, sequence(seed=1), kept)[0].numpy()
    )


def test_the_states_of_a_whole_model_are_one_file(tmp_path):
    lm, ids = language_model(), np.array([[1, 2, 3]])
    _, kept = after(lm, ids)
    state.save(kept, tmp_path / "state")
    loaded = state.load(tmp_path / "state", like=lm.initial_state(1))
    same(loaded, kept)
    np.testing.assert_array_equal(after(lm, ids, loaded)[0].numpy(), after(lm, ids, kept)[0].numpy())


@every_mixer
def test_going_back_to_a_snapshot_is_as_if_nothing_had_been_read(name):
    mixer = MIXERS[name]()
    _, now = after(mixer, sequence())
    kept = state.snapshot(now)
    for part in state.leaves(now):
        part.data[...] = 99  # whatever happens to the state itself
    again = state.restore(kept)
    y, _ = after(mixer, sequence(seed=1), again)
    for part in state.leaves(again):
        part.data[...] = 99
    np.testing.assert_array_equal(after(mixer, sequence(seed=1), state.restore(kept))[0].numpy(), y.numpy())
    with pytest.raises(ValueError):
        state.leaves(kept)[0].data[...] = 0


@every_mixer
def test_rows_can_be_chosen_forked_split_and_joined(name):
    mixer = MIXERS[name]()
    _, now = after(mixer, sequence())
    same(state.stack(state.split(now)), now)
    same(state.stack(state.split(now, (1, 2))), now)
    same(state.select(now, [2, 0]), state.stack([state.split(now)[2], state.split(now)[0]]))
    same(state.select(now, np.array([True, False, True])), state.select(now, [0, 2]))
    forked = state.fork(now, 2)
    assert state.batch_size(forked) == 6
    same(state.select(forked, [0, 2, 4]), now)
    same(state.select(forked, [1, 3, 5]), now)
    x = sequence(seed=1)
    y = after(mixer, x, now)[0].numpy()
    part = after(mixer, xc.Tensor(x.data[[2, 0]]), state.select(now, [2, 0]))[0].numpy()
    np.testing.assert_allclose(part, y[[2, 0]], rtol=1e-5, atol=1e-6)


@every_mixer
def test_its_size_does_not_grow_with_the_past(name):
    mixer = MIXERS[name]()
    sizes = {state.nbytes(after(mixer, sequence(length=n))[1]) for n in (1, 4, 9)}
    assert sizes == {sum(x.data.nbytes for x in mixer.initial_state(3))}


def test_gradients_pass_through_selection_and_end_at_detach():
    mixer, x = MIXERS["mamba1"](), sequence()
    tensor = xc.Tensor(x.data, requires_grad=True)
    _, now = mixer(tensor)
    total = sum((part * part).sum() for part in state.stack(state.split(state.select(now, [0, 0]))))
    total.backward()
    assert np.abs(tensor.grad[0]).max() > 0 and not tensor.grad[1:].any()
    assert all(part.node is None for part in state.leaves(state.detach(now)))


# ---------------------------------------------------------------------- refusals
def test_files_that_do_not_fit_are_refused_with_the_reason(tmp_path):
    path = tmp_path / "state"
    _, now = after(MIXERS["mamba1"](), sequence())
    state.save(now, path)
    with pytest.raises(FormatError, match="expected float32 .batch, 16, 5"):
        state.load(path, like=Mamba1(8, d_state=5).initial_state(1))
    with pytest.raises(FormatError, match="Mamba1State"):
        state.load(path, like=MIXERS["s4"]().initial_state(1))
    with pytest.raises(FormatError, match="tuple of 2"):
        state.load(path, like=language_model().initial_state(1))
    io.save_safetensors(path, {"x": np.zeros(3)})
    with pytest.raises(FormatError, match="format is None"):
        state.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"version": "2"}, {"structure": "nothing"}, {"structure": '{"kind": "object", "parts": []}'},
        {"structure": '{"kind": "Mamba1State", "parts": [null]}'}, {"structure": "null"},
        {"structure": '{"kind": "Mamba1State", "parts": [null, null, null]}'},
        {"structure": '{"kind": "tuple", "parts": [null]}'},
        {"structure": '{"kind": "tuple", "parts": [' * 40 + "null" + "]}" * 40},
    ],
)  # fmt: skip
def test_damaged_files_are_refused(tmp_path, change):
    path = tmp_path / "state"
    state.save(after(MIXERS["mamba1"](), sequence())[1], path)
    tensors, metadata = io.load_safetensors(path), io.read_metadata(path)
    io.save_safetensors(path, tensors, {**metadata, **change})
    with pytest.raises(FormatError):
        state.load(path)


def test_impossible_rows_are_refused():
    _, now = after(MIXERS["mamba1"](), sequence())
    for call in (
        lambda: state.select(now, [3]), lambda: state.select(now, [[0]]), lambda: state.fork(now, 0),
        lambda: state.split(now, (1, 1)), lambda: state.stack([]), lambda: state.select(now, [0.5]),
        lambda: state.stack([now, after(MIXERS["s4"](), sequence())[1]]), lambda: state.nbytes("state"),
        lambda: state.save(3.0, "nowhere"),
    ):  # fmt: skip
        with pytest.raises(ShapeError):
            call()
