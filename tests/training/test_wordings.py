"""The grammar of wordings says what it should, and never what is kept for the test."""

import re

import pytest

from training.data import wordings
from training.data.questions import QUESTION_TYPES
from training.data.rng import Draws
from training.data.wordings import UNSEEN, WIDE, Draw, parse, sentences, spell, wide
from xuracore.errors import ConfigError

NOUNS = {"one", "object", "thing", "item", "figure"}


def skeleton(sentence):
    """The words of a sentence without articles and marks, and with one word for an object."""
    words = (w for w in re.findall(r"[\w{}]+(?:'s)?", sentence) if w not in ("the", "a", "an", "{an}"))
    return tuple("one" if word in NOUNS else word for word in words)


def shortened(words):
    """The words, and the words with any one left out: two that are a word apart have one of these in common."""
    return {words} | {words[:i] + words[i + 1:] for i in range(len(words))}


@pytest.mark.parametrize("name", WIDE)
def test_no_wording_of_training_is_within_a_word_of_one_of_the_test(name):
    patterns = WIDE[name] + (QUESTION_TYPES[name].templates if name in QUESTION_TYPES else ())
    trained = {skeleton(text) for pattern in patterns for text in sentences(parse(pattern))}
    assert len(trained) >= 16 and len(UNSEEN[name]) == 4
    for unseen in UNSEEN[name]:
        near = set().union(*map(shortened, undressed(skeleton(unseen))))
        assert not [words for words in trained if shortened(words) & near], unseen


def test_half_of_the_test_has_words_that_training_never_says():
    templates = {name: kind.templates for name, kind in QUESTION_TYPES.items()}
    patterns = [pattern for name in WIDE for pattern in WIDE[name] + templates.get(name, ())]
    patterns += [*wordings._OPENINGS, *wordings._REQUESTS, *wordings._CLOSINGS]
    said = {word for pattern in patterns for text in sentences(parse(pattern)) for word in re.findall(r"\w+", text)}
    new = [bool(set(re.findall(r"\w+", re.sub(r"{\w+}", "", text))) - said)
           for name in UNSEEN for text in UNSEEN[name]]
    assert sum(new) >= len(new) / 2


def undressed(words):
    """The words, and what is left without an opening or an end that training may add."""
    found = [words]
    for pattern in (*wordings._OPENINGS, *wordings._REQUESTS, *wordings._CLOSINGS):
        for extra in map(skeleton, sentences(parse(pattern))):
            found += [words[len(extra):]] * (words[:len(extra)] == extra)
            found += [words[:-len(extra)]] * (words[-len(extra):] == extra)
    return found


def test_every_choice_is_made_and_nothing_else_said():
    pattern = "(what|which) size has (a|(big|small) b)?"
    said = set(sentences(parse(pattern)))
    assert said == {f"{w} size has {x}?" for w in ("what", "which") for x in ("a", "big b", "small b")}
    draws = Draws("test")
    assert {spell(parse(pattern), Draw(draws.word())) for _ in range(200)} == said


@pytest.mark.parametrize("name", WIDE)
def test_wordings_fill_their_slots_and_are_many(name):
    draws = Draws("wordings", name)
    slots = {"two_hop": ("left of", "gray"), "existence": ("orange", "square"), "compare_count": ("circle", "square"),
             "count_size": ("small", ""), "price": ("red", "zorba"), "sum": ("square", "7")}
    if name in ("colour_of_shape", "count_shape"):
        words = ("square", "")
    else:
        words = slots.get(name, ("gray", "blue"))
    said = {wide(WIDE[name], dict(zip("ab", words)), Draw(draws.word())) for _ in range(400)}
    assert len(said) > 150
    for text in said:
        assert text == text.strip() and "  " not in text and not set(text) & set("{}()|") and text == text.lower()
        assert "boxs" not in text and not re.search(r"\ba orange\b|\ban (?!orange|object|item)", text), text


def test_a_word_draws_evenly_and_always_the_same():
    assert [Draw(12345 << 40).below(7) for _ in range(3)] == [Draw(12345 << 40).below(7)] * 3
    draws = Draws("even")
    counts = [0] * 5
    for _ in range(2000):
        counts[Draw(draws.word()).below(5)] += 1
    assert min(counts) > 300 and max(counts) < 500


def test_a_broken_pattern_is_named():
    with pytest.raises(ConfigError, match="a bracket or a bar too many"):
        parse("what (a|b)) is it?")
