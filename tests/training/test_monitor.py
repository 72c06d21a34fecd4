"""What the monitor is trained on, and how it is judged."""

import numpy as np
import pytest

from training import risk, risk_page
from training.data.dataset import Dataset
from training.data.memory_data import EARLIER, PARAPHRASES, TEMPLATES, earlier_scenes, memory_rows
from training.data.scenes import HELD_OUT_PAIRS
from training.data.strange import TAUGHT, UNTAUGHT, changed, untaught
from training.data.tools_data import KNOWN_SHOPS, shop_names
from training.phases import monitor
from xuravljepa.agent.confusion import NUMBERS, ConfusionMonitor, MonitorConfig


# ---------------------------------------------------------------------- questions
def test_new_keys_are_new_and_answered():
    rows = Dataset.tools("calib", 60, pools=("known", "calib")).rows
    renewed = monitor.with_new_keys(rows)
    for old, new in zip(rows, renewed, strict=True):
        if old.meta["known"]:
            assert new is old
            continue
        key = new.meta["key"]
        assert key in new.query.split() + [new.query.rstrip("?").split()[-1]] and new.answer == new.tool["result"]
        if new.type == "price":
            assert key not in {*KNOWN_SHOPS, *shop_names("test")} and old.meta["key"] not in new.query
        else:
            assert int(key) % 2 == 0 or int(key) >= 24  # the pool "test" has odd ones below
            assert int(new.answer) - int(key) == int(old.answer) - int(old.meta["key"])
    assert [row.query for row in monitor.with_new_keys(rows)] == [row.query for row in renewed]


def test_what_was_earlier_is_in_the_scenes_after_it():
    rows = memory_rows("test", 80)
    said = [row.answer for row in rows if row.type == "earlier existence"]
    assert 0.3 < said.count("yes") / len(said) < 0.7
    for row in rows:
        seen, words = earlier_scenes(row.image), row.query.replace("?", " ").replace(",", " ").split()
        assert len(seen) == EARLIER and row.image not in seen and row.tool["name"] == "memory_search"
        if row.type == "earlier existence":
            there = any(one.colour in words and one.shape in words for scene in seen for one in scene.objects)
            assert row.answer == ("yes" if there else "no")
            assert not any(colour in words and shape in words for colour, shape in HELD_OUT_PAIRS)
        elif row.type == "earlier count":
            assert row.answer == str(sum(one.shape + "s" in words for one in seen[-1].objects))
        else:
            assert [one.shape for one in seen[-1].objects if one.colour in words] == [row.answer]


def test_no_wording_is_both_taught_and_tested():
    for kind in TEMPLATES:
        assert not set(TEMPLATES[kind]) & set(PARAPHRASES[kind])
    assert {row.query for row in memory_rows("test", 9)}.isdisjoint(
        row.query for row in memory_rows("test", 9, templates="paraphrase"))


@pytest.mark.parametrize("kind", [*TAUGHT, *UNTAUGHT])
def test_a_changed_picture_is_another_of_the_same_kind(kind):
    pixels = np.random.default_rng(0).uniform(-1, 1, (4, 3, 16, 16)).astype(np.float32)
    before = pixels.copy()

    def change():
        return changed(pixels, kind, np.random.default_rng(1)) if kind in TAUGHT else untaught(pixels, kind)

    found = change()
    assert found.shape == pixels.shape and found.dtype == np.float32 and np.isfinite(found).all()
    assert all((one != other).any() for one, other in zip(found, pixels))
    np.testing.assert_array_equal(pixels, before)
    np.testing.assert_array_equal(change(), found)


# ---------------------------------------------------------------------- learning
def readings(count=400, seed=0):
    """Two groups, in each of which a feature of its own says what is wrong; one is hard as a whole."""
    rng = np.random.default_rng(seed)
    group = np.where(np.arange(count) % 2, "scenes", "tools").astype(object)
    wrong = (rng.random(count) < np.where(group == "scenes", 0.1, 0.6)).astype(np.int64)
    features = rng.standard_normal((count, 3 + len(NUMBERS))).astype(np.float32)
    features[:, 0] = (2 * wrong - 1) * np.where(group == "scenes", 1, -1)
    features[:, 1] = np.where(group == "scenes", 1, -1)
    return monitor.Readings(features, wrong, group, np.arange(count))


def test_a_picture_is_for_learning_or_for_calibration():
    both = readings()
    kept = monitor.held_back(both)
    assert not set(both[kept].picture) & set(both[~kept].picture) and 0.2 < kept.mean() < 0.5
    assert len(monitor.Readings.joined([both[kept], both[~kept]]).wrong) == 400


def test_batches_are_drawn_by_shares_and_pairs_stay_within_groups():
    batches = monitor.ReadingBatches(readings(), 300, 8)
    batch = batches.batch(3)
    names = np.array(["scenes", "tools"])[batch["group"]]  # in the order of the alphabet
    share = monitor.SHARES["scenes"] / (monitor.SHARES["scenes"] + monitor.SHARES["tools"])
    assert abs((names == "scenes").mean() - share) < 0.1
    assert set(batch["weight"][names == "scenes"]) == {monitor.CLEAR_WEIGHT}
    assert set(np.unique(batch["keep"])) <= {0.0, np.float32(1 / (1 - monitor.DROPOUT))}
    np.testing.assert_array_equal(batches.batch(3)["features"], batch["features"])

    class Heads:
        monitor = ConfusionMonitor(MonitorConfig(read_dim=3, vision_dim=3, hidden=8))

    ordered = {**batch, "wrong": (names == "tools").astype(np.int64)}  # no pair within a group
    assert "ranked" not in monitor.monitor_objective(Heads, ordered)[1]


def test_usefulness_counts_what_was_mended_and_broken():
    found = {"row": np.array([0, 1, 2, 3, 0, 1, 2, 3]), "depth": np.repeat([0, 1], 4),
             "wrong": np.array([1, 1, 0, 0, 0, 1, 0, 1])}
    assert monitor.usefulness(found) == (0.5, 0.5)
    assert monitor.usefulness({name: values[:4] for name, values in found.items()}) == (0.0, 0.0)


# ---------------------------------------------------------------------- risk
def judged(seed=0, count=600):
    rng = np.random.default_rng(seed)
    sure = rng.uniform(0.5, 1, count)
    wrong = (rng.random(count) > sure).astype(np.int64)
    noisy = np.clip(sure + rng.normal(0, 0.2, count), 0, 1)
    confidence = {name: sure if name == "monitor" else noisy for name in risk.JUDGES}
    return risk.Judged(wrong, confidence, np.arange(count) // 6)


def test_the_better_judge_gains_and_intervals_hold_the_value():
    found = risk.risk_of(judged(), resamples=60)
    assert found["questions"] == 600 and found["pictures"] == 100
    assert found["gain"]["auroc"]["low"] > 0 and found["gain"]["nll"]["high"] < 0
    for cells in (*found["judges"].values(), found["gain"]):
        for measure in ("auroc", "aupr", "brier", "nll", "aurc"):
            assert cells[measure]["low"] <= cells[measure]["value"] <= cells[measure]["high"]
    assert found["judges"]["monitor"]["ece"]["value"] < 0.06  # honest by construction
    assert risk.risk_of(judged(), resamples=60) == found


def test_where_nothing_is_wrong_there_is_no_ranking_and_the_page_says_so():
    right = judged()
    right = risk.Judged(np.zeros_like(right.wrong), right.confidence, right.picture)
    found = {"pictures": risk.risk_of(judged(), resamples=8), "easy <b>": risk.risk_of(right, resamples=8)}
    assert found["easy <b>"]["judges"]["monitor"]["auroc"] == {"value": None, "low": None, "high": None}
    assert "easy <b>: 600 questions, 0.0% wrong" in risk.table(found)
    page = risk_page.page(found, "a model & its <data>")
    assert page.count("<svg") == 4 and "easy &lt;b&gt;" in page and "a model &amp; its &lt;data&gt;" in page
    for outside in ("<script", "http://", "https://", "src=", "@import"):
        assert outside not in page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert risk_page.page(found, "x") == risk_page.page(found, "x")
