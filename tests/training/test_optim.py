"""Every optimizer walks the path of its golden run; clipping, averages and groups keep their laws."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from training import optim, schedules
from xuracore import nn
from xuracore.errors import ConfigError, FormatError
from xuracore.nn import Parameter

GOLDEN = Path(__file__).parents[1] / "golden"

CLASSES = {
    "adafactor": optim.Adafactor,
    "adagrad": optim.Adagrad,
    "adam": optim.Adam,
    "adam_l2_amsgrad": optim.Adam,
    "adamw": optim.AdamW,
    "adamw_cosine": optim.AdamW,
    "lion": optim.Lion,
    "rmsprop": optim.RMSprop,
    "rmsprop_centered_momentum": optim.RMSprop,
    "sgd": optim.SGD,
    "sgd_momentum": optim.SGD,
    "sgd_nesterov": optim.SGD,
}


def read(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as stored:
        arrays = {key: stored[key] for key in stored.files}
    return arrays, json.loads(str(arrays.pop("meta")))


def bowl(arrays, parameters):
    """Gradient of Σ ½ curvature (p - target)², set on the parameters."""
    for name, parameter in parameters.items():
        parameter.grad = arrays[f"in.curvature.{name}"] * (parameter.data - arrays[f"in.target.{name}"])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", CLASSES)
def test_optimizer_equals_its_golden_run(name, dtype):
    arrays, meta = read(f"optim_{name}")
    parameters = {key: Parameter(arrays[f"in.init.{key}"].astype(dtype)) for key in ("W", "b")}
    optimizer = CLASSES[name](parameters.items(), **meta["config"])
    for step, rate in enumerate(arrays["out.lr"].tolist()):
        bowl(arrays, parameters)
        optimizer.step(rate)
        for key, parameter in parameters.items():
            assert parameter.dtype == dtype
            tolerance = 4 * meta["ref32_maxabs"][key] + 2e-7
            np.testing.assert_allclose(parameter.data, arrays[f"out.{key}"][step], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", CLASSES)
def test_state_taken_and_given_back_continues_bit_for_bit(name):
    arrays, meta = read(f"optim_{name}")

    def run(steps, start=None, state=None):
        initial = start or {key: arrays[f"in.init.{key}"] for key in ("W", "b")}
        parameters = {key: Parameter(value.copy()) for key, value in initial.items()}
        optimizer = CLASSES[name](parameters.items(), **meta["config"])
        if state is not None:
            optimizer.load_state_dict(state)
        for _ in range(steps):
            bowl(arrays, parameters)
            optimizer.step()
        values = {key: p.data.copy() for key, p in parameters.items()}
        return values, {key: a.copy() for key, a in optimizer.state_dict().items()}

    straight, end = run(10)
    resumed, end_resumed = run(4, *run(6))
    for key in straight:
        np.testing.assert_array_equal(straight[key], resumed[key])
    for key in end:
        np.testing.assert_array_equal(end[key], end_resumed[key])


def test_a_state_that_does_not_fit_changes_nothing():
    optimizer = optim.AdamW([Parameter(np.ones(3, np.float32))])
    state = optimizer.state_dict()
    with pytest.raises(FormatError, match="missing mean.0"):
        optimizer.load_state_dict({k: v for k, v in state.items() if k != "mean.0"})
    with pytest.raises(FormatError, match="shape"):
        optimizer.load_state_dict({**state, "mean.0": np.ones(4, np.float32)})


def test_parameters_without_gradient_stay():
    moved, still = Parameter(np.ones(3, np.float32)), Parameter(np.ones(3, np.float32))
    optimizer = optim.AdamW([moved, still], lr=0.1)
    moved.grad = np.ones(3, np.float32)
    optimizer.step()
    assert (moved.data < 1).all() and (still.data == 1).all()


class Model(nn.Module):
    def __init__(self):
        rng = np.random.default_rng(0)
        self.linear, self.norm = nn.Linear(3, 4, rng=rng), nn.LayerNorm(4)
        self.y_encoder = nn.Linear(4, 4, rng=rng)
        self.A_log, self.log_scale = Parameter(np.ones((4, 2), np.float32)), Parameter(np.float32(1.0))


def test_only_matrices_of_weights_decay():
    groups = optim.parameter_groups(Model(), weight_decay=0.1, lr_scales={"y_encoder": 0.5})
    found = {name: (g.lr_scale, g.weight_decay) for g in groups for name in g.names}
    assert found == {
        "linear.weight": (1.0, 0.1),
        "linear.bias": (1.0, 0.0),
        "norm.weight": (1.0, 0.0),
        "norm.bias": (1.0, 0.0),
        "y_encoder.weight": (0.5, 0.1),
        "y_encoder.bias": (0.5, 0.0),
        "A_log": (1.0, 0.0),
        "log_scale": (1.0, 0.0),
    }


def test_groups_leave_out_what_is_frozen_or_has_rate_zero():
    model = Model()
    model.linear.requires_grad_(False)
    names = [name for g in optim.parameter_groups(model, lr_scales={"y_encoder": 0}) for name in g.names]
    assert set(names) == {"norm.weight", "norm.bias", "A_log", "log_scale"}
    with pytest.raises(ConfigError, match="y_encodr"):
        optim.parameter_groups(model, lr_scales={"y_encodr": 0.05})


def test_lr_scale_multiplies_the_rate():
    slow, fast = (Parameter(np.zeros(2, np.float32)) for _ in range(2))
    groups = [
        optim.ParameterGroup(("slow",), (slow,), lr_scale=0.1),
        optim.ParameterGroup(("fast",), (fast,)),
    ]
    optimizer = optim.SGD(groups, lr=1.0)
    slow.grad = fast.grad = np.ones(2, np.float32)
    optimizer.step(0.5)
    np.testing.assert_allclose(slow.data, -0.05, rtol=1e-6)
    np.testing.assert_allclose(fast.data, -0.5, rtol=1e-6)


@pytest.mark.parametrize("case", ["clipped", "unclipped"])
def test_clipping_equals_the_golden_run(case):
    arrays, meta = read("op_clip_grad_norm")
    parameters = {key: Parameter(np.zeros_like(arrays[f"in.{key}"])) for key in ("g0", "g1", "g2")}
    for key, parameter in parameters.items():
        parameter.grad = arrays[f"in.{key}"]
    norm = optim.clip_grad_norm(parameters.values(), meta["config"]["max_norm"][case])
    assert abs(norm - arrays[f"out.{case}.total_norm"]) < 1e-5
    for key, parameter in parameters.items():
        np.testing.assert_allclose(parameter.grad, arrays[f"out.{case}.{key}"], rtol=1e-6)


def test_clipping_reports_a_gradient_that_is_not_finite():
    parameter = Parameter(np.zeros(2, np.float32))
    parameter.grad = np.array([np.nan, 1], np.float32)
    assert math.isnan(optim.clip_grad_norm([parameter], 1.0))


def test_norm_of_many_small_gradients_is_exact():
    """In float32 a sum of ten million equal squares would stop growing."""
    parameter = Parameter(np.zeros(3_000_000, np.float32))
    parameter.grad = np.full(3_000_000, np.float32(0.1))
    assert abs(optim.grad_norm([parameter]) - float(np.float32(0.1)) * math.sqrt(3e6)) < 1e-9


def test_average_of_a_constant_is_the_constant_and_comes_off_again():
    parameter = Parameter(np.zeros(2, np.float32))
    average = optim.ExponentialMovingAverage([("p", parameter)], decay=0.9)
    parameter.data[...] = 4
    for _ in range(300):
        average.update()
    parameter.data[...] = 7
    with average.applied():
        np.testing.assert_allclose(parameter.data, 4, rtol=1e-4)
    assert (parameter.data == 7).all()


@pytest.mark.parametrize("name", ["lr_cosine_w0_t10", "lr_cosine_w4_t30"])
def test_cosine_equals_its_golden_run(name):
    arrays, meta = read(name)
    config = meta["config"]
    rate = schedules.cosine(config["base_lr"], config["total"], config["warmup"], cycles=config["num_cycles"])
    found = [rate(step) for step in range(len(arrays["out.lr"]))]
    np.testing.assert_allclose(found, arrays["out.lr"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", schedules.BY_NAME)
def test_schedules_rise_hold_and_end_where_they_say(name):
    rate = schedules.by_name(name, 2.0, 100, 10)
    warming = [rate(step) for step in range(11)]
    np.testing.assert_allclose(warming, np.linspace(0, 2, 11))
    after = [rate(step) for step in range(10, 101)]
    assert all(a >= b >= 0 for a, b in zip(after, after[1:]))
    assert after[-1] == (2.0 if name == "constant" else 0.0)


def test_wsd_holds_until_its_cooldown():
    for shape in ("linear", "sqrt"):
        rate = schedules.warmup_stable_decay(1.0, 100, 10, decay=20, final=0.1, shape=shape)
        assert [rate(step) for step in (10, 50, 80)] == [1.0, 1.0, 1.0]
        assert rate(81) < 1 and abs(rate(100) - 0.1) < 1e-12
    assert abs(schedules.wsd(1.0, 100, decay=20)(85) - 0.5) < 1e-12


@pytest.mark.parametrize("bad", [
    lambda: schedules.cosine(1.0, 10, warmup=11),
    lambda: schedules.by_name("cosin", 1.0, 10),
    lambda: schedules.wsd(1.0, 10, warmup=8, decay=5),
    lambda: optim.SGD([Parameter(np.ones(1))], lr=0.1, nesterov=True),
    lambda: optim.AdamW([Parameter(np.ones(1))], betas=(0.9, 1.0)),
    lambda: optim.AdamW([]),
    lambda: optim.AdamW([Parameter(np.ones(1))] * 1, lr=-1),
])  # fmt: skip
def test_nonsense_is_refused(bad):
    with pytest.raises(ConfigError):
        bad()
