"""One command takes pictures of digits to a measured model; here with a stand-in for scikit-learn's."""

import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from training.data.dataset import open_dataset
from training.scripts import digits
from xuracore.errors import MissingExtraError

pytestmark = pytest.mark.usefixtures("threads_of_its_own")


@pytest.fixture
def stand_in(monkeypatch):
    """sklearn.datasets.load_digits with 60 pictures: a bar whose place says the digit."""
    images = np.zeros((60, 8, 8))
    target = np.arange(60) % 4
    for image, digit in zip(images, target):
        image[2 * digit : 2 * digit + 2] = 16.0
    package, module = ModuleType("sklearn"), ModuleType("sklearn.datasets")
    module.load_digits = lambda: SimpleNamespace(images=images, target=target)
    monkeypatch.setitem(sys.modules, "sklearn", package)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", module)


def test_digits_become_pictures_with_a_manifest(stand_in, tmp_path):
    assert digits.main(["--data-dir", str(tmp_path), "--export-only"]) == 0
    rows = open_dataset(tmp_path).rows
    assert len(rows) == 60 and {row.split for row in rows} == {"train", "val", "test"}
    assert sum(row.split == "test" for row in rows) == 12
    picture = np.asarray(Image.open(rows[1].image))
    assert picture.shape == (8, 8) and rows[1].answer == "1" and picture[2].min() == 255 and picture[0].max() == 0
    assert digits.pixels_of(rows[:2]).shape == (2, 64)


def test_the_command_trains_measures_and_compares(stand_in, tmp_path, capsys):
    out = tmp_path / "run"
    assert digits.main(["--data-dir", str(tmp_path / "d"), "--output-dir", str(out), "--steps", "1", "--quiet"]) == 0
    found = json.loads((out / "digits.json").read_text())
    assert found["unseen"] == 12 and found["accuracy"]["linear probe on pixels"]["accuracy"] == 100
    assert len(found["accuracy"]) >= 3 and all(0 <= row["low"] <= row["high"] <= 100 for row in found["accuracy"].values())
    assert "| linear probe on pixels | 100.0 % |" in capsys.readouterr().out


def test_without_scikit_learn_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtraError, match=r"xura\[digits\]"):
        digits.main(["--data-dir", str(tmp_path)])
