"""A chart is well-formed SVG that shows every finite point inside its frame."""

import re
from xml.etree import ElementTree

import pytest

from training.plot import draw_training, line_chart, training_chart
from xuracore.errors import ConfigError

SVG = "{http://www.w3.org/2000/svg}"


def lines(chart):
    """Points of every drawn line, legend and axes included."""
    found = ElementTree.fromstring(chart).iter(f"{SVG}polyline")
    return [[tuple(map(float, pair.split(","))) for pair in line.get("points").split()] for line in found]


def test_every_name_and_label_is_written_and_escaped():
    chart = line_chart({"a < b": ([0, 1], [2, 3]), "c & d": ([0, 1], [3, 2])}, title="<t>", x_label="x", y_label="y")
    words = {text.text for text in ElementTree.fromstring(chart).iter(f"{SVG}text")}
    assert {"a < b", "c & d", "<t>", "x", "y"} <= words


def test_the_greatest_value_is_drawn_highest_and_the_last_rightmost():
    points = lines(line_chart({"line": ([0, 1, 2], [1.0, 5.0, 3.0])}))[1]
    assert len(points) == 3
    assert min(points, key=lambda point: point[1]) == points[1]
    assert [x for x, _ in points] == sorted(x for x, _ in points)


def test_a_value_that_is_not_finite_breaks_the_line():
    chart = line_chart({"loss": ([0, 1, 2, 3, 4], [1, 2, float("nan"), 2, 1])})
    assert [len(points) for points in lines(chart)][1:3] == [2, 2]
    assert "nan" not in chart


def test_equal_distances_on_a_logarithmic_axis_are_equal_ratios():
    points = lines(line_chart({"time": ([1, 10, 100], [1, 2, 3])}, log_x=True))[1]
    xs = [x for x, _ in points]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)


@pytest.mark.parametrize("values", [([1], [1]), ([1, 2], [0, 0]), ([5, 5], [1, 2]), ([0, 1], [1e-30, 1e30])])
def test_degenerate_ranges_are_drawn_inside_the_frame(values):
    chart = line_chart({"line": values}, size=(500, 300))
    for points in lines(chart):
        assert all(0 <= x <= 500 and 0 <= y <= 300 for x, y in points)
    assert not re.search(r"nan|inf", chart)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ConfigError, match="no finite point"):
        line_chart({"line": ([1], [float("inf")])})
    with pytest.raises(ConfigError, match="as many"):
        line_chart({"line": ([1, 2], [1])})


RECORDS = [{"step": 10, "split": "train", "loss": 2.0, "accuracy": 0.25, "scale": 14.0, "lr": 1e-3, "seconds": 3.0},
           {"step": 20, "split": "train", "loss": 1.0, "accuracy": 0.5, "scale": 15.0, "lr": 5e-4, "seconds": 3.0},
           {"step": 20, "split": "validation", "all": 0.75, **{f"type {i}": 0.5 for i in range(20)}}]


def test_a_training_is_drawn_in_panels_and_the_sum_is_not_crowded_out_by_its_parts(tmp_path):
    chart = training_chart(RECORDS)
    words = {text.text for text in ElementTree.fromstring(chart).iter(f"{SVG}text")}
    assert {"loss", "accuracy", "validation all", "learning rate", "of 0.001", "step"} <= words
    assert not {"scale", "seconds", "validation type 19"} & words
    assert len(ElementTree.fromstring(chart).findall(f"{SVG}svg")) == 3


def test_a_log_without_numbers_is_not_drawn(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n')
    draw_training(tmp_path / "metrics.jsonl", tmp_path / "training.svg")
    assert not (tmp_path / "training.svg").exists()
