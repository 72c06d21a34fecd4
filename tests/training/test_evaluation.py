"""Laws of the measuring: what an ideal, a blind and a collapsed model get, and what no result may depend on."""

import json
from dataclasses import replace

import numpy as np
import pytest

from training import metrics
from training.data.dataset import Dataset
from training.data.manifest import Sample
from training.data.questions import SceneTables, questions
from training.data.scenes import SceneObject, scene
from training.evaluation import answers, classes, health, material, retrieval
from training.evaluation.answering import Intervals, ask_each, by_type, other_pictures, picture_numbers, read, score
from training.evaluation.tables import blind
from training.phases.common import image_key
from xuracore.errors import ConfigError, FormatError

INTERVALS = Intervals(seed=3, resamples=50)


class Seer:
    """Stands for a model that answers rightly what it is asked about the picture it is shown.

    embed : how a text becomes a unit vector.  Shown a picture it was not asked about, it describes that one.
    """

    def __init__(self, rows, embed=None):
        self.rows = {(image_key(row), row.query): row for row in rows}
        self.names = sorted({row.answer for row in rows})
        self.config = type("Config", (), {"answers": tuple(self.names)})()
        self.scale, self.embed = 20.0, embed or self.own_direction
        self.y_encoder = type("Texts", (), {"tokens": staticmethod(lambda texts: texts)})()

    def own_direction(self, text):
        x = np.random.default_rng(list(text.encode())).standard_normal(16)
        return (x / np.linalg.norm(x)).astype(np.float32)

    def encode_answers(self, texts):
        return type("Encoded", (), {"data": np.stack([self.embed(text) for text in texts])})()

    def query_tokens(self, queries):
        return list(queries)

    def predictor(self, queries, visual):
        said = [self.rows.get((picture, query)) for query, picture in zip(queries, visual)]
        texts = [row.answer if row else self.names[0] for row in said]
        return type("Reading", (), {"embedding": self.encode_answers(texts)})()


def keys(rows):
    """In place of visual tokens: which picture it is."""
    return [image_key(row) for row in rows]


def rows_about(pictures=30, seed=0, kinds=4):
    rng = np.random.default_rng(seed)
    return tuple(Sample(f"{p}/{q}", f"p{p}", f"question {q}?", str(rng.integers(5)), type=f"kind {q}")
                 for p in range(pictures) for q in range(kinds))


def with_answers(rows):
    return tuple(replace(row, answers=(row.answer,)) for row in rows)


ROWS = with_answers(rows_about())
MATERIAL = material.Material("rows", ROWS, lambda: ROWS[: len(ROWS) // 2])


# ---------------------------------------------------------------------- judging
def test_a_right_answer_is_one_of_those_given():
    row = Sample("1", query="?", answer="two", answers=("two", "2"))
    assert (score("Two ", row), score("2", row), score("three", row)) == (1, 1, 0)
    ten = Sample("1", query="?", answer="red", answers=("red",) * 2 + ("dark red",) * 8)
    assert score("red", ten) == pytest.approx(2 / 3) and score("dark red", ten) == 1


def test_choices_limit_what_can_be_said():
    row = replace(ROWS[0], choices=("7", "8"), answer="8", answers=("8",))
    said = read(Seer([row]), [row, replace(row, choices=("7", "9"))], keys).said
    assert said[0] == "8" and said[1] in ("7", "9")


def test_neither_batches_nor_order_change_an_answer():
    model = Seer(ROWS)
    whole, parts = read(model, ROWS, keys), read(model, ROWS, keys, batch_size=7)
    assert np.array_equal(whole.said, parts.said) and np.allclose(whole.confidence, parts.confidence)
    back = read(model, ROWS[::-1], keys)
    assert np.array_equal(whole.said, back.said[::-1]) and np.array_equal(whole.right, back.right[::-1])


def test_another_picture_is_another_one_and_the_same_for_all_its_questions():
    other = other_pictures(ROWS, seed=1)
    pairs = {(image_key(row), image_key(shown)) for row, shown in zip(ROWS, other)}
    assert len(pairs) == 30 and all(a != b for a, b in pairs)
    assert len({b for _, b in pairs}) == 30
    assert other_pictures(ROWS, seed=1) == other != other_pictures(ROWS, seed=2)


# ---------------------------------------------------------------------- answers and controls
def test_who_sees_is_right_and_who_is_shown_another_picture_is_not():
    report, said = answers.measure(Seer(ROWS), MATERIAL, keys, INTERVALS)
    cells = report["types"]["all"]
    assert cells["accuracy"]["value"] == 1 and cells["accuracy"]["low"] < 0.95 and cells["accuracy"]["high"] == 1
    assert cells["gain"]["value"] == 1 - cells["shuffled"]["value"] and not report["blind"]
    for control in ("shuffled", "permuted", "prior"):
        assert cells[control]["value"] < 0.45, control
        assert cells[control]["low"] <= cells[control]["value"] <= cells[control]["high"]
    assert report["controls"]["reordered"] == 0 == report["unknown"]
    assert np.array_equal(said.right, np.ones(len(ROWS)))


def test_who_says_one_thing_always_gets_the_same_shown_any_picture():
    model = Seer([replace(row, answer="1") for row in ROWS])
    cells = answers.measure(model, MATERIAL, keys, INTERVALS)[0]["types"]["all"]
    share = np.mean([row.answer == "1" for row in ROWS])
    assert cells["accuracy"]["value"] == cells["shuffled"]["value"] == cells["permuted"]["value"] == share
    assert cells["gain"]["value"] == 0


def test_an_alarm_is_raised_where_the_picture_adds_nothing():
    seen = [replace(row, answer="1") if row.type == "kind 2" else row for row in ROWS]
    report, _ = answers.measure(Seer(seen), MATERIAL, keys, INTERVALS)
    assert report["blind"] == ["kind 2"]
    assert "kind 2" in blind(report["blind"])
    few = material.Material("few", ROWS[:40], lambda: ROWS[40:])
    assert answers.measure(Seer(seen), few, keys, INTERVALS)[0]["blind"] == []


def test_a_model_that_goes_by_the_order_of_candidates_is_found_out():
    collapsed = Seer(ROWS, embed=lambda text: np.ones(4, np.float32) / 2)  # all alike: the first one wins
    assert answers.measure(collapsed, MATERIAL, keys, INTERVALS)[0]["controls"]["reordered"] == 1


def test_a_cell_does_not_depend_on_what_else_is_measured():
    right = np.arange(len(ROWS)) % 3 > 0
    pictures = picture_numbers(ROWS)
    whole = INTERVALS.by_type("x", ROWS, right, pictures)
    first = [i for i, row in enumerate(ROWS) if row.type == "kind 0"]
    alone = INTERVALS.by_type("x", [ROWS[i] for i in first], right[first], pictures[first])
    assert alone["kind 0"] == whole["kind 0"] and whole["kind 0"]["pictures"] == 30
    assert by_type(ROWS, right)["all"] == (pytest.approx(2 / 3), len(ROWS))


def test_the_confusion_counts_every_question_once():
    found = answers.confusion(read(Seer(ROWS), ROWS, keys), most=3)
    assert len(found["answers"]) == 3 and found["said"][-1] == "other"
    assert sum(map(sum, found["counts"])) == sum(row.answer in found["answers"] for row in ROWS)
    assert all(row[i] == sum(row) for i, row in enumerate(found["counts"]))


# ---------------------------------------------------------------------- what the generator refuses to ask
def thing(colour, shape, x, y):
    return SceneObject(colour, shape, "small", x, y, 4)


def scene_of(*things):
    return replace(scene("test", 0), objects=things)


def asked(this, kind):
    return {(q.arguments[0], q.answer) for q in questions(this, per_type=20, types=(kind,))}


def test_near_ties_are_not_asked_about():
    pair = thing("red", "circle", 32, 32), thing("blue", "square", 20, 32)
    near, clear = (scene_of(*pair, thing("green", "triangle", x, 32)) for x in (46, 47))
    for kind, answer in (("closest_shape", "square"), ("furthest_shape", "triangle")):
        assert "red" not in {name for name, _ in asked(near, kind)}  # 12 and 14 pixels away
        assert ("red", answer) in asked(clear, kind)
    assert "red" not in {name for name, _ in asked(near, "horizontal")}  # half a pixel from the middle


def test_no_object_is_its_own_neighbour():
    """The flaw of the popular generator: a placeholder distance on the diagonal that some distances exceed."""
    for index in range(60):
        tables = SceneTables(scene("test", index))
        for i in range(tables.count):
            for sign in (1, -1):
                j = tables.extreme(i, sign)
                others = sorted(tables.distances[i][k] for k in range(tables.count) if k != i)
                gap = others[1] - others[0] if sign == 1 else others[-1] - others[-2]
                assert j != i and (j is None) == (gap < 3)


def test_the_sort_of_clevr_table_has_its_six_subtypes_and_two_halves():
    rows = Dataset.scenes("test", 12).rows
    seen = material.Material("scenes", rows, lambda: rows, splits={"ood": Dataset.scenes("ood", 6).rows}, generated=True)
    every = [*rows, *seen.splits["ood"]]
    table = answers.measure(Seer(every), seen, keys, INTERVALS)[0]["sort_of_clevr"]
    assert list(table) == ["note", "shape", "horizontal", "vertical", "non-relational", "closest_shape",
                           "furthest_shape", "same_shape_count", "relational"]
    half = table["relational"]["accuracy"]
    assert half["value"] == 1 and half["count"] == sum(
        table[name]["accuracy"]["count"] for name in ("closest_shape", "furthest_shape", "same_shape_count"))
    assert "3 pixels" in table["note"] and "cannot be compared" in table["note"]


# ---------------------------------------------------------------------- classes
def test_one_template_is_the_name_itself_and_several_are_their_direction():
    model = Seer(ROWS)
    names = ["cat", "dog", "cow"]
    np.testing.assert_allclose(classes.class_embeddings(model, names, ("{}",)), model.encode_answers(names).data,
                               rtol=1e-6)
    templates = ["{}", "a {}", "the {} there"]
    found = classes.class_embeddings(model, names, templates)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(found, classes.class_embeddings(model, names, templates[::-1]), rtol=1e-5)
    mean = sum(model.embed(t.replace("{}", "dog")) for t in templates)
    np.testing.assert_allclose(found[1], mean / np.linalg.norm(mean), rtol=1e-5)


def test_classes_are_found_by_name_and_those_never_taught_are_counted():
    model = Seer(ROWS)
    model.config.answers = ("0", "1", "2", "3")
    found = classes.measure(model, ROWS, keys, INTERVALS, templates=("{}",))
    assert found["names"] == ["0", "1", "2", "3", "4"] and found["unseen"] == ["4"]
    assert found["top1"]["value"] == found["plain"]["value"] == found["unseen_top1"]["value"] == 1
    assert found["chance"] == 0.2 and found["top5"] is None and found["recall"]["4"] == 1
    assert "skipped" in classes.measure(model, ROWS, keys, INTERVALS, names=["4"])


def test_a_template_needs_one_place_for_the_name():
    for bad in ("a cat", "{} and {}"):
        with pytest.raises(ConfigError, match="template"):
            classes.class_embeddings(Seer(ROWS), ["cat"], (bad,))


# ---------------------------------------------------------------------- retrieval
def captioned(count=12, same=2):
    """Pictures with two captions each; the first ``same`` pictures share one."""
    return [Sample(f"{p}/{c}", f"p{p}", caption="everywhere" if c == 0 and p < same else f"picture {p}, caption {c}")
            for p in range(count) for c in range(2)]


def test_who_describes_its_picture_finds_it_both_ways():
    rows = captioned()
    model = Seer([replace(row, query="what?", answer=row.caption.lower()) for row in ask_each(rows, "what?")])
    found = retrieval.measure(model, rows, keys, INTERVALS, query="what?")
    assert (found["pictures"], found["captions"]) == (12, 23)
    assert found["to_caption"]["recall_at_1"]["value"] == 1 and found["to_caption"]["median_rank"]["value"] == 1
    assert found["to_picture"]["recall_at_1"]["value"] >= 0.5  # second captions are as good as unknown
    blind = retrieval.measure(Seer(ROWS, embed=lambda text: np.ones(4, np.float32) / 2), rows, keys, INTERVALS)
    assert blind["to_caption"]["recall_at_10"]["value"] == 0  # what is all alike finds nothing


def test_the_chance_of_retrieval_is_that_of_a_random_order():
    rng = np.random.default_rng(0)
    fits = rng.random((6, 9)) < 0.3
    fits[:, 0] = True
    drawn = [metrics.recall_at_k(rng.random(fits.shape), fits, 3) for _ in range(3000)]
    assert retrieval.chance(fits.sum(axis=1), 9, 3) == pytest.approx(np.mean(drawn), abs=0.01)
    assert retrieval.chance(fits.sum(axis=1), 9, 9) == 1


def test_retrieval_in_parts_is_retrieval_at_once(monkeypatch):
    rng = np.random.default_rng(0)
    asked, gallery = rng.standard_normal((9, 4)), rng.standard_normal((7, 4))
    pairs = np.array([(i, (3 * i) % 7) for i in range(9)] + [(0, 1)])
    whole = retrieval._one_way("x", asked, gallery, pairs, INTERVALS)
    monkeypatch.setattr(retrieval, "ROWS", 2)
    assert retrieval._one_way("x", asked, gallery, pairs, INTERVALS) == whole
    assert 1 < whole["median_rank"]["value"] < 7


def test_captions_nobody_can_read_are_said_to_be_so():
    found = retrieval.measure(Seer(ROWS), captioned()[:1], keys, INTERVALS)
    assert "two pictures" in found["skipped"]


# ---------------------------------------------------------------------- health
def described(x):
    return health.describe(x, np.arange(len(x)), INTERVALS)


def test_embeddings_in_all_directions_are_well_and_collapsed_ones_are_not():
    rng = np.random.default_rng(0)
    spread = described(rng.standard_normal((300, 64)))
    assert not health.alarms(spread, "x", 30) and spread["dead"] == 0 and spread["rank"]["value"] > 50
    assert spread["deviation"][1] == pytest.approx(1, abs=0.1)
    one_way = described(rng.standard_normal(64) + 0.05 * rng.standard_normal((300, 64)))
    assert any("cosine" in alarm for alarm in health.alarms(one_way, "x", 30))
    plane = described(rng.standard_normal((300, 2)) @ rng.standard_normal((2, 64)))
    assert any("effective rank" in alarm for alarm in health.alarms(plane, "x", 30))


def test_two_answers_need_but_a_line():
    line = described(np.random.default_rng(0).choice([-1.0, 1.0], (200, 1)) * np.ones(64))
    assert line["rank"]["value"] == pytest.approx(1) and not health.alarms(line, "x", 2)
    assert health.alarms(line, "x", 10)


def test_health_of_a_model_and_of_a_collapsed_one():
    features = type("Features", (), {"tokens": np.random.default_rng(0).standard_normal((30, 5, 8))})
    well = health.measure(Seer(ROWS), read(Seer(ROWS), ROWS, keys), features, INTERVALS)
    assert not well["alarms"] and well["alignment"]["value"] == pytest.approx(0, abs=1e-6)
    flat = Seer(ROWS, embed=lambda text: np.ones(16, np.float32) / 4)
    ill = health.measure(flat, read(flat, ROWS, keys), features, INTERVALS)
    assert len(ill["alarms"]) == 2 and all("cosine" in alarm for alarm in ill["alarms"])  # 5 % of 16 is below 1


# ---------------------------------------------------------------------- material
def write_rows(folder, rows):
    from PIL import Image

    for name in {row["image"] for row in rows if row["image"]}:
        Image.new("RGB", (32, 32), (int(name[1:3]) * 7, 90, 60)).save(folder / name)
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def own_rows(splits):
    return [{"image": f"p{i:02d}.png", "query": "which?", "answer": str(i % 3), **({"split": s} if s else {})}
            for i, s in enumerate(splits)]


@pytest.mark.parametrize("splits, wanted, count", [
    (["train"] * 6 + ["val"] * 3 + ["test"] * 2, None, 2), (["train"] * 6 + ["val"] * 3, None, 3),
    ([None] * 21, None, 3), (["train"] * 4 + ["test"], "train", 4), (["train"] * 4 + ["test"], "all", 5),
])  # fmt: skip
def test_own_data_are_measured_on_what_training_left_out(tmp_path, splits, wanted, count):
    write_rows(tmp_path, own_rows(splits))
    found = material.own(tmp_path, wanted)
    assert len(found.rows) == count
    kept_apart = {row.id for row in found.prior_rows()}.isdisjoint(row.id for row in found.rows)
    assert kept_apart != any("flatters" in note for note in found.notes)


def test_the_data_hash_knows_pictures_and_texts(tmp_path):
    rows = own_rows(["test"] * 3)
    write_rows(tmp_path, rows)
    before = material.own(tmp_path).sha256()
    assert before == material.own(tmp_path).sha256()
    (tmp_path / "p01.png").write_bytes((tmp_path / "p02.png").read_bytes())
    after = material.own(tmp_path).sha256()
    rows[0]["answer"] = "9"
    write_rows(tmp_path, rows)
    assert len({before, after, material.own(tmp_path).sha256()}) == 3


def test_what_cannot_be_measured_is_refused(tmp_path):
    write_rows(tmp_path, own_rows(["train"] * 4))
    with pytest.raises(ConfigError, match="'nowhere'"):
        material.own(tmp_path, "nowhere")
    limited = material.own(tmp_path, "all", limit=2)
    assert len(limited.rows) == 2 and "first 2 of 4" in limited.notes[0]
    with pytest.raises(FormatError):
        material.own(tmp_path / "missing")


def test_of_very_many_types_the_commonest_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(material, "MOST_TYPES", 2)
    rows = [{**row, "type": "ab"[i % 2] if i < 6 else f"rare {i}"} for i, row in enumerate(own_rows(["test"] * 9))]
    write_rows(tmp_path, rows)
    found = material.own(tmp_path)
    assert {row.type for row in found.rows} == {"a", "b", "other types"} and "commonest" in " ".join(found.notes)
