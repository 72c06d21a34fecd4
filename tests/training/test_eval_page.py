"""`xura eval` and its page: self-contained, safe, bounded, and the same bytes for the same command."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from training import eval_page
from training.data.dataset import Dataset
from training.data.manifest import Sample
from training.evaluation import material, tables
from training.evaluation.answering import Answers
from training.scripts import evaluate
from xuracore.errors import ConfigError, FormatError
from xuravljepa.decoder import DecoderConfig
from xuravljepa.model import VLJEPA
from xuravljepa.predictor import PredictorConfig
from xuravljepa.presets import VLJEPAConfig
from xuravljepa.text import TextEncoderConfig
from xuravljepa.vit import VitConfig

HOSTILE = '<script>alert("x")</script>\x1b[2J & "quoted"'
VOID = {"meta", "img", "br"}


class Checked(HTMLParser):
    """Fails on tags that do not nest; collects tags and attributes."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model of random weights that knows the answers of scenes and of the pictures below."""
    answers = sorted({row.answer for row in Dataset.scenes("test", 20).rows} | {"gold", "teal", "plum"})
    sizes = {"d_model": 16, "n_layers": 1, "d_state": 8, "headdim": 8, "embed_dim": 8}
    model = VLJEPA(VLJEPAConfig(
        vision=VitConfig(image_size=64, patch_size=16, d_model=16, depth=1, n_heads=2),
        predictor=PredictorConfig(**sizes, vision_dim=16, query_dim=8, n_visual=17, n_salient=8, n_read=1,
                                  max_query=32),
        text=TextEncoderConfig(**sizes, max_length=32),
        decoder=DecoderConfig(**sizes, prefix_length=2, max_length=8),
        answers=tuple(answers)), rng=np.random.default_rng(0))
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """24 photographs of noise with two questions, and a caption each."""
    folder, rng, rows = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), []
    for i in range(24):
        Image.fromarray(rng.integers(0, 256, (150, 200, 3), np.uint8)).save(folder / f"{i}.png")
        name = ("gold", "teal", "plum")[i % 3]
        rows += [{"image": f"{i}.png", "query": f"what <b>is</b> it, {q}?", "answer": name, "type": f"t{q}"}
                 for q in range(2)]
        rows.append({"image": f"{i}.png", "caption": f"something {name}, no. {i}"})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(folder, out, *arguments):
    given = "--model", folder, "--quiet", "--resamples", 50, "--json", out / "r.json", "--html", out / "r.html"
    assert evaluate.main([*map(str, (*given, *arguments))]) == 0
    return json.loads((out / "r.json").read_text()), (out / "r.html").read_text()


def test_own_data_through_every_job_and_the_same_bytes_again(folder, pictures, tmp_path, capsys):
    arguments = "--data-dir", pictures, "--split", "all"
    result, page = run(folder, tmp_path, *arguments, "--predictions", tmp_path / "p.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(rows) == 48 and all(row["right"] == (row["said"] in row["answers"]) for row in rows)
    assert np.mean([row["right"] for row in rows]) == result["answers"]["types"]["all"]["accuracy"]["value"]
    said = capsys.readouterr().out
    assert set(result) == {"about", *evaluate.MODEL_JOBS}
    assert result["answers"]["types"]["all"]["accuracy"]["count"] == 48
    assert result["answers"]["types"]["t0"]["accuracy"]["pictures"] == 24
    assert result["classes"]["names"] == ["gold", "plum", "teal"]
    assert result["retrieval"]["pictures"] == result["retrieval"]["captions"] == 24
    assert result["words"]["texts"]["caption"]["pictures"] == 24 and "flatters" in result["about"]["data"]["notes"][0]
    for word in ("t1", "R@10", "effective rank", "templates", result["about"]["data"]["sha256"][:16]):
        assert word in said
    checked = Checked(page)
    assert checked.tags.count("img") == page.count("data:image/png") > 20
    assert "&lt;b&gt;is&lt;/b&gt;" in page and result["about"]["model"]["model_sha256"] in page
    again = run(folder, tmp_path, *arguments, "--predictions", tmp_path / "p.jsonl")
    assert again == (result, page)


def test_generated_scenes_with_all_controls(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(material, "PRIOR_SCENES", 40)
    result, page = run(folder, tmp_path, "--scenes", 6, "--only", "scenes", "health")
    assert set(result) == {"about", "answers", "health"}
    cells = result["answers"]["types"]["all"]
    assert set(cells) == {"accuracy", "prior", "shuffled", "gain", "permuted", "paraphrase", "ood", "corrupt"}
    assert "Sort-of-CLEVR" in page and "cannot be compared" in capsys.readouterr().out
    Checked(page)


def test_captions_alone_can_be_measured_and_bad_pictures_left_out(folder, pictures, tmp_path, capsys):
    for i in range(24):
        (tmp_path / f"{i}.png").write_bytes((pictures / f"{i}.png").read_bytes()[: 100 if i == 3 else None])
    rows = [{"image": f"{i}.png", "caption": f"number {i}", "split": "test"} for i in range(24)]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(FormatError, match="manifest.jsonl:4"):
        run(folder, tmp_path, "--data-dir", tmp_path)
    result, page = run(folder, tmp_path, "--data-dir", tmp_path, "--max-bad-fraction", 0.1)
    assert result["retrieval"]["pictures"] == 23 and result["about"]["data"]["left_out"] == 1
    assert all("skipped" in result[job] for job in ("answers", "classes"))
    assert result["health"]["predictor"]["rows"] == 23
    assert "not measured" in page and "R@10" in capsys.readouterr().out
    Checked(page)


def test_one_question_for_all_pictures_and_names_from_a_file(folder, pictures, tmp_path):
    (tmp_path / "names.txt").write_text("gold\nteal\n\nplum\npurple\n")
    (tmp_path / "templates.txt").write_text("{}\nsome {}\n")
    result, _ = run(folder, tmp_path, "--data-dir", pictures, "--split", "all", "--only", "classes", "--names",
                    tmp_path / "names.txt", "--templates", tmp_path / "templates.txt", "--query", "what is it?")
    found = result["classes"]
    assert (found["questions"], found["names"][3], len(found["templates"])) == (24, "purple", 2)


def test_requests_that_make_no_sense_are_refused(folder, pictures, tmp_path):
    with pytest.raises(ConfigError, match="--data-dir"):
        run(folder, tmp_path, "--data-dir", pictures, "--only", "tools")
    with pytest.raises(FormatError, match="no such folder"):
        evaluate.main(["--model", str(folder), "--json", str(tmp_path / "nowhere" / "r.json")])
    (tmp_path / "empty.txt").write_text("\n")
    for file in (tmp_path / "empty.txt", pictures / "0.png"):
        with pytest.raises(FormatError):
            evaluate.lines_of(file)


# ---------------------------------------------------------------------- the page by itself
def about(**changes):
    return {"command": f"xura eval --split {HOSTILE}", "model": {"name": HOSTILE},
            "data": {"name": HOSTILE, "sha256": "00", "questions": 1, "pictures": 1, "captions": 0,
                     "notes": [HOSTILE]}, "versions": {"xura": "0"}, "seed": 0, "resamples": 10, **changes}


def answers_to(count, picture, wrong=()):
    rows = tuple(Sample(f"{HOSTILE}{i}", picture, HOSTILE, HOSTILE, (HOSTILE,), type=f"{HOSTILE}{i % 5}")
                 for i in range(count))
    right = np.array([i not in wrong for i in range(count)], float)
    return Answers(rows, np.array([HOSTILE] * count), right, np.linspace(0, 1, count), np.zeros((count, 2)),
                   np.arange(count))


def test_nothing_in_the_data_becomes_markup_and_nothing_is_loaded():
    picture = np.zeros((8, 8, 3), np.uint8)
    page = eval_page.html_page({"about": about(), "retrieval": {"skipped": HOSTILE}}, answers_to(9, picture, {1, 2}))
    checked = Checked(page)
    assert "script" not in checked.tags and "link" not in checked.tags and "\x1b" not in page
    assert "default-src 'none'" in page
    assert all(value.startswith("data:image/png;base64,") for name, value in checked.attributes if name == "src")
    assert not re.search(r"https?:|url\(|@import", page)


def test_nothing_in_the_data_moves_the_cursor():
    cell = {"value": 0.5, "low": 0.4, "high": 0.6, "count": 2, "pictures": 2}
    answers = {"types": {"all": {"accuracy": cell}, HOSTILE: {"accuracy": cell}}, "controls": {"reordered": 0.0},
               "confidence": {"mean": 0.5, "auroc": None, "ece": 0.1}, "unknown": 0,
               "blind": [HOSTILE]}
    said = tables.text({"about": about(), "answers": answers, "retrieval": {"skipped": HOSTILE}})
    assert "\x1b" not in said and "50.0 [40.0, 60.0]" in said


def test_alarms_stand_on_the_page():
    row = {"dimensions": 8, "rank": {"value": 1.0}, "cosine": {"value": 0.99}, "uniformity": {"value": -0.1},
           "deviation": [0.0, 0.0, 0.1], "dead": 8}
    found = {"predictor": row, "y_encoder": row, "x_encoder": row, "alignment": {"value": 1.0}, "alarms": [HOSTILE]}
    page = eval_page.html_page({"about": about(), "health": found})
    assert page.count('class="alarm"') == 1 and "No alarm" not in page
    assert eval_page._model_name("runs/jepa/model") == "jepa" and eval_page._model_name("tiny") == "tiny"
    assert "No alarm" in eval_page.html_page({"about": about(), "health": {**found, "alarms": []}})


def test_photographs_keep_the_page_within_two_megabytes():
    photo = np.random.default_rng(0).integers(0, 256, (200, 260, 3), np.uint8)  # noise: nothing compresses worse
    page = eval_page.html_page({"about": about()}, answers_to(400, photo, set(range(0, 400, 2))))
    assert len(page.encode()) <= 2_000_000
    assert page.count("<figure class=\"wrong\"") == page.count("<figure class=\"right\"") == eval_page.CARDS


def test_a_thumbnail_of_a_small_picture_is_the_picture():
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    data, size = eval_page.thumbnail(picture)
    from io import BytesIO

    image = Image.open(BytesIO(base64.b64decode(data.partition(",")[2])))
    assert image.size == size == (30, 20) and np.array_equal(np.asarray(image.convert("RGB")), picture)


def test_the_surest_mistakes_come_first_and_types_take_turns():
    answers = answers_to(40, np.zeros((4, 4, 3), np.uint8), set(range(40)))
    cards = eval_page.choose_cards(answers, 0)
    assert not cards["right"] and len(cards["wrong"]) == eval_page.CARDS and cards["wrong"][0] == 39
    order = sorted(range(40), key=lambda i: -answers.confidence[i])
    chosen = eval_page._varied(order, answers, 3)
    assert chosen[0] == 39 and sorted(chosen) == list(range(40))
    assert len({answers.rows[i].type for i in chosen[:15]}) == 5
