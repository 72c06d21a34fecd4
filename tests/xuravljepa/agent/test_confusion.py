"""The laws of the monitor: probabilities, calibration, and finite features whatever it is shown."""

import numpy as np
import pytest

import xuracore as xc
from xuracore.errors import ConfigError, ShapeError
from xuravljepa.agent.confusion import (
    NUMBERS, UNCHARTED, ConfusionMonitor, Familiarity, MonitorConfig, foreign_words, monitor_features, views, words_of,
)

CONFIG = MonitorConfig(read_dim=5, vision_dim=4, hidden=8)
WIDTH = 5 + len(NUMBERS)


def features(count=6, seed=0, **given):
    rng = np.random.default_rng(seed)
    values = {
        "pooled": rng.standard_normal((count, 5)).astype(np.float32),
        "cosines": rng.uniform(-1, 1, (count, 7)).astype(np.float32),
        "scale": 14.0,
        "gate": np.full(count, 0.5),
        "strangeness": rng.standard_normal((count, 3)),
    }
    return monitor_features(**{**values, **given})


# ---------------------------------------------------------------------- probabilities
def test_probabilities_are_probabilities():
    monitor = ConfusionMonitor(CONFIG)
    for scale in (0, 1, 1e3, 1e30):
        p = monitor.p_wrong(features(50) * np.float32(scale))
        assert p.shape == (50,) and ((p >= 0) & (p <= 1)).all()
    monitor.temperature[...] = 1e-3
    assert np.isfinite(monitor.p_wrong(features(50))).all()


def test_what_is_not_a_number_is_wrong():
    broken = features(3)
    broken[1, 2] = np.nan
    broken[2, 0] = np.inf
    p = ConfusionMonitor(CONFIG).p_wrong(broken)
    assert p[1] == 1 and np.isfinite(p).all() and p[0] < 1


def test_the_probability_is_the_logistic_function_of_the_cooled_logit():
    monitor, x = ConfusionMonitor(CONFIG), features()
    monitor.temperature[...], monitor.offset[...] = 2.5, 0.3
    z = monitor(x).data / 2.5 + 0.3
    np.testing.assert_allclose(monitor.p_wrong(x), 1 / (1 + np.exp(-z)), rtol=1e-6)
    assert not monitor(x).detach().requires_grad and xc.is_grad_enabled()


def test_features_are_scaled_to_what_was_seen():
    monitor, x = ConfusionMonitor(CONFIG), features(200) * 7 + 3
    monitor.fit_scale(x)
    scaled = (x - monitor.feature_mean) / monitor.feature_std
    spread = x.std(axis=0)
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(scaled.std(axis=0)[spread > 1], 1, atol=1e-2)


def test_a_new_monitor_ranks_as_the_agreement_of_views_does():
    monitor, x = ConfusionMonitor(CONFIG), features(50)
    monitor.fit_scale(x)
    np.testing.assert_array_equal(monitor(x).data, x[:, 5])


def test_left_out_units_count_for_nothing():
    monitor, x = ConfusionMonitor(CONFIG), features(4)
    monitor.output.weight.data[:] = 1
    none = monitor(x, np.zeros((4, 8), np.float32)).data
    np.testing.assert_allclose(none, x[:, 5] + monitor.output.bias.data, rtol=1e-6)
    assert np.abs(none - monitor(x, np.ones((4, 8), np.float32)).data).min() > 1e-4


def test_it_learns_which_answers_are_wrong():
    """From the pooled features, where the softmax says nothing."""
    rng = np.random.default_rng(0)
    wrong = (rng.random(200) < 0.3).astype(np.float32)
    pooled = rng.standard_normal((200, 5)).astype(np.float32)
    pooled[:, 0] = 3 * wrong - 1.5
    x = features(200, pooled=pooled)
    monitor = ConfusionMonitor(CONFIG)
    monitor.fit_scale(x)
    for _ in range(200):
        xc.ops.bce_with_logits(monitor(x), wrong).backward()
        for parameter in monitor.parameters():
            parameter.data -= 0.5 * parameter.grad
            parameter.grad = None
    p = monitor.p_wrong(x)
    assert p[wrong == 1].min() > p[wrong == 0].max()


# ---------------------------------------------------------------------- calibration
@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
def test_calibration_finds_the_temperature_of_overconfident_logits(temperature):
    rng = np.random.default_rng(1)
    honest = rng.standard_normal(40_000) * 2
    wrong = (rng.random(40_000) < 1 / (1 + np.exp(-honest))).astype(int)
    monitor = ConfusionMonitor(CONFIG)
    monitor.calibrate((honest - 1.5) * temperature, wrong)
    assert float(monitor.temperature) == pytest.approx(temperature, rel=0.03)
    assert float(monitor.offset) == pytest.approx(1.5, abs=0.05)
    assert monitor.state_dict()["temperature"].shape == ()


def test_calibration_stays_within_bounds_and_asks_for_labels():
    monitor = ConfusionMonitor(CONFIG)
    monitor.calibrate(np.array([-1.0, 1.0]), np.array([0, 1]))  # separable: no temperature is low enough
    assert float(monitor.temperature) == pytest.approx(np.exp(-3), rel=1e-3)
    monitor.calibrate(np.array([-1.0, 1.0]), np.array([1, 0]))
    assert float(monitor.temperature) == pytest.approx(np.exp(3), rel=1e-3)
    for logits, wrong in (([], []), ([1.0, 2.0], [1]), ([[1.0]], [[1]])):
        with pytest.raises(ShapeError, match="a label for each logit"):
            monitor.calibrate(logits, wrong)


# ---------------------------------------------------------------------- features
def test_the_numbers_are_what_they_are_called():
    cosines = np.array([[0.9, 0.4, 0.7], [0.5, 0.5, 0.5]])
    gate, strangeness = np.array([0.25, 0.75]), np.arange(6.0).reshape(2, 3)
    x = monitor_features(np.zeros((2, 5)), cosines, 10.0, gate, strangeness, 2, np.array([0.1, 0.2]))
    assert x.shape == (2, WIDTH) and x.dtype == np.float32
    moved = [np.array([[0.2, 0.9, 0.1], [0.5, 0.5, 0.5]]), np.array([[0.9, 0.4, 0.7], [0.1, 0.5, 0.6]])]
    several = monitor_features(np.zeros((2, 5)), cosines, 10.0, gate, strangeness, 2, np.array([0.1, 0.2]), moved)
    named = dict(zip(NUMBERS, x[:, 5:].T))
    views_named = dict(zip(NUMBERS, several[:, 5:].T))
    np.testing.assert_allclose(named["top cosine"], [0.9, 0.5])
    np.testing.assert_allclose(named["margin"], [0.2, 0], atol=1e-7)
    p = np.exp(10 * cosines) / np.exp(10 * cosines).sum(axis=1, keepdims=True)
    each = [np.exp(10 * c) / np.exp(10 * c).sum(axis=1, keepdims=True) for c in (cosines, *moved)]
    mean = sum(each) / 3

    def entropy(p):
        return -(p * np.log(p)).sum(axis=1)

    np.testing.assert_allclose(named["top probability"], np.log(1 / p.max(axis=1) - 1), rtol=1e-5)
    np.testing.assert_array_equal(named["agreement"], named["top probability"])
    np.testing.assert_allclose(views_named["agreement"], np.log(1 / mean[:, 0] - 1), rtol=1e-5)
    np.testing.assert_array_equal(views_named["top probability"], named["top probability"])
    np.testing.assert_allclose(named["entropy"], np.log(entropy(p)), rtol=1e-4)
    np.testing.assert_allclose(views_named["entropy over views"], np.log(entropy(mean)), rtol=1e-4)
    apart = entropy(mean) - sum(map(entropy, each)) / 3
    np.testing.assert_allclose(views_named["spread of views"], np.log(apart + 1e-6), rtol=1e-3)
    np.testing.assert_allclose(named["spread of views"], np.log(1e-6), rtol=1e-3)
    np.testing.assert_allclose(named["gate"], [0.25, 0.75])
    np.testing.assert_allclose(named["strangeness of [CLS]"], [0, 3])
    np.testing.assert_allclose(named["greatest strangeness of a patch"], [2, 5])
    np.testing.assert_allclose(named["depth"], 2)
    np.testing.assert_allclose(named["state change"], [0.1, 0.2])


@pytest.mark.parametrize(
    "given",
    [
        {"scale": 1e4},
        {"scale": 0.0},
        {"cosines": np.ones((6, 7))},
        {"cosines": np.full((6, 1), -1.0)},
        {"cosines": np.concatenate([np.ones((6, 1)), -np.ones((6, 500))], axis=1)},
        {"change": np.inf},
        {"change": np.full(6, 1e300)},
        {"strangeness": np.full((6, 3), 1e12)},
        {"depth": 10**9},
    ],
)
def test_features_are_finite_on_extreme_input(given):
    x = features(**given)
    assert np.isfinite(x).all() and x.dtype == np.float32
    assert np.isfinite(ConfusionMonitor(CONFIG).p_wrong(x)).all()


def test_without_answers_there_is_nothing_to_look_at():
    with pytest.raises(ShapeError, match="no known answers"):
        features(cosines=np.zeros((6, 0)))


# ---------------------------------------------------------------------- views
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 2, 3, 8, 8)], ids=["picture", "clip"])
def test_views_are_the_picture_and_the_picture_moved(shape):
    pixels = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = views(pixels, 2)
    assert found.shape == (shape[0], 3, *shape[1:])
    np.testing.assert_array_equal(found[:, 0], pixels)
    np.testing.assert_array_equal(found[:, 1, ..., :-2, :-2], pixels[..., 2:, 2:])
    np.testing.assert_array_equal(found[:, 2, ..., 2:, 2:], pixels[..., :-2, :-2])
    np.testing.assert_array_equal(found[:, 1, ..., -1, -1], pixels[..., -1, -1])
    np.testing.assert_array_equal(views(pixels, 0), pixels[:, None])


# ---------------------------------------------------------------------- familiarity
def test_pictures_like_those_seen_are_familiar_and_others_strange():
    rng = np.random.default_rng(0)
    familiarity = Familiarity(4)
    familiarity.fit((rng.standard_normal((500, 1 + 6, 4)) * 3 + 5).astype(np.float32))
    usual = familiarity((rng.standard_normal((50, 7, 4)) * 3 + 5).astype(np.float32))
    assert usual.shape == (50, 3) and abs(usual[:, 1].mean()) < 0.3
    strange = (rng.standard_normal((50, 7, 4)) * 3 + 5).astype(np.float32)
    strange[:, 4] += 30  # one patch
    found = familiarity(strange)
    assert found[:, 2].min() > usual[:, 2].max()
    np.testing.assert_allclose(found[:, 0].mean(), usual[:, 0].mean(), atol=0.5)


def test_strangeness_is_finite_for_constant_and_for_enormous_tokens():
    familiarity = Familiarity(4)
    familiarity.fit(np.zeros((3, 5, 4), np.float32))  # no spread at all
    for value in (0.0, 1.0, 1e38, -1e38):
        assert np.isfinite(familiarity(np.full((2, 5, 4), value, np.float32))).all()


def test_what_was_fitted_is_part_of_the_state():
    monitor = ConfusionMonitor(CONFIG)
    monitor.familiarity.fit(np.random.default_rng(0).standard_normal((9, 5, 4)).astype(np.float32))
    monitor.fit_scale(features(30))
    monitor.temperature[...] = 3
    other = ConfusionMonitor(CONFIG, rng=np.random.default_rng(9))
    other.load_state_dict(monitor.state_dict())
    np.testing.assert_array_equal(other.p_wrong(features()), monitor.p_wrong(features()))
    visual = np.random.default_rng(2).standard_normal((2, 5, 4)).astype(np.float32)
    np.testing.assert_array_equal(other.familiarity(visual), monitor.familiarity(visual))


def test_sizes_are_positive():
    for wrong, message in (({"hidden": 0}, "hidden is 0"), ({"shift": -1}, "shift is -1")):
        with pytest.raises(ConfigError, match=message):
            MonitorConfig(**wrong)


def test_a_picture_beyond_all_that_was_calibrated_is_never_answered_with_confidence():
    monitor = ConfusionMonitor(MonitorConfig(read_dim=4, vision_dim=4, hidden=4))
    features = np.random.default_rng(0).standard_normal((50, 4 + len(NUMBERS))).astype(np.float32)
    monitor.output.bias.data[:] = -5  # sure of everything
    monitor.trust.data[:] = 0
    monitor.fit_limit(features)
    assert (monitor.p_wrong(features) < UNCHARTED).all()
    features[7, 4 + NUMBERS.index("mean strangeness of patches")] += 100
    p = monitor.p_wrong(features)
    assert p[7] >= UNCHARTED and (np.delete(p, 7) < UNCHARTED).all()


def test_words_of_questions_are_known_or_foreign():
    known = words_of(["What shape is the red one?", "how many circles"])
    assert known == ("circles", "how", "is", "many", "one", "red", "shape", "the", "what")
    assert foreign_words("what SHAPE is the 2 red one", known) == []
    assert foreign_words("what does the red one weigh in Köln?", known) == ["does", "in", "köln", "weigh"]
    assert foreign_words("anything", ()) == []  # of heads that do not know what was taught
