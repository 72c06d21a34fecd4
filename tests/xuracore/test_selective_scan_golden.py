"""The selective scan equals independent references: outputs, last state and all gradients."""

from pathlib import Path

import numpy as np
import pytest

import xuracore as xc

GOLDEN = Path(__file__).parents[1] / "golden"


def scan(given):
    """Vectors are channel-major, (B, D, L) and (B, N, L) or (B, G, N, L); ours are time-major."""
    order = {3: (0, 2, 1), 4: (0, 3, 1, 2)}
    u, delta, b, c, z = (
        given[name].transpose(*order[given[name].ndim]) for name in ("u", "delta", "B", "C", "z")
    )
    y, last = xc.ops.selective_scan(
        u, delta, given["A"], b, c, given["D"], z, given["delta_bias"], given.get("h0"), delta_softplus=True
    )
    return y.transpose(0, 2, 1), last


NAMES = ["op_selective_scan", "op_selective_scan_h0", "upstream/mamba1_scan_g1", "upstream/mamba1_scan_g2"]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients(name):
    vectors = np.load(GOLDEN / f"{name}.npz", allow_pickle=False)
    names = [key for key in vectors.files if key.startswith(("in.", "w."))]
    given = {key.split(".", 1)[1]: xc.Tensor(vectors[key], requires_grad=True) for key in names}
    y, last = scan(given)
    np.testing.assert_allclose(y.numpy(), vectors["out.y"], atol=5e-6, rtol=1e-5)
    np.testing.assert_allclose(last.numpy(), vectors["out.last_state"], atol=5e-6, rtol=1e-5)
    prefix = "cot" if "cot.y" in vectors.files else "dout"
    total = (y * vectors[f"{prefix}.y"]).sum() + (last * vectors[f"{prefix}.last_state"]).sum()
    total.backward()
    for key in names:
        kind, short = key.split(".", 1)
        expected = vectors[{"in": "gin." if prefix == "cot" else "grad.", "w": "gw."}[kind] + short]
        scale = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(given[short].grad, expected, rtol=0, atol=2e-5 * scale)


def test_complex_outputs_and_gradients():
    """Published B and C are (B, G, N, 2 L), real and imaginary parts in turns along time."""
    vectors = np.load(GOLDEN / "upstream/mamba1_scan_complex.npz", allow_pickle=False)

    def ours(x):
        if np.iscomplexobj(x):
            return np.stack([x.real, x.imag], axis=-1)
        if x.ndim == 4:
            return x.reshape(*x.shape[:3], -1, 2).transpose(0, 3, 1, 2, 4)
        return x.transpose(0, 2, 1) if x.ndim == 3 else x

    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    given = {name: xc.Tensor(np.ascontiguousarray(ours(vectors[f"in.{name}"])), requires_grad=True) for name in names}
    y, _ = xc.ops.selective_scan(*given.values(), delta_softplus=True)
    np.testing.assert_allclose(y.numpy(), ours(vectors["out.y"]), atol=5e-6, rtol=1e-5)
    y.backward(ours(vectors["dout.y"]))
    for name, tensor in given.items():
        expected = ours(vectors[f"grad.{name}"])
        np.testing.assert_allclose(tensor.grad, expected, rtol=0, atol=2e-5 * max(1.0, np.abs(expected).max()))
