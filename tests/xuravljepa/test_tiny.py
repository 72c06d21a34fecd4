"""The shipped model is the one its manifest describes, and it can do what the README says."""

import hashlib

import numpy as np
import pytest

from training.data.dataset import Dataset
from training.data.strange import strange_image
from training.evaluation.answering import answers_of, by_type
from training.phases.common import FeatureStore
from xuracore import io
from xuravljepa.agent.agent import Agent
from xuravljepa.model import SHIPPED


@pytest.fixture(scope="module")
def agent():
    return Agent.from_pretrained("tiny")


def test_files_are_those_of_the_manifest_and_small():
    folder = SHIPPED / "tiny"
    manifest = io.load_json(folder / "manifest.json")
    assert set(manifest["files"]) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 8_000_000


def test_it_answers_from_pixels_and_not_from_the_question(agent):
    rows = Dataset.scenes("test", 40, start=5000).rows
    truth = np.array([row.answer for row in rows])
    features = FeatureStore(agent.model, rows)
    found = by_type(rows, answers_of(agent.model, rows, features) == truth)
    assert found["non-relational"][0] >= 0.97 and found["relational"][0] >= 0.92
    other = np.random.default_rng(0).permutation(len(rows))
    blind = by_type(rows, answers_of(agent.model, rows, features, other) == truth)
    assert blind["non-relational"][0] <= 0.55 and blind["relational"][0] <= 0.55


def test_it_calls_a_tool_for_what_it_cannot_know(agent):
    data = Dataset.tools("test", 12, start=6000, pools=("test",))
    replies = [(agent.ask(row.image, row.query), row) for row in data]
    assert np.mean([reply.answer == row.answer for reply, row in replies]) >= 0.9
    assert all(reply.tool_calls[0]["tool"] == row.tool["name"] for reply, row in replies if reply.tool_calls)
    assert np.mean([bool(reply.tool_calls) for reply, _ in replies]) >= 0.9


def test_it_is_unsure_about_what_is_no_scene(agent):
    replies = [agent.ask(strange_image(i, seed=77), "what shape is the red one?") for i in range(16)]
    assert all(reply.unsure and reply.text.startswith("I am not sure") for reply in replies)


def test_the_decoder_says_what_the_nearest_answer_says(agent):
    data = Dataset.scenes("test", 3, start=7000)
    pairs = [(agent.model.answer(row.image, row.query), agent.model.answer(row.image, row.query, decode=True))
             for row in data]
    assert np.mean([near == decoded for near, decoded in pairs]) >= 0.95
