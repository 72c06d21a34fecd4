"""Every answer is recomputed here from the words of the question, by slower and separate means."""
import re
from collections import Counter

import numpy as np
import pytest

from training.data.questions import (MAX_QUERY_BYTES, NON_RELATIONAL, QUESTION_TYPES, RELATIONAL,
                                     TEMPLATE_SETS, questions)
from training.data.scenes import COLOURS, HELD_OUT_PAIRS, SHAPES, SIZES, SPLITS, scene
from xuracore.errors import ConfigError

GAP = 3


OTHER = {"grey": "gray", "disc": "circle", "discs": "circle", "box": "square", "boxes": "square", "big": "large",
         "little": "small", "tiny": "small"}


def words_of(query, vocabulary):
    cleaned = [w.strip("?,:.").removesuffix("'s") for w in query.split()]
    cleaned = [OTHER.get(w, w) for w in cleaned]
    return [w.removesuffix("s") if w not in vocabulary else w for w in cleaned
            if w in vocabulary or w.removesuffix("s") in vocabulary]


def the(this, colour):
    (found,) = [o for o in this.objects if o.colour == colour]
    return found


def ranked(this, anchor):
    others = [o for o in this.objects if o is not anchor]
    distance = np.array([np.sqrt((o.x - anchor.x) ** 2.0 + (o.y - anchor.y) ** 2.0) for o in others])
    order = np.argsort(distance)
    return [others[i] for i in order], distance[order]


def half(value, low, high):
    assert abs(value - 31.5) >= GAP
    return low if value < 31.5 else high


def nearest(this, colour):
    order, distance = ranked(this, the(this, colour))
    assert distance[1] - distance[0] >= GAP
    return order[0]


def furthest(this, colour):
    order, distance = ranked(this, the(this, colour))
    assert distance[-1] - distance[-2] >= GAP
    return order[-1]


def alone_on_side(this, query, colour):
    words = {"over": "above", "top": "above", "under": "below", "underneath": "below"}
    side = next(words.get(w, w) for w in query.split() if words.get(w, w) in ("left", "right", "above", "below"))
    anchor = the(this, colour)
    axis, sign = {"left": ("x", -1), "right": ("x", 1), "above": ("y", -1), "below": ("y", 1)}[side]
    offsets = {o.colour: sign * (getattr(o, axis) - getattr(anchor, axis))
               for o in this.objects if o is not anchor}
    assert all(abs(offset) >= GAP for offset in offsets.values())
    (only,) = [c for c, offset in offsets.items() if offset > 0]
    return the(this, only)


def in_order(query, colours, after):
    """The two colours, the one that is said to come first in front."""
    words = set(re.findall(r"\w+", query))
    swapped = bool(words & after) != bool(words & {"seen", "compared"})
    return colours[::-1] if swapped else colours


def before(a, b, axis):
    assert abs(getattr(a, axis) - getattr(b, axis)) >= GAP
    return "yes" if getattr(a, axis) < getattr(b, axis) else "no"


def recompute(this, asked):
    """The right answer, from the text of the question and the scene."""
    colours, shapes = words_of(asked.query, COLOURS), words_of(asked.query, SHAPES)
    sizes = words_of(asked.query, SIZES)
    count = Counter(o.shape for o in this.objects)
    match asked.type:
        case "shape" | "size":
            return getattr(the(this, *colours), asked.type)
        case "colour_of_shape":
            (found,) = [o for o in this.objects if o.shape == shapes[0]]
            return found.colour
        case "horizontal":
            return half(the(this, *colours).x, "left", "right")
        case "vertical":
            return half(the(this, *colours).y, "top", "bottom")
        case "existence":
            pairs = [(o.colour, o.shape) for o in this.objects]
            return "yes" if (colours[0], shapes[0]) in pairs else "no"
        case "count_shape":
            return str(count[shapes[0]])
        case "count_size":
            return str(sum(o.size == sizes[0] for o in this.objects))
        case "closest_shape" | "closest_colour" | "closest_size":
            return getattr(nearest(this, *colours), asked.type.removeprefix("closest_"))
        case "furthest_shape":
            return furthest(this, *colours).shape
        case "same_shape_count":
            shape = the(this, *colours).shape
            return str(sum(o.shape == shape for o in this.objects if o.colour != colours[0]))
        case "left_of":
            after = set() if "left" in asked.query else {"right"}
            return before(*(the(this, c) for c in in_order(asked.query, colours, after)), "x")
        case "above":
            after = {"below", "under", "underneath", "lower", "down"}
            return before(*(the(this, c) for c in in_order(asked.query, colours, after)), "y")
        case "compare_count":
            more, fewer = in_order(asked.query, shapes, {"fewer", "smaller", "lower", "outnumbered"})
            return "yes" if count[more] > count[fewer] else "no"
        case "two_hop":
            return alone_on_side(this, asked.query, *colours).shape
    raise AssertionError(f"no checker for {asked.type}")


def ask(split, count, **how):
    return [(this, q) for this in (scene(split, i) for i in range(count)) for q in questions(this, **how)]


@pytest.mark.parametrize("templates", TEMPLATE_SETS)
@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_right_and_unambiguous(split, templates):
    asked = ask(split, 150, per_type=2, templates=templates)
    assert {q.type for _, q in asked} == set(QUESTION_TYPES)
    for this, q in asked:
        assert recompute(this, q) == q.answer, (this, q)


def test_relational_means_more_than_one_object():
    assert set(RELATIONAL) == {"closest_shape", "furthest_shape", "closest_colour", "closest_size",
                               "same_shape_count", "left_of", "above", "compare_count", "two_hop"}
    assert set(RELATIONAL) | set(NON_RELATIONAL) == set(QUESTION_TYPES)
    assert all(q.relational == (q.type in RELATIONAL) for _, q in ask("train", 20))


def test_questions_are_short_ascii_and_grammatical():
    for templates, usual in (("plain", 35), ("wide", 45), ("paraphrase", 42)):
        lengths = [len(q.query.encode()) for _, q in ask("train", 200, templates=templates)]
        assert max(lengths) <= MAX_QUERY_BYTES and np.mean(lengths) <= usual
    for templates in TEMPLATE_SETS:
        for _, q in ask("train", 150, types=["existence"], templates=templates):
            assert q.query.isascii() and " a orange" not in q.query and " an red" not in q.query


def test_however_it_is_worded_the_same_is_asked():
    plain, wide, unseen = ([(q.type, q.arguments, q.answer) for _, q in ask("train", 50, templates=templates)]
                           for templates in TEMPLATE_SETS)
    assert plain == wide == unseen


def test_answers_are_near_uniform_in_every_type():
    counts = {name: Counter() for name in QUESTION_TYPES}
    for _, q in ask("train", 1500):
        counts[q.type][q.answer] += 1
    for name, kind in QUESTION_TYPES.items():
        total = counts[name].total()
        assert total > 400, name
        # Held-out pairs make some colours and shapes rarer among the colours and shapes of training.
        slack = 0.45 if set(kind.answers) <= set(COLOURS) else 0.25
        for answer in kind.answers:
            share = counts[name][answer] / total
            assert share == pytest.approx(1 / len(kind.answers), rel=slack), (name, answer)


def test_training_questions_never_name_a_held_out_pair_and_ood_questions_are_about_one():
    for _, q in ask("train", 300, types=["existence"]):
        assert q.arguments not in HELD_OUT_PAIRS
    for this, q in ask("ood", 150):
        held_out = [o for o in this.objects if (o.colour, o.shape) in HELD_OUT_PAIRS]
        named = set(q.arguments) & {word for o in held_out for word in (o.colour, o.shape, o.size)}
        assert named or q.arguments in HELD_OUT_PAIRS


def test_the_words_alone_do_not_tell_whether_a_pair_exists():
    yes, total = Counter(), Counter()
    for _, q in ask("train", 1500, types=["existence"]):
        total[q.arguments[0]] += 1
        yes[q.arguments[0]] += q.answer == "yes"
    for colour in COLOURS:
        assert 0.35 < yes[colour] / total[colour] < 0.65


def test_corrupt_scenes_are_asked_the_questions_of_the_test_split():
    assert questions(scene("corrupt", 7)) == questions(scene("test", 7))


def test_questions_of_a_scene_never_change():
    assert [questions(scene("val", 2, 9)) for _ in range(2)] == [questions(scene("val", 2, 9))] * 2


def test_bad_requests_are_named():
    with pytest.raises(ConfigError, match="'shapes'"):
        questions(scene("train", 0), types=["shapes"])
    with pytest.raises(ConfigError, match="paraphrase"):
        questions(scene("train", 0), templates="other")
