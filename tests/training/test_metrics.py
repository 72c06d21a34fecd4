"""Metrics against closed forms, definitions written out, and what no measure may depend on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training import metrics
from xuracore.errors import ConfigError, ShapeError

samples = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=30)


def split(pairs):
    score, label = np.array(pairs, dtype=float).T
    return score / 6, label


def test_auroc_of_every_pair():
    rng = np.random.default_rng(0)
    score, label = rng.integers(0, 5, 60), rng.random(60) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in score[label] for b in score[~label]]
    assert abs(metrics.auroc(score, label) - np.mean(pairs)) < 1e-12


@given(samples)
def test_auroc_turns_around_with_the_score(pairs):
    score, label = split(pairs)
    forward, back = metrics.auroc(score, label), metrics.auroc(-score, label)
    if len(set(label)) == 2:
        assert abs(forward + back - 1) < 1e-12
        assert abs(metrics.auroc(np.exp(5 * score), label) - forward) < 1e-12
    else:
        assert np.isnan(forward)


def test_auroc_and_precision_of_known_rankings():
    assert metrics.auroc([1, 2, 3, 4], [0, 0, 1, 1]) == 1
    assert metrics.auroc([0, 0, 0, 0], [0, 1, 0, 1]) == 0.5
    assert metrics.average_precision([1, 2, 3, 4], [0, 0, 1, 1]) == 1
    assert abs(metrics.average_precision([4, 3, 2, 1], [0, 1, 0, 1]) - (1 / 2 + 2 / 4) / 2) < 1e-12
    assert metrics.average_precision(np.zeros(8), [1, 0, 0, 0, 1, 0, 0, 0]) == 0.25


@given(samples, st.randoms())
def test_order_of_samples_never_matters(pairs, random):
    shuffled = list(pairs)
    random.shuffle(shuffled)
    for measure in (
        metrics.auroc, metrics.average_precision, metrics.aurc, metrics.augrc, metrics.brier_score,
        metrics.expected_calibration_error,
        lambda c, y: metrics.expected_calibration_error(c, y, equal_mass=True),
        lambda c, y: metrics.coverage_at_risk(c, y, 0.3),
    ):  # fmt: skip
        np.testing.assert_allclose(measure(*split(shuffled)), measure(*split(pairs)), rtol=1e-9, atol=1e-12)


def test_calibration_error_of_known_gaps():
    confidence = np.repeat([0.25, 0.75], 8)
    right = np.concatenate([np.arange(8) < 2, np.arange(8) < 4])
    for equal_mass in (False, True):
        assert abs(metrics.expected_calibration_error(confidence, right, 10, equal_mass) - 0.125) < 1e-12
    assert metrics.expected_calibration_error(np.ones(5), np.ones(5)) == 0
    assert metrics.expected_calibration_error(np.zeros(5), np.zeros(5)) == 0


def test_calibrated_probabilities_have_little_error():
    rng = np.random.default_rng(0)
    p = rng.random(40_000)
    y = rng.random(40_000) < p
    for equal_mass in (False, True):
        assert metrics.expected_calibration_error(p, y, equal_mass=equal_mass) < 0.012
    assert abs(metrics.brier_score(p, y) - 1 / 6) < 0.01  # E p(1-p) for uniform p
    assert abs(metrics.negative_log_likelihood(p, y) - 0.5) < 0.02  # E of the entropy


def test_two_classes_are_the_event_twice():
    p, y = np.array([0.2, 0.7, 0.9]), np.array([0, 1, 0])
    both = np.stack([1 - p, p], axis=1)
    assert abs(metrics.brier_score(both, y) - 2 * metrics.brier_score(p, y)) < 1e-12
    assert abs(metrics.negative_log_likelihood(both, y) - metrics.negative_log_likelihood(p, y)) < 1e-12
    assert metrics.negative_log_likelihood([0.0], [1]) == pytest.approx(-np.log(1e-12))


def test_risk_and_coverage_of_known_orders():
    coverage, risk = metrics.risk_coverage([0.9, 0.8, 0.7, 0.6], [1, 1, 0, 1])
    np.testing.assert_allclose(coverage, [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(risk, [0, 0, 1 / 3, 1 / 4])
    assert abs(metrics.aurc([0.9, 0.8, 0.7, 0.6], [1, 1, 0, 1]) - (1 / 3 + 1 / 4) / 4) < 1e-12
    assert metrics.coverage_at_risk([0.9, 0.8, 0.7, 0.6], [1, 1, 0, 1], 0.1) == 0.5
    assert metrics.coverage_at_risk([0.5, 0.5], [1, 0], 0.1) == 0


def test_confidence_that_knows_nothing_has_the_error_rate_as_risk():
    correct = np.random.default_rng(0).random(50) < 0.7
    np.testing.assert_allclose(metrics.risk_coverage(np.ones(50), correct)[1], 1 - correct.mean())
    assert abs(metrics.aurc(np.ones(50), correct) - (1 - correct.mean())) < 1e-12


def test_perfect_ranking_has_no_excess():
    correct = np.arange(4000) < 3000
    confidence = np.linspace(1, 0, 4000)
    assert abs(metrics.excess_aurc(confidence, correct)) < 1e-3
    assert metrics.excess_aurc(-confidence + 1, correct) > 0.4
    assert abs(metrics.augrc(confidence, correct) - 0.25**2 / 2) < 1e-3


def test_tool_outcomes_count_help_and_harm():
    found = metrics.tool_outcomes([1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0])
    assert (found["accuracy_alone"], found["accuracy_gated"], found["accuracy_oracle"]) == (0.5, 0.5, 0.75)
    assert (found["precision"], found["recall"]) == (0.5, 1.0)
    assert (found["help_rate"], found["harm_rate"]) == (0.25, 0.25)
    assert np.isnan(metrics.tool_outcomes([1], [1], [0])["precision"])
    assert metrics.effective_reliability([1, 0, 0], [1, 1, 0], penalty=2) == pytest.approx(-1 / 3)


def test_recall_of_known_similarities():
    similarity = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 1.0, 1.0]])
    assert metrics.recall_at_k(similarity, np.array([0, 1, 2]), 1) == pytest.approx(1 / 3)
    assert metrics.recall_at_k(similarity, np.array([0, 1, 2]), 2) == pytest.approx(2 / 3)
    assert metrics.recall_at_k(similarity, np.array([0, 1, 2]), 3) == 1
    assert metrics.recall_at_k(np.ones((9, 9)), np.arange(9), 8) == 0  # collapse earns nothing
    several = np.array([[0, 0, 1], [1, 0, 1], [0, 0, 0]], bool)
    assert metrics.recall_at_k(similarity, several, 1) == pytest.approx(1 / 3)


def test_ranks_of_known_similarities():
    similarity = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 1.0, 1.0]])
    assert metrics.retrieval_ranks(similarity, np.array([0, 1, 2])).tolist() == [1, 2, 3]
    several = np.array([[0, 0, 1], [1, 0, 1], [0, 0, 0]], bool)
    assert metrics.retrieval_ranks(similarity, several).tolist() == [3, 1, np.inf]


def test_effective_rank_counts_directions():
    for rank in (1, 3, 8):
        assert metrics.effective_rank(np.eye(8)[:rank]) == pytest.approx(rank)
        assert metrics.effective_rank(np.tile(np.eye(8)[:rank], (50, 1))) == pytest.approx(rank)
    assert metrics.effective_rank(np.outer(np.arange(1, 9), np.ones(4))) == pytest.approx(1)
    assert metrics.effective_rank(np.zeros((3, 3))) == 1


def test_embedding_measures_written_out():
    x = np.random.default_rng(0).standard_normal((7, 3))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    pairs = [(i, j) for i in range(7) for j in range(7) if i != j]
    assert metrics.mean_cosine(5 * x) == pytest.approx(np.mean([x[i] @ x[j] for i, j in pairs]))
    expected = np.log(np.mean([np.exp(-2 * np.sum((x[i] - x[j]) ** 2)) for i, j in pairs]))
    assert metrics.uniformity(x) == pytest.approx(expected)
    assert metrics.alignment(x, x) == 0 and metrics.alignment(x, -x) == pytest.approx(4)


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        low, high = metrics.bootstrap_interval(np.mean, rng.standard_normal(60), rng=rng, resamples=200)
        hits += low <= 0 <= high
    assert 87 <= hits <= 100


def test_bootstrap_of_groups_is_wider_where_members_are_copies():
    rng = np.random.default_rng(0)
    x = np.repeat(rng.standard_normal(30), 20)
    low, high = metrics.bootstrap_interval(np.mean, x, rng=rng, resamples=300)
    wide = metrics.bootstrap_interval(np.mean, x, rng=rng, resamples=300, groups=np.repeat(np.arange(30), 20))
    assert wide[1] - wide[0] > 3 * (high - low)


def test_the_fast_interval_of_a_mean_is_the_bootstrap():
    rng = np.random.default_rng(0)
    value, groups = rng.random(400) < 0.8, rng.integers(0, 60, 400)
    fast = metrics.mean_interval(value, np.random.default_rng(1), groups, 4000)
    slow = metrics.bootstrap_interval(np.mean, value, rng=np.random.default_rng(2), resamples=4000, groups=groups)
    np.testing.assert_allclose(fast, slow, atol=0.004)
    assert fast == metrics.mean_interval(value, np.random.default_rng(1), groups, 4000)
    assert metrics.mean_interval(np.ones(40), rng, np.arange(40) // 4) == metrics.wilson_interval(10, 10)
    assert metrics.mean_interval([7.0, 7.0], rng) == (7, 7)


def test_the_jackknife_of_a_mean_is_the_interval_of_its_parts_means():
    x = np.random.default_rng(0).standard_normal(50)
    parts = np.arange(50).reshape(10, 5)
    low, high = metrics.jackknife_interval(lambda rows: x[rows].mean(), list(parts), np.arange(50))
    half = 2.2621571627409915 * x.reshape(10, 5).mean(axis=1).std(ddof=1) / np.sqrt(10)
    assert (low, high) == (pytest.approx(x.mean() - half), pytest.approx(x.mean() + half))


def test_wilson_interval_at_the_ends():
    assert metrics.wilson_interval(0, 10) == pytest.approx((0, 0.2775328), abs=1e-6)
    assert metrics.wilson_interval(10, 10) == pytest.approx((0.7224672, 1), abs=1e-6)


def test_accuracy_by_group():
    assert metrics.accuracy(["a", "b"], ["a", "c"]) == 0.5
    assert metrics.accuracy_by(["x", "y", "x"], [1, 0, 0]) == {"x": (0.5, 2), "y": (0.0, 1)}


@pytest.mark.parametrize("bad, error", [
    (lambda: metrics.auroc([1, 2], [1]), ShapeError),
    (lambda: metrics.aurc([], []), ShapeError),
    (lambda: metrics.expected_calibration_error([1.2], [1]), ConfigError),
    (lambda: metrics.accuracy([1, 2], [1]), ShapeError),
    (lambda: metrics.wilson_interval(3, 2), ConfigError),
    (lambda: metrics.mean_interval([1, 0], np.random.default_rng(0), groups=[1]), ShapeError),
    (lambda: metrics.recall_at_k(np.ones((2, 3)), np.ones((2, 2), bool), 1), ShapeError),
])  # fmt: skip
def test_nonsense_is_refused(bad, error):
    with pytest.raises(error):
        bad()
