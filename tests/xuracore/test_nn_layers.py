"""Laws of the layers over images, sequences and blocks, and of the initialisers."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

import xuracore as xc
from xuracore import nn, ops
from xuracore.errors import ConfigError, DTypeError, ShapeError
from xuracore.nn import init

GOLDEN = Path(__file__).parents[1] / "golden"


def rng(seed=0):
    return np.random.default_rng(seed)


def gradcheck_layer(layer, *shape):
    """The layer's gradients, of its input and of every parameter, are central differences in float64."""
    layer.to_dtype(np.float64)
    owners = [(module, name) for _, module in layer.named_modules() for name, value in list(vars(module).items())
              if isinstance(value, nn.Parameter)]  # fmt: skip
    values = [getattr(module, name).data for module, name in owners]

    def apply(x, *parameters):
        for (module, name), parameter in zip(owners, parameters):
            module.__dict__[name] = parameter
        y = layer(x)
        return y[0] if isinstance(y, tuple) else y

    assert xc.gradcheck(apply, [rng(1).standard_normal(shape), *values])


LAYERS = {
    "Conv1d": (lambda: nn.Conv1d(2, 4, 3, padding=1, stride=2, groups=2, rng=rng()), (2, 2, 5)),
    "Conv2d": (lambda: nn.Conv2d(2, 3, (2, 1), dilation=(1, 2), rng=rng()), (1, 2, 3, 3)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 2, 2, stride=2, groups=2, rng=rng()), (1, 2, 2, 2)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (2, 4, 3)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(2), (3, 2)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(2), (2, 2, 2, 2)),
    "BatchNorm2d after eval": (lambda: nn.BatchNorm2d(2).eval(), (2, 2, 2, 2)),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(4, 2, rng=rng()), (1, 3, 4)),
    "MLP": (lambda: nn.MLP(3, 4, 2, rng=rng()), (2, 3)),
    "GatedMLP": (lambda: nn.GatedMLP(2, 3, rng=rng()), (2, 2)),
    "LSTM": (lambda: nn.LSTM(2, 2, rng=rng()), (1, 3, 2)),
    "GRU": (lambda: nn.GRU(2, 2, rng=rng()), (2, 2, 2)),
    "Sequential": (lambda: nn.Sequential(nn.Conv2d(1, 2, 2, rng=rng()), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(),
                                         nn.Linear(2, 2, rng=rng())), (1, 1, 3, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_gradients(name):
    make, shape = LAYERS[name]
    gradcheck_layer(make(), *shape)


@pytest.mark.parametrize("name", LAYERS)
def test_float32_in_float32_out_and_states_go_round(name):
    make, shape = LAYERS[name]
    layer, other = make(), make()
    for parameter in other.parameters():
        parameter.data[...] = 0
    other.load_state_dict(layer.state_dict())
    x = rng(2).standard_normal(shape).astype(np.float32)
    y, again = layer(x), other(x)
    y, again = (z[0] if isinstance(z, tuple) else z for z in (y, again))
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y.data, again.data)


# ---------------------------------------------------------------------- convolution and norms
def test_a_convolution_of_one_by_one_is_a_linear_layer():
    layer = nn.Conv2d(3, 5, 1, rng=rng())
    x = rng(1).standard_normal((2, 3, 4, 4)).astype(np.float32)
    expected = ops.linear(x.transpose(0, 2, 3, 1), layer.weight.data[:, :, 0, 0], layer.bias.data)
    np.testing.assert_allclose(layer(x).data, expected.transpose(0, 3, 1, 2), atol=1e-6)


def test_blocks_of_any_size_give_the_same_convolution(monkeypatch):
    """Columns are made block by block: of several images, of one, of a few rows."""

    def run():
        x = xc.Tensor(rng(0).standard_normal((5, 2, 6, 5)), requires_grad=True)
        weight = xc.Tensor(rng(1).standard_normal((3, 2, 3, 2)), requires_grad=True)
        y = ops.conv2d(x, weight, stride=(1, 2), padding=1)
        (y * rng(2).standard_normal(y.shape)).sum().backward()
        return y.data, x.grad, weight.grad

    whole = run()
    for size in (1, 2_000, 5_000):
        monkeypatch.setattr(importlib.import_module("xuracore.ops.conv2d"), "BLOCK_BYTES", size)
        for got, expected in zip(run(), whole):
            np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_batch_norm_follows_its_batches_and_then_keeps_to_them():
    layer = nn.BatchNorm2d(2, momentum=0.5)
    x = (3 + 2 * rng().standard_normal((64, 2, 4, 4))).astype(np.float32)
    y = layer(x).data
    np.testing.assert_allclose(y.mean(axis=(0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(y.var(axis=(0, 2, 3)), 1, rtol=1e-3)
    np.testing.assert_allclose(layer.running_mean, x.mean(axis=(0, 2, 3)) / 2, rtol=1e-5)
    np.testing.assert_allclose(layer.running_var, 0.5 + x.var(axis=(0, 2, 3), ddof=1) / 2, rtol=1e-5)
    for _ in range(30):
        layer(x)
    np.testing.assert_allclose(layer.eval()(x).data, y, atol=3e-3)  # the running variance is unbiased
    assert layer.num_batches_tracked == 31 and list(layer.state_dict())[2:] == [
        "running_mean", "running_var", "num_batches_tracked"
    ]  # fmt: skip


# ---------------------------------------------------------------------- attention, recurrence
def test_multihead_attention_equals_published_numbers():
    with np.load(GOLDEN / "op_mha.npz", allow_pickle=False) as stored:
        arrays = {key: stored[key] for key in stored.files}
    config = json.loads(str(arrays["meta"]))["config"]
    layer = nn.MultiheadAttention(config["embed"], config["heads"], rng=rng())
    layer.load_state_dict({key[2:]: value for key, value in arrays.items() if key.startswith("w.")})
    x, memory, ignored = arrays["in.x"], arrays["in.mem"], arrays["in.key_padding_mask"].astype(bool)
    for name, y in {
        "full": layer(x), "causal": layer(x, causal=True), "cross": layer(x, memory),
        "padded": layer(x, mask=~ignored[:, None, None, :]),
    }.items():  # fmt: skip
        np.testing.assert_allclose(y.data, arrays[f"out.{name}"], atol=2e-6, err_msg=name)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_sequence_cut_in_two_is_the_whole(kind):
    layer = kind(3, 4, rng=rng())
    x = rng(1).standard_normal((2, 6, 3)).astype(np.float32)
    whole, end = layer(x)
    first, state = layer(x[:, :2])
    second, last = layer(x[:, 2:], state)
    np.testing.assert_allclose(np.concatenate([first.data, second.data], 1), whole.data, atol=1e-6)
    for a, b in zip(last if kind is nn.LSTM else [last], end if kind is nn.LSTM else [end]):
        np.testing.assert_allclose(a.data, b.data, atol=1e-6)


def test_a_gated_unit_with_closed_gates_keeps_its_state():
    layer = nn.GRU(2, 3, rng=rng())
    for parameter in layer.parameters():
        parameter.data[...] = 0
    layer.bias_ih_l0.data[3:6] = 50.0  # z = 1
    state = rng(1).standard_normal((1, 3)).astype(np.float32)
    y, _ = layer(np.ones((1, 4, 2), np.float32), state)
    np.testing.assert_allclose(y.data, np.repeat(state[:, None], 4, axis=1), rtol=1e-6)


# ---------------------------------------------------------------------- containers
def test_module_dict_names_its_state():
    heads = nn.ModuleDict({"a": nn.Linear(2, 1, rng=rng()), "b": nn.Identity()})
    assert list(heads) == ["a", "b"] and "a" in heads and len(heads) == 2 and heads.keys() == ("a", "b")
    assert [name for name, _ in heads.named_parameters()] == ["a.weight", "a.bias"]
    assert heads["b"](3) == 3 and heads.values()[0] is heads["a"] and dict(heads.items())["b"] is heads["b"]
    with pytest.raises(KeyError):
        heads["c"]
    for name in ("keys", "a.b", "_a", 3):
        with pytest.raises(ConfigError, match="cannot name a module"):
            heads[name] = nn.Identity()
    with pytest.raises(DTypeError, match="holds modules; got int"):
        heads["d"] = 3


def test_sequential_runs_in_order_and_shows_what_is_in_it():
    model = nn.Sequential(nn.Linear(2, 3, rng=rng()), nn.ReLU(), nn.Linear(3, 1, rng=rng()))
    x = rng(1).standard_normal((4, 2)).astype(np.float32)
    np.testing.assert_array_equal(model(x).data, model[2](ops.relu(model[0](x))).data)
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert "  (1): ReLU()  0 parameters" in repr(model).splitlines()


@pytest.mark.parametrize("make, error, message", [
    (lambda: nn.Conv2d(3, 4, 3, groups=2, rng=rng()), ConfigError, "2 groups do not divide 3 and 4"),
    (lambda: nn.GroupNorm(3, 4), ConfigError, "3 groups do not divide 4"),
    (lambda: nn.MultiheadAttention(6, 4, rng=rng()), ConfigError, "4 heads do not divide a width of 6"),
    (lambda: nn.MLP(2, 2, activation="rleu", rng=rng()), ConfigError, "'rleu'; expected one of relu"),
    (lambda: nn.BatchNorm1d(2)(np.ones((1, 2))), ShapeError, "needs two"),
    (lambda: nn.BatchNorm2d(2)(np.ones((4, 2))), ShapeError, "expected 2 channels on axis 1 of 4"),
    (lambda: nn.LSTM(2, 2, rng=rng())(np.ones((1, 0, 2))), ShapeError, "L from 1"),
    (lambda: nn.BatchNorm1d(2, momentum=2), ConfigError, "momentum is 2"),
    (lambda: ops.dropout(np.ones(2), 1.0, rng=rng()), ConfigError, "dropout rate"),
    (lambda: init.gain("rleu"), ConfigError, "leaky_relu"),
    (lambda: init.fans(()), ShapeError, "single number"),
    (lambda: init.orthogonal((3,), rng()), ShapeError, "two axes"),
    (lambda: init.kaiming_normal((3, 2), rng(), mode="in"), ConfigError, "fan_in"),
])  # fmt: skip
def test_nonsense_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


# ---------------------------------------------------------------------- initialisers
SHAPE, FAN_IN, FAN_OUT = (64, 16, 3, 3), 16 * 9, 64 * 9


@pytest.mark.parametrize("draw, std", [
    (lambda g: init.xavier_uniform(SHAPE, g), (2 / (FAN_IN + FAN_OUT)) ** 0.5),
    (lambda g: init.xavier_normal(SHAPE, g, gain=2.0), 2 * (2 / (FAN_IN + FAN_OUT)) ** 0.5),
    (lambda g: init.kaiming_uniform(SHAPE, g), (2 / FAN_IN) ** 0.5),
    (lambda g: init.kaiming_normal(SHAPE, g, slope=1.0, mode="fan_out"), (1 / FAN_OUT) ** 0.5),
    (lambda g: init.uniform(SHAPE, g, 0.3), 0.3 / 3**0.5),
    (lambda g: init.normal(SHAPE, g, 0.3), 0.3),
    (lambda g: init.truncated_normal(SHAPE, g, 0.3), 0.3 * 0.8796),
])  # fmt: skip
def test_spread_of_random_weights(draw, std):
    """9216 draws: mean within 4 standard errors of 0, deviation within 4 of what it should be."""
    x = draw(rng(7))
    assert x.dtype == np.float32 and x.shape == SHAPE
    assert abs(x.mean()) < 4 * std / x.size**0.5
    assert abs(x.std() / std - 1) < 4 / (2 * x.size) ** 0.5 + 1e-3
    np.testing.assert_array_equal(x, draw(rng(7)))


def test_uniform_weights_reach_their_bound_and_truncated_ones_stop_at_it():
    bound = (6 / FAN_IN) ** 0.5
    x = np.abs(init.kaiming_uniform(SHAPE, rng()))
    assert 0.99 * bound < x.max() <= bound * (1 + 1e-6)
    assert np.abs(init.truncated_normal(SHAPE, rng(), std=0.5, limit=1.0)).max() <= 0.5


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (3, 2, 2)])
def test_orthogonal_rows_or_columns(shape):
    x = init.orthogonal(shape, rng(), gain=2.0, dtype=np.float64)
    matrix = x.reshape(shape[0], -1)
    square = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    np.testing.assert_allclose(square, 4 * np.eye(len(square)), atol=1e-12)


def test_the_size_of_a_signal_survives_ten_layers():
    """He et al. 2015: with √(2/fan_in) a deep chain of ReLU layers neither fades nor explodes."""
    g, x = rng(3), rng(4).standard_normal((64, 256))
    for _ in range(10):
        x = np.maximum(x @ init.kaiming_normal((256, 256), g).T, 0)
    assert 0.3 < np.sqrt((x * x).mean() * 2) < 3


def test_fans():
    assert init.fans((5, 3)) == (3, 5) and init.fans(SHAPE) == (FAN_IN, FAN_OUT) and init.fans((4,)) == (4, 4)
    assert init.gain("leaky_relu", 1.0) == 1 and init.gain("relu") == 2**0.5
