"""Mamba-2 equals independent references: outputs, states and all gradients."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import xuracore as xc
from xuracore.nn import Module
from xuramamba import Block, Mamba2

GOLDEN = Path(__file__).parents[1] / "golden"


def load(name):
    vectors = np.load(GOLDEN / f"{name}.npz", allow_pickle=False)
    return {key: vectors[key] for key in vectors.files}


def near(got, want, error):
    """Within four times the reference's own float32 error; twice that, relative, for gradients."""
    np.testing.assert_allclose(got, want, rtol=0, atol=error)


class Model(Module):
    """Embedding, blocks, norm: the names of the reference model."""

    def __init__(self, vectors):
        c = json.loads(str(vectors["meta"]))["config"]
        rng = np.random.default_rng(0)
        self.embeddings = xc.nn.Embedding(c["vocab_size"], c["hidden_size"], rng=rng)
        self.layers = xc.nn.ModuleList()
        for _ in range(c["num_hidden_layers"]):
            mixer = Mamba2(
                c["hidden_size"], d_state=c["state_size"], d_conv=c["conv_kernel"], expand=c["expand"],
                headdim=c["head_dim"], ngroups=c["n_groups"], chunk_size=c["chunk_size"],
                bias=c["use_bias"], conv_bias=c["use_conv_bias"], norm_eps=c["layer_norm_epsilon"],
                dt_limit=tuple(c["time_step_limit"]), rng=rng,
            )  # fmt: skip
            self.layers.append(Block(c["hidden_size"], mixer, None, c["layer_norm_epsilon"]))
        self.norm_f = xc.nn.RMSNorm(c["hidden_size"], c["layer_norm_epsilon"])
        self.load_state_dict({key[2:]: value for key, value in vectors.items() if key.startswith("w.")})

    def forward(self, ids, states=None):
        x, after = self.embeddings(ids), []
        for i, layer in enumerate(self.layers):
            x, state = layer(x, None if states is None else states[i])
            after.append(state)
        return self.norm_f(x), after


@pytest.mark.parametrize("name", ["mamba2_base", "mamba2_dtlimit"])
def test_outputs_and_gradients_of_the_reference_model(name):
    vectors = load(name)
    model, error = Model(vectors), json.loads(str(vectors["meta"]))["ref32_maxabs"]["last_hidden_state"]
    hidden, _ = model(vectors["in.input_ids"])
    near(hidden.numpy(), vectors["out.last_hidden_state"], 4 * error)
    hidden.backward(vectors["cot.last_hidden_state"])
    scale = 4 * error / np.abs(vectors["out.last_hidden_state"]).max()
    for path, parameter in model.named_parameters():
        want = vectors[f"gw.{path}"]
        near(parameter.grad, want, scale * max(1.0, np.abs(want).max()))


def test_states_after_a_prefix_and_after_single_steps():
    vectors = load("mamba2_base")
    model, ids = Model(vectors), vectors["in.input_ids"]
    prefill = int(re.search(r"(\d+) tokens of prefill", str(vectors["meta"])).group(1))
    with xc.no_grad():
        _, states = model(ids[:, :prefill])
        same_states(states, vectors, "prefill")
        outputs = []
        for t in range(prefill, ids.shape[1]):
            hidden, states = model(ids[:, t : t + 1], states)
            outputs.append(hidden.numpy())
    near(np.concatenate(outputs, axis=1), vectors["out.decode.last_hidden_state"], 1e-5)
    same_states(states, vectors, "decode")


def same_states(states, vectors, when):
    for i, state in enumerate(states):
        conv = state.conv.numpy().swapaxes(1, 2)  # the reference keeps one more input than is needed
        near(conv, vectors[f"out.{when}.conv_states.{i}"][:, :, 1:], 1e-5)
        near(state.ssm.numpy(), vectors[f"out.{when}.recurrent_states.{i}"], 1e-5)


def scan(given, names, **options):
    return xc.ops.ssd_scan(*(given.get(name) for name in names.split()), **options)


@pytest.mark.parametrize("name", ["op_ssd", "op_ssd_h0", "upstream/mamba2_ssd"])
def test_scan_equals_the_published_reference_function(name):
    vectors = load(name)
    parts = {key: value for key, value in vectors.items() if key.startswith(("in.", "w."))}
    given = {key.partition(".")[2]: xc.Tensor(value, requires_grad=True) for key, value in parts.items()}
    y, last = scan(given, "x dt A B C D z dt_bias h0", dt_softplus=True)
    error = json.loads(str(vectors["meta"]))["ref32_maxabs"] if "meta" in vectors else {}
    near(y.numpy(), vectors["out.y"], 4 * error.get("y", 2e-6))
    near(last.numpy(), vectors["out.last_state"], 4 * error.get("last_state", 1e-6))
    cotangent = "cot" if "cot.y" in vectors else "dout"
    total = (y * vectors[f"{cotangent}.y"]).sum() + (last * vectors[f"{cotangent}.last_state"]).sum()
    total.backward()
    for key, tensor in given.items():
        kinds = (f"gin.{key}", f"gw.{key}", f"grad.{key}")
        want = next(vectors[kind] for kind in kinds if kind in vectors)
        near(tensor.grad, want, 2e-6 * max(1.0, np.abs(want).max()))


def test_scan_equals_the_minimal_published_form():
    """It takes x and A times dt, and no skip."""
    vectors = load("upstream/ssd_minimal")
    given = {name: vectors[name] for name in "XABC"}
    ones = np.ones_like(given["A"])
    batch, length = given["X"].shape[:2]
    h, got = None, np.empty_like(given["X"])
    for t in range(length):  # A differs from token to token here, so each goes alone
        at = slice(t, t + 1)
        for b in range(batch):
            a = given["A"][b, t]
            before = None if h is None else h[b : b + 1]
            y, last = xc.ops.ssd_scan(
                given["X"][b : b + 1, at], ones[b : b + 1, at], a, given["B"][b : b + 1, at],
                given["C"][b : b + 1, at], None, None, None, before,
            )  # fmt: skip
            got[b, t] = y[0, 0]
            following = last if b == 0 else np.concatenate([following, last])
        h = following
    near(got, vectors["y"], 1e-5)
    near(h, vectors["final"], 1e-5)
