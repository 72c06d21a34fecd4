"""Questions about a scene, each with one right answer that nobody can dispute.

A comparison of positions or distances is asked only where the gap is at least ``MIN_GAP`` pixels, and
anything ambiguous is left out.  Which object is asked about is chosen *after* the answer is drawn, so that
the answers of a type are near uniform and the question text alone says little (``training/data/priors.py``
measures how little).

Each type has a few short templates; ``training/data/wordings.py`` has the many other ways to ask, and those that
training never sees.
"""
from dataclasses import dataclass
from typing import Callable

from training.data.rng import Draws
from training.data.scenes import COLOURS, HELD_OUT_PAIRS, MIDDLE, SHAPES, SIZES
from training.data.wordings import UNSEEN, WIDE, Draw, wide
from xuracore.errors import ConfigError

MIN_GAP = 3            # pixels
MAX_QUERY_BYTES = 120
YES_NO = ("yes", "no")


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its answer, and what kind it is.

    ``family`` groups types (attribute, position, count, …); ``arguments`` are the words that fill the
    template, so that a checker need not parse the text.
    """

    query: str
    answer: str
    type: str
    relational: bool
    family: str
    arguments: tuple
    paraphrase: bool = False


@dataclass(frozen=True)
class QuestionType:
    """One way to ask.

    ``candidates(tables)`` lists ``(arguments, answer, objects)``: every unambiguous question of this type
    about a scene, with the indices of the objects it speaks of.  ``weights`` gives each
    answer's chance of being drawn, where answers are not equally often possible; with ``strict`` a drawn
    answer that this scene cannot give means no question, which keeps counts and yes/no balanced.
    """

    name: str
    family: str
    relational: bool
    candidates: Callable
    answers: tuple
    templates: tuple
    slots: tuple
    weights: tuple | None = None
    strict: bool = False

    @property
    def wide(self):
        """The patterns of all wordings that training may use, the plain templates among them."""
        return self.templates + WIDE[self.name]

    @property
    def paraphrases(self):
        """Sentences that training never uses."""
        return UNSEEN[self.name]


class SceneTables:
    """A scene with the tables its questions need: positions and all pairwise distances."""

    __slots__ = ("objects", "count", "distances", "by_shape", "by_size", "ood")

    def __init__(self, scene):
        objects = self.objects = scene.objects
        self.count = len(objects)
        self.distances = [[((a.x - b.x) ** 2 + (a.y - b.y) ** 2) ** 0.5 for b in objects] for a in objects]
        self.by_shape = {s: [i for i, o in enumerate(objects) if o.shape == s] for s in SHAPES}
        self.by_size = {z: [i for i, o in enumerate(objects) if o.size == z] for z in SIZES}
        self.ood = scene.split == "ood"

    def extreme(self, i, sign):
        """Index of the object nearest to (sign 1) or furthest from (−1) object i; None if nearly a tie."""
        ranked = sorted((sign * d, j) for j, d in enumerate(self.distances[i]) if j != i)
        return ranked[0][1] if ranked[1][0] - ranked[0][0] >= MIN_GAP else None


def _attribute(name):
    def candidates(tables):
        return [((o.colour,), getattr(o, name), (i,)) for i, o in enumerate(tables.objects)]
    return candidates


def _half(axis, words):
    def candidates(tables):
        placed = [(i, o, getattr(o, axis) - MIDDLE) for i, o in enumerate(tables.objects)]
        return [((o.colour,), words[offset > 0], (i,)) for i, o, offset in placed if abs(offset) >= MIN_GAP]
    return candidates


def _extreme(sign, name):
    def candidates(tables):
        found = [(i, tables.extreme(i, sign)) for i in range(tables.count)]
        return [((tables.objects[i].colour,), getattr(tables.objects[j], name), (i,))
                for i, j in found if j is not None]
    return candidates


def _before(axis):
    def candidates(tables):
        objects, result = tables.objects, []
        for i, a in enumerate(objects):
            for j, b in enumerate(objects):
                gap = getattr(b, axis) - getattr(a, axis)
                if abs(gap) >= MIN_GAP:
                    result.append(((a.colour, b.colour), YES_NO[gap < 0], (i, j)))
        return result
    return candidates


def _colour_of_shape(tables):
    return [((s,), tables.objects[found[0]].colour, (found[0],)) for s, found in tables.by_shape.items()
            if len(found) == 1]


def _existence(tables):
    """Absent pairs are repeated: half have their colour in the scene, and colours are equally likely."""
    present = {(o.colour, o.shape): i for i, o in enumerate(tables.objects)}
    result = [(pair, "yes", (i,)) for pair, i in present.items()]
    seen = {o.colour for o in tables.objects}
    for colour in COLOURS:
        absent = [pair for pair in ((colour, shape) for shape in SHAPES)
                  if pair not in present and (pair in HELD_OUT_PAIRS) == tables.ood]
        rarity = len(COLOURS) - len(seen) if colour in seen else len(seen)
        for pair in absent:
            result += [(pair, "no", ())] * (rarity * 6 // len(absent))
    return result


def _count_shape(tables):
    return [((s,), str(len(found)), tuple(found)) for s, found in tables.by_shape.items()]


def _count_size(tables):
    return [((z,), str(len(found)), tuple(found)) for z, found in tables.by_size.items()]


def _same_shape_count(tables):
    return [((o.colour,), str(len(tables.by_shape[o.shape]) - 1), (i,)) for i, o in enumerate(tables.objects)]


def _compare_count(tables):
    found = tables.by_shape
    return [((s, t), YES_NO[len(found[s]) <= len(found[t])], (*found[s], *found[t]))
            for s in SHAPES for t in SHAPES if s != t]


def _two_hop(tables):
    """The only object on one side of another: the one next to the outermost, in each direction."""
    result = []
    for axis, before, after in (("x", "left of", "right of"), ("y", "above", "below")):
        order = sorted(range(tables.count), key=lambda i: getattr(tables.objects[i], axis))
        for words, line in ((before, order), (after, order[::-1])):
            first, anchor, third = (tables.objects[i] for i in line[:3])
            place = getattr(anchor, axis)
            if min(abs(place - getattr(first, axis)), abs(getattr(third, axis) - place)) >= MIN_GAP:
                result.append(((words, anchor.colour), first.shape, (line[1],)))
    return result


def _type(name, family, relational, candidates, answers, slots, templates, **more):
    return QuestionType(name, family, relational, candidates, answers, tuple(templates), slots, **more)


# Counts are drawn in inverse proportion to how often a training scene can give them (measured on 20 000
# scenes).  Rarer ones (all one size; four others alike; more than four) are left out: with them in, uniform
# answers would leave too few scenes that can be asked at all.
_COUNTS = ("0", "1", "2", "3", "4")
QUESTION_TYPES = {t.name: t for t in (
    _type("shape", "attribute", False, _attribute("shape"), SHAPES, ("a",),
          ["what shape is the {a} one?", "shape of the {a} object?", "the {a} one is what shape?"]),
    _type("size", "attribute", False, _attribute("size"), SIZES, ("a",),
          ["is the {a} one small or large?", "what size is the {a} one?", "size of the {a} object?"]),
    _type("colour_of_shape", "attribute", False, _colour_of_shape, COLOURS, ("a",),
          ["what colour is the {a}?", "colour of the {a}?", "the {a} is what colour?"]),
    _type("horizontal", "position", False, _half("x", ("left", "right")), ("left", "right"), ("a",),
          ["is the {a} one left or right?", "left or right: the {a} one?", "is {a} on the left or right?"]),
    _type("vertical", "position", False, _half("y", ("top", "bottom")), ("top", "bottom"), ("a",),
          ["is the {a} one top or bottom?", "top or bottom: the {a} one?", "is {a} at the top or bottom?"]),
    _type("existence", "existence", False, _existence, YES_NO, ("a", "b"),
          ["is there {an} {a} {b}?", "any {a} {b} here?", "do you see {an} {a} {b}?"], strict=True),
    _type("count_shape", "count", False, _count_shape, _COUNTS, ("a",),
          ["how many {a}s are there?", "number of {a}s?", "count the {a}s"],
          strict=True, weights=(1.72, 1.37, 1.70, 2.75, 6.52)),
    _type("count_size", "count", False, _count_size, _COUNTS[1:], ("a",),
          ["how many {a} ones are there?", "number of {a} objects?", "count the {a} ones"],
          strict=True, weights=(2.32, 1.79, 2.34, 4.31)),
    _type("closest_shape", "distance", True, _extreme(1, "shape"), SHAPES, ("a",),
          ["what shape is nearest the {a} one?", "shape closest to the {a} one?", "shape nearest to {a}?"]),
    _type("furthest_shape", "distance", True, _extreme(-1, "shape"), SHAPES, ("a",),
          ["what shape is furthest from {a}?", "shape furthest from the {a} one?"]),
    _type("closest_colour", "distance", True, _extreme(1, "colour"), COLOURS, ("a",),
          ["what colour is nearest the {a} one?", "colour closest to the {a} one?", "colour nearest to {a}?"]),
    _type("closest_size", "distance", True, _extreme(1, "size"), SIZES, ("a",),
          ["what size is nearest the {a} one?", "size of the one closest to {a}?", "size nearest to {a}?"]),
    _type("same_shape_count", "count", True, _same_shape_count, _COUNTS[:4], ("a",),
          ["how many others have the {a} one's shape?", "others shaped like the {a} one?"],
          strict=True, weights=(1.37, 1.70, 2.75, 6.52)),
    _type("left_of", "order", True, _before("x"), YES_NO, ("a", "b"),
          ["is the {a} one left of the {b} one?", "is {a} to the left of {b}?", "{a} left of {b}?"], strict=True),
    _type("above", "order", True, _before("y"), YES_NO, ("a", "b"),
          ["is the {a} one above the {b} one?", "is {a} higher than {b}?", "{a} above {b}?"], strict=True),
    _type("compare_count", "count", True, _compare_count, YES_NO, ("a", "b"),
          ["are there more {a}s than {b}s?", "more {a}s than {b}s?"], strict=True),
    _type("two_hop", "order", True, _two_hop, SHAPES, ("a", "b"),
          ["what shape is {a} the {b} one?", "shape {a} the {b} one?", "what shape is {a} {b}?"]),
)}
RELATIONAL = tuple(t.name for t in QUESTION_TYPES.values() if t.relational)
NON_RELATIONAL = tuple(t.name for t in QUESTION_TYPES.values() if not t.relational)
TEMPLATE_SETS = ("plain", "wide", "paraphrase")


def questions(scene, per_type=1, types=None, templates="plain", draws=None):
    """Balanced, unambiguous questions about a scene, a list of Question in the order of ``QUESTION_TYPES``.

    ``per_type`` is the most questions of one type, ``types`` names the wanted types (default all).  ``templates``
    says how they are worded: ``plain`` in two or three ways a type, ``wide`` in hundreds, ``paraphrase`` in ways
    that training never sees; what is asked is the same.  ``draws`` defaults to the scene's own stream, which
    makes the result a function of the scene alone.  In the ``ood`` split every question speaks of an object with
    a held-out colour × shape pair.

    Raises ConfigError for an unknown type or template set.
    """
    if templates not in TEMPLATE_SETS:
        raise ConfigError(f"unknown template set {templates!r}; choose one of {', '.join(TEMPLATE_SETS)}")
    unknown = [] if types is None else [name for name in types if name not in QUESTION_TYPES]
    if unknown:
        raise ConfigError(f"unknown question type {unknown[0]!r}; the types are {', '.join(QUESTION_TYPES)}")
    if draws is None:
        asked_of = "test" if scene.split == "corrupt" else scene.split   # the same questions, harder to see
        draws = Draws("questions", scene.seed, asked_of, scene.index)
    tables, result = SceneTables(scene), []
    for name, kind in QUESTION_TYPES.items():
        if types is not None and name not in types:
            continue
        asked = set()
        for _ in range(per_type):
            chosen = _choose(kind, tables, draws, asked)
            if chosen is not None:
                arguments, answer = chosen
                asked.add(arguments)
                result.append(_word(kind, arguments, answer, draws, templates))
    return result


def _choose(kind, tables, draws, asked):
    """(arguments, answer) of one question: first the answer is drawn, then what to ask; or None."""
    possible = {}
    for arguments, answer, objects in kind.candidates(tables):
        on_topic = not tables.ood or arguments in HELD_OUT_PAIRS or any(
            tables.objects[i].held_out for i in objects)
        if on_topic and arguments not in asked:
            possible.setdefault(answer, []).append(arguments)
    if kind.strict:
        answer = draws.weighted(kind.answers, kind.weights) if kind.weights else draws.choice(kind.answers)
        if answer not in possible:
            return None
    elif possible:
        answer = draws.choice([a for a in kind.answers if a in possible])
    else:
        return None
    return draws.choice(possible[answer]), answer


def _word(kind, arguments, answer, draws, templates):
    words = dict(zip(kind.slots, arguments))
    if templates == "wide":
        query = wide(kind.wide, words, Draw(draws.word()))
    else:
        words["an"] = "an" if arguments[0] == "orange" else "a"
        query = draws.choice(kind.templates if templates == "plain" else kind.paraphrases).format(**words)
    return Question(query, answer, kind.name, kind.relational, kind.family, arguments, templates == "paraphrase")
