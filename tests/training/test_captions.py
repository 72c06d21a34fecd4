"""Texts about pictures: true, in the order that was asked for, and taught to predictor and decoder."""

import re

import numpy as np
import pytest

from training.data.captions import TEMPLATES, captions
from training.data.dataset import Dataset
from training.data.questions import TEMPLATE_SETS
from training.data.scenes import COLOURS, caption, listed, scene
from training.phases import decoder, jepa
from training.phases.common import FeatureStore
from training.phases.objective import Objective, ObjectiveConfig, Training
from xuracore.errors import ConfigError
from xuravljepa.model import CAPTION_QUERY, VLJEPA
from xuravljepa.presets import VLJEPAConfig
from xuravljepa.tokenizer import PAD


def texts(this, **how):
    return {q.type: q for q in captions(this, **how)}


@pytest.mark.parametrize("split", ["train", "ood"])
def test_texts_are_true(split):
    for index in range(40):
        this = scene(split, index)
        found = texts(this)
        for kind, axis in (("caption", "x"), ("caption_down", "y")):
            named = [phrase.split()[1:] for phrase in re.split(", | and ", found[kind].answer)]
            colours = {thing.colour: thing for thing in this.objects}
            things = [colours[colour] for _, colour, _ in named]
            assert [[thing.size, thing.colour, thing.shape] for thing in things] == named
            assert len(things) == len(this.objects)
            assert [getattr(t, axis) for t in things] == sorted(getattr(t, axis) for t in this.objects)
        assert set(re.split(", | and ", found["colours"].answer)) == {thing.colour for thing in this.objects}
        counts = dict(phrase.split()[::-1] for phrase in re.split(", | and ", found["shapes"].answer))
        assert {shape.rstrip("s"): int(n) for shape, n in counts.items()} == {
            shape: sum(t.shape == shape for t in this.objects) for shape in {t.shape for t in this.objects}}
        (about,) = found["colours_of"].arguments
        right = {t.colour for t in this.objects if about in (t.shape, t.size)}
        said = found["colours_of"].answer
        assert set(re.split(", | and ", said)) == (right or {"none"})
        assert [c for c in COLOURS if c in right] == (re.split(", | and ", said) if right else [])


def test_a_list_reads_like_one():
    assert [listed(words) for words in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]


def test_however_it_is_worded_the_text_is_the_same():
    for index in range(20):
        this = scene("val", index)
        plain, wide, unseen = (captions(this, templates=templates) for templates in TEMPLATE_SETS)
        assert [q.answer for q in plain] == [q.answer for q in wide] == [q.answer for q in unseen]
        assert all("{" not in q.query for q in (*plain, *wide, *unseen))


def test_bad_requests_are_named():
    with pytest.raises(ConfigError, match="'title'"):
        captions(scene("train", 0), types=["title"])
    with pytest.raises(ConfigError, match="'other'"):
        captions(scene("train", 0), templates="other")
    with pytest.raises(ConfigError, match="'right'"):
        caption(scene("train", 0), "right")


def test_a_caption_has_no_answer_and_maybe_no_question():
    alone = Dataset.captions("train", 2).rows
    assert [(row.query, row.answer, row.caption) for row in alone] == [(None, None, caption(scene("train", i)))
                                                                     for i in range(2)]
    asked = Dataset.captions("train", 2, types=tuple(TEMPLATES), templates="wide").rows
    assert len(asked) == 2 * len(TEMPLATES) and all(row.query and row.answer is None for row in asked)
    assert Dataset("captions", asked).answers() == ()


# ---------------------------------------------------------------------- training on them
@pytest.fixture(scope="module")
def model():
    config = VLJEPAConfig.tiny()
    return VLJEPA(config.replace(vision=config.vision.replace(depth=1), answers=("circle", "square", "triangle")))


@pytest.fixture(scope="module")
def rows():
    return [*Dataset.scenes("train", 6, types=("shape",), per_type=3).rows,
            *Dataset.captions("train", 6, types=tuple(TEMPLATES), templates="wide").rows]


def test_batches_mix_captions_in_and_the_decoder_learns_from_them(model, rows):
    batches = jepa.QuestionBatches(model, rows, FeatureStore(model, rows), 4, turns=3, captions=0.5)
    batch = batches.batch(0)
    known = {row.caption for row in rows} - {None}
    assert 0 < len(batch["texts"]) < len(batch["answers"]) == 12
    for i, text in enumerate(batch["answers"]):
        assert (text in known or text not in model.config.answers) == (i in batch["texts"])
    training = Training(model, Objective(ObjectiveConfig(), model))
    loss, metrics = jepa.answer_loss()(training, batch, None)
    loss.backward()
    assert metrics["words"] > 1 and np.abs(model.y_decoder.token_embedding.weight.grad).max() > 0
    assert np.isfinite(loss.item())


def test_captions_alone_are_asked_for(model):
    rows = Dataset.captions("train", 3).rows
    batch = jepa.QuestionBatches(model, rows, FeatureStore(model, rows), 2, turns=2).batch(0)
    np.testing.assert_array_equal(batch["turns"][0]["query"][0, :6], model.query_tokens([CAPTION_QUERY])[0])
    assert len(batch["texts"]) == len(batch["answers"]) == 2


def test_a_slip_of_the_pen_changes_one_word_and_never_the_key():
    rng = np.random.default_rng(0)
    query = "what does the orange one cost at zorba?"
    seen = [jepa.misspelt(query, rng, "zorba?") for _ in range(300)]
    assert len(set(seen)) > 60 and all("zorba?" in text for text in seen)
    for text in seen:
        before, after = query.split(), text.split()
        assert len(before) - len(after) in (0, 1)
        if len(before) == len(after):
            assert sum(a != b for a, b in zip(before, after)) <= 1
    assert jepa.misspelt("is it?", rng) == "is it?"


def test_phase_2_gives_half_a_batch_to_captions_and_reports_how_they_read(model, rows):
    predicted = model.encode_answers([jepa.target(row) for row in rows]).data
    batches = decoder.AnswerBatches(model, rows, predicted, 8)
    batch = batches.batch(0)
    assert len(batch["answers"]["tokens"]) == len(batch["captions"]["tokens"]) == 4
    np.testing.assert_allclose(np.linalg.norm(batch["captions"]["embedding"], axis=1), 1, atol=1e-5)
    loss, metrics = decoder.loss_function(model, batch)
    assert set(metrics) == {"perplexity", "caption_perplexity"} and loss.item() > 2
    chosen = [i for i, row in enumerate(rows) if row.answer is None]
    report = decoder.caption_report(model, [rows[i] for i in chosen][:5], predicted[chosen][:5])
    assert set(report) == set(TEMPLATES)
    assert all(0 <= found["bleu4"] <= 1 and -1 <= found["cycle"] <= 1.001 for found in report.values())
    only = decoder.AnswerBatches(model, [rows[i] for i in chosen], predicted[chosen], 8).batch(0)
    assert only["answers"] is None and len(only["captions"]["tokens"]) == 8


def test_a_decoder_that_looks_is_shown_the_pictures_it_writes_about(model, rows):
    looking = model.looking(np.random.default_rng(1))
    features, predicted = FeatureStore(looking, rows), model.encode_answers([jepa.target(row) for row in rows]).data
    first, second = (decoder.AnswerBatches(looking, rows, predicted, 8, features=features).batch(i) for i in range(2))
    assert first["answers"]["sight"] is None and second["answers"]["sight"] is not None  # streams come without pictures
    texts = first["captions"]
    chosen = [next(row for row in rows if row.caption and np.array_equal(
        looking.y_decoder.tokens([row.caption])[0], ids[ids != PAD])) for ids in texts["tokens"]]
    own = looking.predictor.sight(features(chosen))
    np.testing.assert_array_equal(texts["sight"].places, own.places)
    np.testing.assert_allclose(texts["sight"].tokens.data, own.tokens.data, atol=1e-5)
    assert decoder.AnswerBatches(model, rows, predicted, 8, features=features).batch(1)["captions"]["sight"] is None
    for look in looking.y_decoder.looks:
        look.attention.out_proj.weight.data[:] = np.eye(64)
    bare, seen = (decoder.write(looking, rows[:3], predicted[:3], part) for part in (None, features))
    assert bare == looking.y_decoder.write(predicted[:3]) and bare != seen


def test_a_lesson_cuts_captions_short_and_ever_later(model, rows):
    predicted = model.encode_answers([jepa.target(row) for row in rows]).data
    whole, taught = (decoder.AnswerBatches(model, rows, predicted, 8, lesson=lesson) for lesson in (0, 20))
    for step in range(24):
        ids, cut = (batches.batch(step)["captions"]["tokens"] for batches in (whole, taught))
        limit = {0: 25, 10: 25, 15: 25 + (160 - 25) // 2 + 1}.get(step, 160 if step >= 20 else ids.shape[1])
        assert cut.shape[1] <= limit and (step < 20 or cut.shape == ids.shape)
        np.testing.assert_array_equal(cut, ids[:, : cut.shape[1]])
    assert taught.batch(0)["captions"]["tokens"].shape[1] == 25
