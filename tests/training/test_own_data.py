"""The scripts learn from people's own data, whatever its format, and say what they could not use."""

import json

import numpy as np
import pytest
from PIL import Image

from training.data.scenes import render, scene
from training.phases.end_to_end import moved
from training.scripts import evaluate, train_decoder, train_jepa
from xuracore.errors import ConfigError, FormatError
from xuravljepa.model import VLJEPA

pytestmark = pytest.mark.usefixtures("threads_of_its_own")

SHORT = ["--steps", "2", "--batch-size", "2", "--turns", "1", "--threads", "1"]
NEW = ["--train-encoder", "--image-size", "16", "--patch-size", "8"]


@pytest.fixture
def classes(tmp_path):
    """A folder of ten pictures in two classes, of which one is damaged."""
    for i in range(10):
        path = tmp_path / "data" / ("circle", "square")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(render(scene("train", i))).save(path)
    path.write_bytes(path.read_bytes()[:100])
    return tmp_path / "data"


def test_an_encoder_learns_from_a_folder_and_bad_pictures_are_listed(classes, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["--data-dir", str(classes), "--output-dir", str(out), *SHORT, *NEW, "--augment", "1"]
    with pytest.raises(FormatError, match="1 of 10 rows are bad, more than max_bad_fraction=0.0"):
        train_jepa.main(arguments)
    assert not (out / "model").exists() and "9.png" in (out / "bad_samples.jsonl").read_text()
    assert train_jepa.main([*arguments, "--max-bad-fraction", "0.1"]) == 0
    said = capsys.readouterr().err
    assert "a folder of pictures, 10 pictures; 10 questions with 2 different answers" in said
    assert "1 bad rows were left out" in said
    (row,) = map(json.loads, (out / "bad_samples.jsonl").read_text().splitlines())
    assert row["file"] == str(classes / "square" / "9.png") and "truncated" in row["reason"]
    model = VLJEPA.from_pretrained(out / "model")
    assert model.config.answers == ("circle", "square") and model.config.vision.n_tokens == 5
    measured = ["--model", str(out / "model"), "--data-dir", str(classes), "--only", "answers", "--split", "all",
                "--resamples", "10", "--max-bad-fraction", "0.1"]
    assert evaluate.main([*measured, "--data-format", "folder", "--json", str(out / "e.json")]) == 0
    assert json.loads((out / "e.json").read_text())["about"]["data"]["left_out"] == 1
    assert train_decoder.main(["--data-dir", str(classes), "--max-bad-fraction", "0.1", *SHORT[:4], "--quiet",
                               "--model", str(out / "model"), "--output-dir", str(out / "decoder")]) == 0
    assert (out / "decoder" / "bad_samples.jsonl").read_text() == (out / "bad_samples.jsonl").read_text()


def test_every_part_learns_when_the_encoder_does(classes, tmp_path):
    (classes / "square" / "9.png").unlink()
    states = []
    for steps in ("1", "3"):
        out = tmp_path / steps
        train_jepa.main(["--data-dir", str(classes), "--output-dir", str(out), *SHORT, *NEW, "--steps", steps,
                         "--warmup", "0", "--quiet"])
        states.append(VLJEPA.from_pretrained(out / "model").state_dict())
    assert not (tmp_path / "1" / "bad_samples.jsonl").exists()
    changed = {name.partition(".")[0] for name in states[0] if not np.array_equal(states[0][name], states[1][name])}
    assert changed == {"x_encoder", "predictor", "y_encoder", "log_scale"}


def test_captions_alone_can_be_trained_on(tmp_path, capsys):
    root = tmp_path / "data"
    (root / "train2017").mkdir(parents=True)
    images, annotations = [], []
    for i in range(10):
        Image.fromarray(render(scene("train", i))).save(root / "train2017" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png"})
        annotations += [{"id": 2 * i + j, "image_id": i, "caption": f"picture {i}, said {j}"} for j in range(2)]
    annotations.append({"id": 99, "image_id": 3, "caption": "long " * 2000})
    (root / "captions_train2017.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    arguments = ["--data-dir", str(root), "--max-bad-fraction", "0.1", *SHORT[:4]]
    assert train_jepa.main([*arguments, "--output-dir", str(tmp_path / "a"), "--turns", "1", *NEW]) == 0
    (row,) = map(json.loads, (tmp_path / "a" / "bad_samples.jsonl").read_text().splitlines())
    assert "limit is" in row["reason"] and row["line"] == 1
    model = VLJEPA.from_pretrained(tmp_path / "a" / "model")
    assert len(model.config.answers) == 2 and model.config.answers[0].startswith("picture 0")
    trained = str(tmp_path / "a" / "model")
    assert train_decoder.main([*arguments, "--output-dir", str(tmp_path / "b"), "--model", trained, "--quiet"]) == 0


def test_answers_that_cannot_be_used_are_in_no_closed_set(tmp_path, monkeypatch):
    rows = [{"image": f"{i}.png", "query": "what?", "answer": f"thing {i}"} for i in range(30)]
    rows[3]["answer"] = "long " * 2000
    for i in range(30):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / f"{i}.png")
    (tmp_path / "4.png").write_bytes(b"no picture")
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--data-dir", str(tmp_path), *SHORT, *NEW, "--max-bad-fraction", "0.1", "--quiet"]
    for largest, count in ((100, 28), (20, 3)):
        monkeypatch.setattr(train_jepa, "LARGEST_CLOSED_SET", largest)
        assert train_jepa.main([*arguments, "--output-dir", str(tmp_path / f"run{largest}")]) == 0
        answers = VLJEPA.from_pretrained(tmp_path / f"run{largest}" / "model").config.answers
        assert len(answers) == count and {"thing 4", rows[3]["answer"]}.isdisjoint(answers)


@pytest.mark.parametrize("wrong,words", [
    (["--augment", "1"], "add --train-encoder"), (["--image-size", "16"], "add --train-encoder"),
    (["--train-encoder", "--feature-cache", "c"], "changes"), ([*NEW, "--vit", "v"], "its own sizes")])
def test_options_that_exclude_each_other_are_named(wrong, words):
    with pytest.raises(ConfigError, match=words):
        train_jepa.main(["--data-dir", "nowhere", *wrong])


def test_moved_pictures_stay_in_range_and_no_moves_move_nothing():
    rng = np.random.default_rng(0)
    pixels, moves = rng.uniform(-1, 1, (4, 3, 8, 6)).astype(np.float32), rng.uniform(-1, 1, (4, 4))
    np.testing.assert_allclose(moved(pixels, 0 * moves), pixels, atol=1e-6)
    found = moved(pixels, moves)
    assert found.dtype == np.float32 and found.shape == pixels.shape and not np.allclose(found, pixels, atol=0.1)
    assert found.min() >= pixels.min() - 1e-6 and found.max() <= pixels.max() + 1e-6
    flat = np.full((4, 3, 8, 8), 0.25, np.float32)
    np.testing.assert_allclose(moved(flat, moves), flat, atol=1e-6)


def test_a_picture_shifted_by_whole_pixels_is_that_picture():
    pixels = np.arange(64, dtype=np.float32).reshape(1, 1, 8, 8).repeat(3, axis=1)
    found = moved(pixels, np.array([[0.0], [0.0], [0.0], [1.0]]))  # an eighth of the side
    np.testing.assert_allclose(found[..., :-1], pixels[..., 1:], atol=1e-5)
    np.testing.assert_allclose(found[..., -1], pixels[..., -1], atol=1e-5)
