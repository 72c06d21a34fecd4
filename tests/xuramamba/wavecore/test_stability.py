"""Lyapunov exponents of maps whose exponents are known, the monitor, and consolidation."""

import numpy as np
import pytest

from xuracore.errors import ConfigError
from xuramamba.wavecore import CoreModelConfig, CoreState, consolidation, inference_variables, make_core_model
from xuramamba.wavecore.stability import StabilityMonitor, bootstrap_interval, lyapunov, model_exponents


def test_exponents_of_a_linear_map_are_its_logarithms():
    rng = np.random.default_rng(0)
    basis = rng.standard_normal((4, 4))
    matrix = basis @ np.diag([1.2, 0.9, 0.5, 0.1]) @ np.linalg.inv(basis)
    for every in (1, 3):
        found = lyapunov(lambda x, t: x @ matrix.T, np.zeros(4), 400, count=3, every=every, skip=50, rng=rng)
        np.testing.assert_allclose(found, np.log([1.2, 0.9, 0.5]), atol=2e-3)


def test_exponent_of_a_chaotic_map():
    """The logistic map at 4 has λ = ln 2."""
    rng = np.random.default_rng(0)
    found = lyapunov(lambda x, t: 4 * x * (1 - x), np.array([0.3123]), 6000, count=1, skip=100, difference=1e-9, rng=rng)
    assert abs(found[0] - np.log(2)) < 0.02


def test_exponents_of_a_model_have_an_interval_around_them():
    model, variables = make_core_model(0, 5, 2, 2, CoreModelConfig.development())
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((3, 20, 5)), rng.standard_normal((3, 20, 2)), np.ones((3, 20, 1))
    found = model_exponents(model, variables, *inputs, count=2, skip=5)
    assert found.low <= found.largest <= found.high and found.values[0] >= found.values[1]
    assert np.isfinite(found.trajectories).all() and len(found.trajectories) == 3
    low, high = bootstrap_interval(np.array([0.0, 1.0] * 50), 500, rng)
    assert 0.35 < low < 0.5 < high < 0.65


def test_monitor_tells_what_is_wrong():
    model, _ = make_core_model(0, 5, 2, 2, CoreModelConfig.development())
    monitor, state = StabilityMonitor(10, lyapunov_threshold=1e3), model.initial_state(1)
    for _ in range(5):
        monitor.update(state, gradient_norm=1.0)
    assert monitor.stability()["is_stable"] and monitor.stability()["steps"] == 5
    monitor.update(None, gradient_norm=100.0)
    assert monitor.stability()["gradient_spike"] and not monitor.stability()["is_stable"]
    monitor.reset()
    monitor.update(state._replace(s=np.full((1, 64), 10.0)))
    assert monitor.stability()["lyapunov_current"] == 6400 and not monitor.stability()["is_stable"]
    monitor.update(state._replace(s=np.full((1, 64), np.nan)))
    found = monitor.stability()
    assert found["has_nan"] and not found["is_stable"]
    monitor.update(state)
    assert set(monitor.metrics()) == {
        "lyapunov", "state_norms", "cms_utilization", "learning_rate", "steps", "gradient_norm", "gradient_spike",
        "timestamp", "learning_progress"}
    assert monitor.metrics()["cms_utilization"] == [0.0, 0.0]
    with pytest.raises(ConfigError, match="window"):
        StabilityMonitor(1e7)


def filled(model, items, rng):
    c, state = model.config, model.initial_state(2)
    for b in range(2):
        keys = rng.standard_normal((items, c.d_k))
        state.keys[0][b, :items] = keys / np.linalg.norm(keys, axis=1, keepdims=True)
        state.memories[0][b, :items] = rng.standard_normal((items, c.cms_dims[0]))
        state.usage[0][b, :items] = rng.random(items) + 0.1
    return state


def test_consolidation_keeps_a_level_and_fills_the_next():
    model, variables = make_core_model(0, 5, 2, 2, CoreModelConfig.development(d_k=32))
    params, rng = inference_variables(variables)["params"], np.random.default_rng(0)
    state = filled(model, 12, rng)
    after, report = consolidation.validate(model, params, state, 0)
    assert report.items == 12 and report.validated, report
    np.testing.assert_array_equal(after.memories[0], state.memories[0])
    assert (after.usage[1] > 0).sum() == 24 and not state.usage[1].any()
    emptied = consolidation.wipe(after, 0)
    assert not emptied.keys[0].any() and emptied.keys[1].any()


def test_consolidation_merges_what_is_alike_and_can_fail():
    model, variables = make_core_model(0, 5, 2, 2, CoreModelConfig.development(d_k=32))
    params, rng = inference_variables(variables)["params"], np.random.default_rng(0)
    state = filled(model, 12, rng)
    state.keys[0][:, 6:12] = state.keys[0][:, :6]  # pairs of one key
    after = consolidation.consolidate(model, params, state, 0)
    assert (after.usage[1] > 0).sum() == 12
    _, report = consolidation.validate(model, params, state, 0)
    assert not report.validated  # two contents under one key cannot both come back
    _, nothing = consolidation.validate(model, params, model.initial_state(1), 0)
    assert nothing.items == 0 and not nothing.validated
    with pytest.raises(ConfigError, match="slowest"):
        consolidation.consolidate(model, params, state, 1)
    assert isinstance(after, CoreState)
