"""Phase 3 learns from people's own held-out questions, with the tools that their rows name or with none."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from training.data.manifest import Sample
from training.phases import agent, agent_own, jepa, monitor
from training.scripts import evaluate, train_agent, train_decoder, train_jepa
from xuracore import io
from xuracore.errors import ConfigError
from xuravljepa.agent.agent import Agent
from xuravljepa.agent.confusion import ConfusionMonitor, MonitorConfig
from xuravljepa.feature_cache import FeatureCache
from xuravljepa.image import Preprocessing
from xuravljepa.model import VLJEPA

pytestmark = pytest.mark.usefixtures("threads_of_its_own")

SHORT = ["--threads", "1", "--quiet", "--batch-size", "4"]


def write(folder, rows, splits=("train", "val", "calib", "train", "calib", "test")):
    """Pictures light or dark, one for each of ``rows``, a dict each, and their manifest."""
    folder.mkdir()
    for i, row in enumerate(rows):
        level = (60, 200)[i // 2 % 2] + i % 7
        Image.new("RGB", (16, 16), (level, level, 255 - level)).save(folder / f"{i}.png")
        row.update(image=f"{i}.png", split=splits[i % len(splits)])
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


def seen(i):
    return {"query": "is it light or dark?", "answer": ("Dark", "Light")[i // 2 % 2]}


def walled(i):
    wall = ("Light", "Dark")[i // 2 % 3 % 2]
    tool = {"name": "wall_of", "arguments": {"number": i}, "result": wall}
    return {"query": "what is the wall behind it?", "answer": wall, "tool": tool}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders of two data sets, without and with tools, and of a model hardly trained on the second."""
    root = tmp_path_factory.mktemp("own")
    plain = write(root / "plain", [seen(i) for i in range(120)])
    tools = write(root / "tools", [walled(i) if i // 6 % 2 else seen(i) for i in range(120)])
    train_jepa.main(["--data-dir", tools, "--output-dir", str(root / "jepa"), *SHORT, "--steps", "2", "--turns", "1",
                     "--train-encoder", "--image-size", "16", "--patch-size", "8", "--typos", "0"])
    return plain, tools, str(root / "jepa" / "model")


def train(model, data, out, *more):
    return train_agent.main(["--model", model, "--data-dir", data, "--output-dir", str(out), *SHORT, "--steps", "2",
                             "--monitor-steps", "3", *more])


def test_without_tools_the_agent_doubts_and_calls_nothing(places, tmp_path, capsys):
    plain, _, model = places
    assert train(model, plain, tmp_path / "run", "--feature-cache", str(tmp_path / "cache")) == 0
    report = json.loads(capsys.readouterr().out)
    assert "injection" not in report and report["monitor"]["fixes"] == 0
    assert report["kept"]["nll"] > 0 and not (tmp_path / "run" / "injection").exists()
    agent = Agent.from_pretrained(tmp_path / "run" / "model")
    assert agent.trained and not len(agent.tools) and agent.heads.config.monitor.shift == 1
    assert agent.heads.config.words == ("dark", "is", "it", "light", "or")
    agent.register_tool(lambda: "Light", name="light", description="say light", arguments={}, isolation="inline")
    reply = agent.ask(f"{plain}/5.png", "is it light or dark?")
    assert reply.answer and 0 < reply.confidence < 1 and not reply.tool_calls
    assert agent.ask(None, "what shade is it?").unsure  # in words that nobody taught
    assert len(list((tmp_path / "cache").iterdir())) == 1
    wanted = ["--model", str(tmp_path / "run" / "model"), "--data-dir", plain, "--only", "doubt", "--split", "all"]
    assert evaluate.main([*wanted, "--html", str(tmp_path / "e.html"), "--json", str(tmp_path / "e.json")]) == 0
    doubt = io.load_json(tmp_path / "e.json")["doubt"]
    assert doubt["questions"] == 120 and 0 <= doubt["all"]["monitor"]["auroc"] <= 1 and "tool" not in doubt
    assert re.search(r"120 questions, [\d.]+ % answered wrongly", (tmp_path / "e.html").read_text())
    with pytest.raises(ConfigError, match="needs generated tool questions"):
        evaluate.main([*wanted[:-3], "tools"])


def test_rows_that_name_a_tool_teach_to_call_it(places, tmp_path, capsys):
    _, tools, model = places
    assert train(model, tools, tmp_path / "run") == 0
    report = json.loads(capsys.readouterr().out)
    assert {"answer", "tool"} <= report["injection"].keys()
    config = io.load_json(tmp_path / "run" / "model" / "agent.json")
    assert config["selector"]["tools"] == ["wall_of"] and config["cards"] == {"wall_of": "wall of"}
    assert not (tmp_path / "run" / "model" / "prices.json").exists()


def test_mistakes_are_explained(places, tmp_path):
    plain, tools, model = places
    other = write(tmp_path / "other", [{**seen(i), "answer": "cat"} for i in range(20)])
    right = [{**seen(i), "answers": ["Dark", "Light"], "answer": "Dark"} for i in range(60)]
    unheld = [walled(i) if i % 6 == 0 else seen(i) for i in range(60)]
    for data, words, more in (
            (other, "knows no answer of your questions: train the phases before on this --data-dir", []),
            (plain, "no row of --data-dir names a tool", ["--stage", "injection"]),
            (write(tmp_path / "unheld", unheld), "rows of tools can be trained on and 0 are held out", []),
            (write(tmp_path / "right", right), "0 are wrong.*Hold out more pictures", [])):
        with pytest.raises(ConfigError, match=words):
            train(model, data, tmp_path / "run", *more)
    with pytest.raises(ConfigError, match="knows no answer of generated questions"):
        train_agent.main(["--model", model, "--output-dir", str(tmp_path / "run"), *SHORT, "--scenes", "8"])
    with pytest.raises(ConfigError, match="knows no answer of generated questions"):
        train_decoder.main(["--model", model, "--output-dir", str(tmp_path / "run"), *SHORT, "--scenes", "2"])


def test_a_row_without_a_result_is_a_question_like_any_other():
    named = Sample("a", query="whose?", answer="Ann", tool={"name": "owner_of"})
    assert jepa.said_by_tool(named) is None and agent_own.tool_names([named]) == {}
    given = Sample("b", query="whose?", answer="Ann", tool={"name": "owner_of", "result": " Ann "})
    assert jepa.said_by_tool(given) == "ann"
    assert agent_own.questions([named, given], ("Ann",), ("owner_of",)) == ([given], [named])
    other = Sample("c", query="how many?", answer="3", tool={"name": "count", "result": {"n": 3}})
    assert agent_own.rumours([given, other]) == {"owner_of": ["Ann"]}


def test_what_might_have_been_said_is_among_the_answers(places):
    _, tools, source = places
    model = VLJEPA.from_pretrained(source)
    rows = [Sample(str(i), f"{i}", "whose?", "Ann", ("Ann",), tool={"name": "owner_of", "result": ("Ann", "#7")[i % 2]})
            for i in range(8)]
    tokens = np.zeros((model.config.vision.n_tokens, model.config.vision.d_model), np.float32)
    batches = agent.InjectionBatches(model, rows, [], lambda rows: np.stack([tokens] * len(rows)), 8,
                                     rumours={"owner_of": ["Ann", "Bob"]})
    pairs = {pair for step in range(4) for pair in zip(*(batches.batch(step)[name] for name in ("said", "answers")))}
    assert pairs == {("ann", "Ann"), ("bob", "Bob"), ("#7", "Ann")}


def test_changes_are_made_on_the_scale_they_are_meant_for():
    recipe = Preprocessing(8, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    picture = np.random.default_rng(0).uniform(0, 1, (3, 3, 8, 8)).astype(np.float32)
    mean, std = (np.array(part, np.float32)[:, None, None] for part in (recipe.mean, recipe.std))
    for kind in ("gamma", "lines"):
        found = agent_own.changer(kind, recipe)((picture - mean) / std) * std + mean
        assert not np.allclose(found, picture, atol=1e-3) and found.min() > -1e-5 and found.max() < 1 + 1e-5


def test_a_network_that_knows_less_than_the_agreement_is_left_out():
    rng, judge = np.random.default_rng(0), ConfusionMonitor(MonitorConfig(read_dim=2, vision_dim=2, hidden=4))
    features = rng.standard_normal((200, 2 + 13)).astype(np.float32)
    wrong = (rng.random(200) < 1 / (1 + np.exp(-3 * features[:, 2]))).astype(np.int64)
    kept = monitor.Readings(features, wrong, np.full(200, "pictures", object), np.arange(200))
    judge.output.weight.data[:] = 5
    found = agent_own.keep_the_better(judge, kept)
    assert not found["network"] and not judge.output.weight.data.any() and found["nll_agreement"] < found["nll"]
    judge.output.weight.data[:], judge.trust.data[:] = 0, 2  # the same order, so calibrated it is the same
    assert agent_own.keep_the_better(judge, kept)["nll"] == pytest.approx(found["nll_agreement"], abs=1e-4)


def test_views_come_from_the_cache(places, tmp_path, monkeypatch):
    model = VLJEPA.from_pretrained(places[2])
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 3, 16, 16)).astype(np.float32)
    pixels = np.concatenate([pixels, pixels[:1]])
    cache = FeatureCache(tmp_path, model.x_encoder, model.config.preprocessing)
    computed = monitor.view_tokens(model, pixels, 1, cache)
    np.testing.assert_allclose(computed, monitor.view_tokens(model, pixels, 1), atol=1e-2)
    monkeypatch.setattr(type(model), "visual_tokens", None)
    np.testing.assert_array_equal(monitor.view_tokens(model, pixels, 1, cache), computed)
