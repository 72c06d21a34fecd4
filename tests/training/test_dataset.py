"""One Dataset over generated scenes and manifests, and the prior that ignores the picture."""
import numpy as np
import pytest
from PIL import Image

from training.data.dataset import Dataset
from training.data.manifest import Sample, write_manifest
from training.data.priors import QuestionOnlyPrior, prior_table, question_only_prior
from training.data.questions import QUESTION_TYPES, questions
from training.data.scenes import render, scene
from xuracore.errors import ConfigError, FormatError
from xuravljepa import image


def test_generated_samples_carry_their_picture_question_and_answer():
    data = Dataset.scenes("train", 5, seed=2)
    expected = [q for i in range(5) for q in questions(scene("train", i, 2))]
    assert len(data) == len(expected) and len({s.id for s in data}) == len(data)
    for sample, q in zip(data, expected):
        assert (sample.query, sample.answer, sample.type) == (q.query, q.answer, q.type)
        index = int(sample.id.split("/")[2])
        assert np.array_equal(sample.image, render(scene("train", index, 2)))


def test_a_later_start_continues_the_same_data():
    whole, tail = Dataset.scenes("val", 6), Dataset.scenes("val", 2, start=4)
    assert whole.rows[-len(tail):] == tail.rows


def test_tools_mix_pools_and_carry_the_call():
    data = Dataset.tools("test", 40, pools=("known", "test"))
    assert {row.meta["known"] for row in data.rows} == {True, False}
    assert all(row.tool["result"] == row.answer for row in data.rows)
    with pytest.raises(ConfigError, match="pool"):
        Dataset.tools("test", 1, pools=())


def test_captions_have_no_query():
    (sample,) = Dataset.captions("train", 1)
    assert sample.query is None and "large" in sample.caption and sample.image.shape == (64, 64, 3)


def test_a_manifest_is_a_dataset_with_paths(tmp_path):
    Image.fromarray(render(scene("train", 0))).save(tmp_path / "a.png")
    write_manifest(tmp_path / "manifest.jsonl", [
        Sample("1", "a.png", "what?", "this", split="train"),
        Sample("2", "a.png", "what?", "that", split="val")])
    assert [s.answer for s in Dataset.manifest(tmp_path)] == ["this", "that"]
    (sample,) = Dataset.manifest(tmp_path / "manifest.jsonl", split="val")
    assert image.load(sample.image).shape == (3, 64, 64) and sample.answer == "that"
    with pytest.raises(ConfigError, match="'test'.*train, val"):
        Dataset.manifest(tmp_path, split="test")
    with pytest.raises(FormatError, match="no such file"):
        Dataset.manifest(tmp_path / "missing")


def test_the_fingerprint_follows_the_content():
    prints = {Dataset.scenes(split, 3, seed).fingerprint() for split in ("train", "val") for seed in (0, 1)}
    assert len(prints) == 4
    assert Dataset.scenes("train", 3).fingerprint() == Dataset.scenes("train", 3).fingerprint() in prints


def test_answers_are_distinct_and_sorted():
    answers = Dataset.scenes("train", 30).answers()
    assert list(answers) == sorted(set(answers)) and {"circle", "yes", "left", "red", "2"} <= set(answers)


def rows(*triples):
    return Dataset("toy", [Sample(str(i), None, q, a, (a,), type=t) for i, (q, a, t) in enumerate(triples)])


def test_the_prior_is_the_majority_answer_to_the_same_words():
    prior = QuestionOnlyPrior(rows(("A b?", "x", 1), ("a  B?", "x", 1), ("a b?", "y", 1), ("c?", "z", 1)))
    assert prior.answer("a b?") == "x"
    assert prior.answer("new?", 1) == "x" and prior.answer("new?", 2) is None
    asked = rows(("a b?", "x", 1), ("a b?", "y", 1), ("e?", "y", 2))
    assert prior.accuracy(asked) == {1: (0.5, 2), 2: (0.0, 1)}
    assert "50.0%   of 2" in prior_table({"t": (0.5, 2)})


# What guessing may get right, from the number of answers; held-out pairs leave four colours only two shapes.
MOST = {2: 0.58, 3: 0.42, 4: 0.37, 5: 0.32, 8: 0.22}
MOST_OF_TYPE = {"shape": 0.47, "colour_of_shape": 0.30}


def test_the_question_alone_says_little():
    priors = question_only_prior(Dataset.scenes("train", 1200), Dataset.scenes("test", 400))
    assert set(priors) == set(QUESTION_TYPES)
    for name, (accuracy, count) in priors.items():
        assert count > 100
        assert accuracy < MOST_OF_TYPE.get(name, MOST[len(QUESTION_TYPES[name].answers)]), (name, accuracy)
