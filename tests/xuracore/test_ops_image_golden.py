"""Convolution, group norm, interpolation, rotary positions and all activations equal published numbers."""

import json
from pathlib import Path

import numpy as np
import pytest

import xuracore as xc
from xuracore import ops

GOLDEN = Path(__file__).parents[1] / "golden"


def load(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as stored:
        arrays = {key: stored[key] for key in stored.files}
    leaves = {
        key.partition(".")[2]: xc.Tensor(array, requires_grad=True)
        for key, array in arrays.items()
        if key.startswith(("in.", "w.")) and array.dtype.kind == "f"
    }
    return arrays, json.loads(str(arrays.pop("meta"))), leaves


def check(arrays, meta, leaves, outputs):
    """Every stored output and gradient is met: outputs at four times the reference's own float32 error."""
    assert {key[4:] for key in arrays if key.startswith("out.")} == set(outputs)
    for name, tensor in outputs.items():
        expected = arrays[f"out.{name}"]
        error = 4 * meta["ref32_maxabs"][name] + 1.2e-7 * max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(tensor.data, expected, rtol=0, atol=error, err_msg=name)
        if f"cot.{name}" in arrays:
            tensor.backward(arrays[f"cot.{name}"])
    for key, expected in arrays.items():
        if key.startswith(("gin.", "gw.")):
            scale = max(1.0, float(np.abs(expected).max()))
            gradient = leaves[key.partition(".")[2]].grad
            np.testing.assert_allclose(gradient, expected, rtol=4e-6, atol=4e-6 * scale, err_msg=key)


def test_convolution():
    arrays, meta, of = load("op_conv2d")
    check(arrays, meta, of, {
        "patch": ops.conv2d(of["x"], of["wp"], of["bp"], stride=4),
        "general": ops.conv2d(of["x"], of["wg"], of["bg"], stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    })  # fmt: skip


def test_patches_are_a_convolution():
    arrays, _, of = load("op_conv2d")
    x = of["x"][:, :, :12, :8]
    weight = of["wp"].reshape(5, -1)
    y = ops.linear(ops.patchify(x, 4), weight, of["bp"])
    expected = arrays["out.patch"].reshape(2, 5, 6).swapaxes(1, 2)
    np.testing.assert_allclose(y.data, expected, atol=1e-5)


def test_group_norm():
    arrays, meta, of = load("op_group_norm")
    y = ops.group_norm(of["x"], of["weight"], of["bias"], groups=meta["config"]["groups"])
    check(arrays, meta, of, {"y": y})


def test_interpolation():
    arrays, meta, of = load("op_interpolate")
    x = of["x"]
    check(arrays, meta, of, {
        "bilinear": ops.interpolate(x, size=(9, 11), mode="bilinear"),
        "bicubic_up": ops.interpolate(x, size=(9, 11), mode="bicubic"),
        "bicubic_down": ops.interpolate(x, size=(4, 3), mode="bicubic"),
        "nearest": ops.interpolate(x, size=(9, 11)),
    })  # fmt: skip


def test_rotary_positions():
    arrays, meta, of = load("op_rope")
    base = meta["config"]["base"]
    check(arrays, meta, of, {name: ops.rope(of[name], arrays["in.pos"], base=base) for name in "qk"})


ACTIVATIONS = {
    "gelu_erf": ops.gelu, "gelu_tanh": lambda x: ops.gelu(x, approximate="tanh"), "silu": ops.silu,
    "softplus": ops.softplus, "sigmoid": ops.sigmoid, "tanh": ops.tanh, "relu": ops.relu,
    "leaky_relu": ops.leaky_relu, "elu": ops.elu, "mish": ops.mish, "hardswish": ops.hardswish,
    "log_sigmoid": ops.log_sigmoid, "erf": ops.erf,
}  # fmt: skip


def test_activations():
    arrays, meta, of = load("op_activations")
    check(arrays, meta, of, {name: ACTIVATIONS[name](of["x"]) for name in meta["config"]["acts"]})


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_a_constant_image_stays_constant_at_any_size(mode):
    x = np.full((1, 1, 5, 4), 3.0)
    for settings in ({}, {"align_corners": True}, {"antialias": True}):
        for size in ((9, 3), 2, 1, (5, 4)):
            np.testing.assert_allclose(ops.interpolate(x, size=size, mode=mode, **settings), 3.0, rtol=1e-12)
