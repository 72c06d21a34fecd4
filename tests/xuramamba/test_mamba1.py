"""Mamba-1 equals the reference model in two sizes, and obeys the laws of a mixer."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import xuracore as xc
from xuracore.errors import ConfigError, ShapeError
from xuramamba import LanguageModel, LanguageModelConfig, Mamba1

GOLDEN = Path(__file__).parents[1] / "golden"

DECODED = "out.decode.last_hidden_state"


def golden_model(name):
    vectors = np.load(GOLDEN / f"{name}.npz", allow_pickle=False)
    c = json.loads(str(vectors["meta"]))["config"]
    fields = {
        "d_state": c["state_size"], "d_conv": c["conv_kernel"], "expand": c["expand"],
        "dt_rank": c["time_step_rank"], "bias": c["use_bias"], "conv_bias": c["use_conv_bias"],
        "mixer_rms_eps": c.get("mixer_rms_eps"),
    }  # fmt: skip
    model = LanguageModel(
        LanguageModelConfig(
            c["vocab_size"], c["hidden_size"], c["num_hidden_layers"], "mamba1", fields,
            norm_eps=c["layer_norm_epsilon"],
        )  # fmt: skip
    )
    weights = {key[2:]: vectors[key] for key in vectors.files if key.startswith("w.")}
    model.load_state_dict(
        {f"backbone.{key}".replace("embeddings.", "embedding."): value for key, value in weights.items()}
    )
    notes = re.search(r"first (\d+) tokens", str(vectors["meta"]))
    prefill = int(notes.group(1)) if notes else vectors["in.input_ids"].shape[1] - vectors[DECODED].shape[1]
    return model, vectors, prefill


def near(got, want, tolerance=2e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, np.abs(want).max()))


NAMES = ["mamba1_base", "mamba1_bias_k3", "falcon_mamba"]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_of_the_reference_model(name):
    model, vectors, _ = golden_model(name)
    hidden, _ = model.backbone(vectors["in.input_ids"])
    near(hidden.numpy(), vectors["out.last_hidden_state"])
    hidden.backward(vectors["cot.last_hidden_state"])
    for path, parameter in model.backbone.named_parameters():
        near(parameter.grad, vectors["gw." + path.replace("embedding.", "embeddings.")], 5e-5)


@pytest.mark.parametrize("name", NAMES)
def test_states_after_a_prefix_and_after_single_steps(name):
    model, vectors, prefill = golden_model(name)
    ids = vectors["in.input_ids"]
    with xc.no_grad():
        _, state = model.backbone(ids[:, :prefill])
        same_states(state, vectors, "prefill")
        outputs = []
        for t in range(prefill, ids.shape[1]):
            hidden, state = model.backbone(ids[:, t : t + 1], state)
            outputs.append(hidden.numpy())
    near(np.concatenate(outputs, axis=1), vectors["out.decode.last_hidden_state"])
    same_states(state, vectors, "decode")


def same_states(states, vectors, when):
    for i, state in enumerate(states):
        conv = state.conv.numpy().swapaxes(1, 2)  # the reference keeps one more input than is needed
        near(conv, vectors[f"out.{when}.conv_states.{i}"][:, :, 1:])
        near(state.ssm.numpy(), vectors[f"out.{when}.recurrent_states.{i}"])


def build(**fields):
    mixer = Mamba1(6, d_state=3, rng=np.random.default_rng(3), dt_min=0.1, dt_max=1.0, **fields)
    return mixer.to_dtype(np.float64)


@pytest.mark.parametrize("fields", [
        {"d_conv": 0}, {"dt_rank": "some"}, {"dt_rank": 0}, {"d_stat": 3}, {"dt_limit": (0.2, 0.1)},
        {"dt_limit": (-1.0, 1.0)}, {"mixer_rms_eps": -1.0},
    ])
def test_impossible_configurations_are_refused(fields):
    with pytest.raises(ConfigError):
        Mamba1(6, **fields)


def test_a_wrong_width_is_named():
    with pytest.raises(ShapeError, match="expected"):
        build()(xc.Tensor(np.zeros((1, 2, 7))))
