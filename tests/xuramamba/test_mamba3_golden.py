"""Mamba-3 equals independent references: outputs, states and all gradients."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import xuracore as xc
from xuramamba import Mamba3, Mamba3State

GOLDEN = Path(__file__).parents[1] / "golden"


def load(name):
    vectors = np.load(GOLDEN / name, allow_pickle=False)
    return {key: vectors[key] for key in vectors.files}


def mixer_from(vectors):
    config = json.loads(str(vectors["meta"]))["config"]
    mixer = Mamba3(
        config["d_model"],
        d_state=config["d_state"],
        expand=config["expand"],
        headdim=config["headdim"],
        ngroups=config["ngroups"],
        rope_fraction=config["rope_fraction"],
        is_mimo=config["is_mimo"],
        mimo_rank=config["mimo_rank"],
        is_outproj_norm=config["is_outproj_norm"],
        a_activation=config["A_act"],
        rotary="pair" if config["rotate_pairwise"] else "half",
        a_floor=config["A_floor"],
    )
    mixer.load_state_dict({key[2:]: value for key, value in vectors.items() if key.startswith("w.")})
    return mixer


MODULES = ["mamba3_siso", "mamba3_siso_heavytail_norm", "mamba3_mimo", "mamba3_mimo_norm"]


def near(got, want, tolerance=2e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, np.abs(want).max()))


def same_state(state, vectors, when):
    turned = np.exp(1j * state.theta.numpy().astype(np.float64))
    near(turned, np.exp(1j * vectors[f"out.{when}.state.angle"].astype(np.float64)))
    near(state.h.numpy(), vectors[f"out.{when}.state.ssm"])
    near(state.k.numpy(), vectors[f"out.{when}.state.k"])
    near(state.v.numpy(), vectors[f"out.{when}.state.v"])


@pytest.mark.parametrize("name", MODULES)
def test_module_outputs_states_and_gradients(name):
    vectors = load(f"{name}.npz")
    mixer = mixer_from(vectors)
    x = xc.Tensor(vectors["in.u"], requires_grad=True)
    y, state = mixer(x)
    near(y.numpy(), vectors["out.out"])
    same_state(state, vectors, "final")
    y.backward(vectors["cot.out"])
    near(x.grad, vectors["gin.u"], 5e-5)
    for path, parameter in mixer.named_parameters():
        near(parameter.grad, vectors[f"gw.{path}"], 5e-5)


@pytest.mark.parametrize("name", MODULES)
def test_module_state_after_a_prefix(name):
    vectors = load(f"{name}.npz")
    mixer = mixer_from(vectors)
    with xc.no_grad():
        length = int(re.search(r"first (\d+) tokens", str(vectors["meta"])).group(1))
        _, state = mixer(xc.Tensor(vectors["in.u"][:, :length]))
    same_state(state, vectors, "prefill")
    assert isinstance(state, Mamba3State)


def scan_upstream(vectors, rotary):
    """The published scan functions' arguments, laid out for ours; names as in the vectors."""
    names = [key[3:] for key in vectors if key.startswith("in.")]
    given = {name: xc.Tensor(vectors[f"in.{name}"], requires_grad=True) for name in names}
    q, k = given["Q"], given["K"]
    mimo = q.ndim == 5
    if not mimo:
        q, k = (x.reshape(*x.shape[:2], 1, *x.shape[2:]) for x in (q, k))
    bias = [b if mimo else b.reshape(b.shape[0], 1, b.shape[1]) for b in (given["Q_bias"], given["K_bias"])]
    dt, decay, trap = (given[name].transpose(0, 2, 1) for name in ("DT", "ADT", "Trap"))
    y, *state = xc.ops.trapezoidal_scan(
        q, k, given["V"], dt, decay / dt, trap, given["Angles"], *bias, given["D"], given.get("psi"),
        rotary=rotary,
    )  # fmt: skip
    z = given["Z"].reshape(*given["Z"].shape[:2], 1, *given["Z"].shape[2:])
    if mimo:
        y = y * xc.ops.silu(z * given["zeta"].transpose(1, 0, 2)) * given["omega"].transpose(1, 0, 2)
    else:
        y = y * xc.ops.silu(z)
    return y.sum(axis=2), state, given


@pytest.mark.parametrize(
    "name, rotary",
    [
        ("mamba3_siso_S4", "pair"),
        ("mamba3_siso_S8", "pair"),
        ("mamba3_mimo_pair", "pair"),
        ("mamba3_mimo_half", "half"),
    ],
)
def test_scan_equals_the_published_reference_functions(name, rotary):
    vectors = load(f"upstream/{name}.npz")
    y, (theta, h, k, v), given = scan_upstream(vectors, rotary)
    near(y.numpy(), vectors["out.y"])
    if "out.h" in vectors:
        near(h.numpy(), vectors["out.h"])
        near(k.numpy()[:, 0], vectors["out.k"])
        near(v.numpy(), vectors["out.v"])
        near(np.exp(1j * theta.numpy()), np.exp(1j * vectors["out.angle"]))
    if "out.state_NP" in vectors:
        near(h.numpy().swapaxes(2, 3), vectors["out.state_NP"])
    y.backward(vectors["dout.y"])
    for key, tensor in given.items():
        near(tensor.grad, vectors[f"grad.{key}"], 1e-4)
