"""Caption metrics: values worked out by hand, and the laws that any such metric obeys."""
import math

import numpy as np
import pytest

from training.caption_metrics import bleu4, cider, object_scores, objects, words
from xuracore.errors import ShapeError

CAT = words("The cat sat on the mat.")
DOG = words("a dog ran over the green grass")
SUN = words("the sun is low and the sea is calm")


def test_words_have_no_marks():
    assert CAT == ["the", "cat", "sat", "on", "the", "mat"]


def test_a_perfect_caption_has_the_best_score():
    assert bleu4([CAT, DOG], [[CAT], [DOG]]) == pytest.approx(1.0)
    assert cider([CAT, DOG], [[CAT], [DOG]]) == pytest.approx(10.0)


def test_nothing_right_scores_nothing():
    assert bleu4([CAT], [[["one", "two", "three", "four"]]]) == 0.0
    assert cider([["x"] * 5, ["y"] * 5], [[CAT], [DOG]]) == 0.0
    assert bleu4([[]], [[CAT]]) == 0.0 and cider([[], DOG], [[CAT], [DOG]]) == pytest.approx(5.0)


def test_bleu_by_hand():
    said = words("the cat the cat on the mat")
    known = [words("the cat is on the mat"), words("there is a cat on the mat")]
    # unigrams: the 2 (clipped), cat 1, on 1, mat 1 = 5 of 7; bigrams the-cat 1, cat-on 1, on-the 1, the-mat 1 = 4 of 6;
    # trigrams cat-on-the, on-the-mat = 2 of 5; 4-grams cat-on-the-mat = 1 of 4; as long as the second reference
    assert bleu4([said], [known]) == pytest.approx((5 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25)


def test_brevity_is_punished():
    short = CAT[:5]
    assert bleu4([short], [[CAT]]) == pytest.approx(math.exp(1 - 6 / 5))


def test_cider_by_hand():
    """Two pictures; only what one of them alone has counts, by log 2; one word of two is right."""
    said, known = [["red", "cat"], ["blue", "dog"]], [[["red", "dog"]], [["blue", "dog"]]]
    # first: "red" has weight log 2, "cat" (in no reference) log 2, "dog" 0: cosine 1/√2 for unigrams, bigram 0
    # second: unigram "blue" alone weighs, cosine 1; bigram 1; longer ones: none
    assert cider(said, known) == pytest.approx(10 / 4 * ((1 / math.sqrt(2)) + (1 + 1)) / 2)


def test_cider_forgives_little_length():
    longer = CAT + ["today"] * 6
    same = cider([CAT, SUN], [[CAT], [SUN]])
    assert cider([longer, SUN], [[CAT], [SUN]]) < 0.85 * same


def test_order_of_pictures_and_references_does_not_matter():
    said, known = [CAT, DOG, SUN], [[CAT, DOG], [SUN], [SUN, CAT]]
    for metric in (bleu4, cider):
        assert metric(said, known) == pytest.approx(metric(said[::-1], [texts[::-1] for texts in known[::-1]]))


def test_objects_are_named_in_any_order():
    there = "a small red circle, a large blue square and a small gray circle"
    said = "a large blue square, a small red circle and a small gray triangle"
    assert objects(there) == objects("a small gray circle, a large blue square and a small red circle")
    scores = object_scores([there, said], [there, there])
    assert scores == {"exact": 0.5, "objects_exact": 0.5, "precision": pytest.approx(5 / 6), "recall": pytest.approx(5 / 6)}
    assert np.isclose(object_scores(["a small red circle"], [there])["recall"], 1 / 3)


def test_bad_arguments_are_named():
    for metric in (bleu4, cider):
        with pytest.raises(ShapeError, match="1 candidates for 2"):
            metric([CAT], [[CAT], [DOG]])
        with pytest.raises(ShapeError, match="list of words, got the text"):
            metric(["the cat"], [[CAT]])
        with pytest.raises(ShapeError, match=r"references\[0\]"):
            metric([CAT], [CAT])
    with pytest.raises(ShapeError, match="0 captions"):
        object_scores([], [])
