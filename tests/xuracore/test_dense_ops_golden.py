"""Activations, norms, convolution and losses equal the published implementations' numbers."""

import json
from pathlib import Path

import numpy as np
import pytest

import xuracore as xc
from xuracore import ops

GOLDEN = Path(__file__).parents[1] / "golden"


class Golden:
    """A golden file: ``file["in.x"]``, and comparison within four times the reference's own error."""

    def __init__(self, name):
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as stored:
            self.arrays = {key: stored[key] for key in stored.files}
        self.meta = json.loads(str(self.arrays.pop("meta")))

    def __getitem__(self, key):
        return self.arrays[key]

    def leaf(self, key):
        return xc.Tensor(self[key], requires_grad=True)

    def check(self, name, tensor):
        error = self.meta["ref32_maxabs"][name]
        scale = max(1.0, float(np.max(np.abs(self[f"out.{name}"]))))
        np.testing.assert_allclose(tensor.data, self[f"out.{name}"], rtol=0, atol=4 * error + 1.2e-7 * scale)


def close(gradient, expected, tolerance=2e-6):
    np.testing.assert_allclose(gradient, expected, rtol=tolerance,
                               atol=tolerance * max(1.0, float(np.max(np.abs(expected)))))


ACTIVATIONS = {
    "gelu_erf": ops.gelu,
    "gelu_tanh": lambda x: ops.gelu(x, approximate="tanh"),
    "silu": ops.silu,
    "softplus": ops.softplus,
    "sigmoid": ops.sigmoid,
    "tanh": ops.tanh,
    "relu": ops.relu,
    "erf": ops.erf,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_values(name):
    golden = Golden("op_activations")
    golden.check(name, ACTIVATIONS[name](golden.leaf("in.x")))


@pytest.mark.parametrize("name", ["silu", "softplus", "gelu_erf", "gelu_tanh"])
def test_activation_gradients(name):
    golden = Golden(f"op_{name}")
    x = golden.leaf("in.x")
    y = ACTIVATIONS[name](x)
    golden.check("y", y)
    y.backward(golden["cot.y"])
    close(x.grad, golden["gin.x"])


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_softmax_values(name):
    golden = Golden("op_softmax")
    golden.check(name, getattr(ops, name)(golden.leaf("in.x"), axis=-1))


def test_softmax_gradients():
    golden = Golden("op_softmax")
    x = golden.leaf("in.x")
    for name in ("softmax", "log_softmax", "logsumexp"):
        getattr(ops, name)(x, axis=-1).backward(golden[f"cot.{name}"])
    close(x.grad, golden["gin.x"])


def test_layer_norm():
    golden = Golden("op_layer_norm")
    x, weight, bias = golden.leaf("in.x"), golden.leaf("w.weight"), golden.leaf("w.bias")
    y = ops.layer_norm(x, weight, bias, eps=golden.meta["config"]["eps"])
    golden.check("y", y)
    y.backward(golden["cot.y"])
    for leaf, key in ((x, "gin.x"), (weight, "gw.weight"), (bias, "gw.bias")):
        close(leaf.grad, golden[key])


def test_rms_norm():
    golden = Golden("op_rms_norm")
    x, weight = golden.leaf("in.x"), golden.leaf("w.weight")
    y = ops.rms_norm(x, weight, eps=golden.meta["config"]["eps"])
    golden.check("y", y)
    y.backward(golden["cot.y"])
    close(x.grad, golden["gin.x"])
    close(weight.grad, golden["gw.weight"])


def test_causal_convolution():
    golden = Golden("op_conv1d_causal_dw")  # stored channels first
    x, weight, bias = golden.leaf("in.x"), golden.leaf("w.weight"), golden.leaf("w.bias")
    for name, silu in (("y", False), ("y_silu", True)):
        y, _ = ops.causal_conv1d(ops.swapaxes(x, 1, 2), weight, bias, silu=silu)
        y = ops.swapaxes(y, 1, 2)
        golden.check(name, y)
        y.backward(golden[f"cot.{name}"])
    for leaf, key in ((x, "gin.x"), (weight, "gw.weight"), (bias, "gw.bias")):
        close(leaf.grad, golden[key])


def test_cross_entropy():
    golden = Golden("op_cross_entropy")
    logits, config = golden.leaf("in.logits"), golden.meta["config"]
    for name in ("plain_mean", "smooth_mean", "smooth_sum", "smooth_none"):
        kind, reduction = name.split("_")
        loss = ops.cross_entropy(
            logits, golden["in.target"], ignore_index=config["ignore_index"], reduction=reduction,
            label_smoothing=config["label_smoothing"] if kind == "smooth" else 0.0,
        )
        golden.check(name, loss)
        loss.backward(golden[f"cot.{name}"])
    close(logits.grad, golden["gin.logits"])


def test_elementwise_losses():
    golden = Golden("op_losses")
    prediction, target = golden.leaf("in.pred"), golden.leaf("in.target")
    logits = golden.leaf("in.prob_logits")
    losses = {
        "mse": ops.mse_loss(prediction, target),
        "l1": ops.l1_loss(prediction, target),
        "smooth_l1_b0.5": ops.smooth_l1_loss(prediction, target, beta=0.5),
        "huber_d0.7": ops.huber_loss(prediction, target, delta=0.7),
        "bce_logits": ops.bce_with_logits(logits, golden["in.labels01"]),
        "cosine": ops.cosine_loss(prediction, target),
    }
    for name, loss in losses.items():
        golden.check(name, loss)
        loss.backward(golden[f"cot.{name}"])
    close(prediction.grad, golden["gin.pred"])
    close(target.grad, golden["gin.target"])
    close(logits.grad, golden["gin.prob_logits"])


@pytest.mark.parametrize("form", ["paired", "multi_positive"])
def test_info_nce(form):
    """With all targets distinct, the multi-positive form is the paired one."""
    golden = Golden("op_infonce")
    a, b, scale = golden.leaf("in.a"), golden.leaf("in.b"), golden.leaf("w.logit_scale")
    p, q = ops.l2_normalize(a), ops.l2_normalize(b)
    if form == "paired":
        loss = ops.info_nce(p, q, scale)
    else:
        loss = ops.multi_positive_info_nce(p, q, np.arange(len(b.data)), scale)
    golden.check("loss", loss)
    loss.backward()
    for leaf, key in ((a, "gin.a"), (b, "gin.b"), (scale, "gw.logit_scale")):
        close(leaf.grad, golden[key], 5e-6)
