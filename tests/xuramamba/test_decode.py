"""A step by kernels is a step by ops: the same logits, the same states, nothing else touched."""

import numpy as np
import pytest

from xuracore import no_grad, program, threads
from xuracore.errors import ShapeError
from xuracore.threads import available_cpus
from xuramamba import LanguageModel, LanguageModelConfig
from xuramamba.decode import Decoder, decoder_of
from xuramamba.quantize import quantize

MIXERS = [
    ("mamba1", {}),
    ("mamba1", {"bias": True, "conv_bias": False, "d_conv": 2, "mixer_rms_eps": 1e-6}),
    ("mamba1", {"d_conv": 1, "d_state": 3}),
    ("mamba2", {"d_state": 16, "headdim": 32}),
    ("mamba2", {"d_state": 16, "headdim": 16, "ngroups": 2, "dt_limit": (0.01, 0.05), "norm_before_gate": True}),
    ("mamba2", {"d_state": 8, "headdim": 32, "rmsnorm": False, "D_has_hdim": True, "bias": True}),
    ("mamba3", {"d_state": 16, "headdim": 32}),
    ("mamba3", {"d_state": 16, "headdim": 16, "rotary": "half", "ngroups": 2, "is_outproj_norm": True}),
    ("mamba3", {"d_state": 8, "headdim": 32, "is_mimo": True, "mimo_rank": 3, "a_activation": "softplus"}),
    ("mamba3", {"d_state": 8, "headdim": 32, "is_mimo": True, "ngroups": 2, "is_outproj_norm": True, "trap": "half"}),
    ("mamba3", {"d_state": 7, "rope": "none", "trap": "euler", "bc_bias": False, "bc_norm": False}),
]


def build(mixer, fields, **others):
    sizes = {"vocab_size": 70, "d_model": 64, "n_layer": 2} | others
    config = LanguageModelConfig(mixer=mixer, mixer_fields=fields, **sizes)
    lm = LanguageModel(config, rng=np.random.default_rng(1))
    rng = np.random.default_rng(2)
    for parameter in lm.parameters():  # nothing at its initial zeros or ones
        parameter.data += rng.normal(0, 0.02, parameter.shape).astype(np.float32)
    return lm


def arrays(state):
    return [part.data.copy() for layer in state for part in layer]


def steps_differ(lm, ids, start):
    """Largest differences of logits and of final states between steps and the whole sequence."""
    with no_grad():
        whole, last = lm(ids)
        _, state = lm(ids[:, :start])
        session, differences = Decoder(lm).session(state), []
        for t in range(start, ids.shape[1]):
            differences.append(np.abs(session.step(ids[:, t]) - whole.data[:, t]).max())
    state = session.state
    assert [type(layer) for layer in state] == [type(layer) for layer in last]
    return max(differences), max(np.abs(a - b).max(initial=0) for a, b in zip(arrays(state), arrays(last)))


@pytest.mark.parametrize("mixer, fields", MIXERS)
def test_steps_give_what_the_whole_sequence_gives(mixer, fields):
    lm = build(mixer, fields)
    assert all(Decoder(lm).layers)
    ids = np.random.default_rng(0).integers(0, 70, (2, 7))
    logits, states = steps_differ(lm, ids, 3)
    assert logits < 3e-6 and states < 1e-5


@pytest.mark.parametrize("width", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("mixer, fields", [MIXERS[0], MIXERS[3], MIXERS[6]])
def test_stored_widths_do_so_too(mixer, fields, width):
    lm = quantize(build(mixer, fields, tie_embeddings=False), width)
    assert all(Decoder(lm).layers)
    logits, states = steps_differ(lm, np.random.default_rng(0).integers(0, 70, (1, 6)), 3)
    assert logits < 3e-6 and states < 1e-5


@pytest.mark.parametrize("others", [{"d_intermediate": 32}, {"rms_norm": False}])
def test_layers_without_a_kernel_are_called_as_they_are(others):
    lm = build("mamba1", {}, **others)
    assert not any(Decoder(lm).layers)
    assert max(steps_differ(lm, np.random.default_rng(0).integers(0, 70, (2, 5)), 2)) < 1e-5


def test_float64_models_and_other_mixers_stay_with_the_ops():
    lm = build("mamba1", {}).to_dtype(np.float64)
    ids = np.random.default_rng(0).integers(0, 70, (1, 4))
    assert max(steps_differ(lm, ids, 2)) < 1e-12
    for fields in ({"d_conv": 3}, {"rope": "standard"}):
        lm = build("mamba3", {"d_state": 16, "headdim": 32} | fields)
        assert not any(Decoder(lm).layers)
        assert max(steps_differ(lm, ids, 2)) < 1e-5


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_threads_change_no_bit_and_the_state_that_was_given_is_left_alone(mixer, monkeypatch):
    lm, ids = build(mixer, {}, vocab_size=200), np.random.default_rng(0).integers(0, 70, (3, 5))
    with no_grad():
        _, state = lm(ids)
        before, made = arrays(state), []
        for count in (1, available_cpus()):
            monkeypatch.setattr(threads, "_threads", count)
            monkeypatch.setattr(program, "CALL_WORK", 0)
            session = Decoder(lm).session(state)
            made.append([session.step(ids[:, t]).copy() for t in range(5)] + arrays(session.state))
    assert all(np.array_equal(a, b) for a, b in zip(*made))
    assert all(np.array_equal(a, b) for a, b in zip(before, arrays(state)))


def test_a_state_of_another_size_is_refused():
    lm, other = build("mamba2", {"d_state": 16, "headdim": 32}), build("mamba2", {"d_state": 8, "headdim": 32})
    with pytest.raises(ShapeError, match="this model has"):
        Decoder(lm).session(other.backbone.initial_state(1))


def test_a_decoder_follows_the_parameters():
    lm = build("mamba1", {})
    first = decoder_of(lm)
    ids = np.array([[5]])
    with no_grad():
        _, state = lm(np.array([[1, 2]]))
        for parameter in lm.parameters():
            parameter.data *= np.float32(1.1)
        assert decoder_of(lm) is first
        expected = lm.logits(lm.backbone(ids, state)[0]).data[:, 0]
        assert np.abs(first.session(state).step(ids[:, 0]) - expected).max() < 1e-5
        lm.to_dtype(np.float64)
        assert decoder_of(lm) is not first
