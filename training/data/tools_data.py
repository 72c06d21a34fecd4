"""Questions whose answer is not in the picture: prices at shops, and sums with a count.

Six *known* shops have fixed prices, which a model can learn by heart in phase 1.  All other shops have
made-up names in the same form (consonant, vowel, consonant, vowel, consonant), drawn into pools that share
no name: ``train`` (learning to read a tool's answer), ``calib`` (fitting the monitor), ``test``.  Known and
unseen keys fill the same templates, so nothing but the key itself tells whether a tool is needed.

The price depends on the shop *and* on the shape of the object, so the picture is needed too.
"""
import json
from dataclasses import dataclass, field
from functools import lru_cache

from training.data.rng import Draws
from training.data.questions import TEMPLATE_SETS
from training.data.scenes import SHAPES
from training.data.wordings import UNSEEN, WIDE, Draw, wide
from xuracore.errors import ConfigError

POOLS = ("known", "train", "calib", "test")
KNOWN_SHOPS = ("bamor", "delun", "fikas", "gopit", "lunev", "sarok")
POOL_SIZES = {"train": 1200, "calib": 300, "test": 300}
# Sums stay within 0..30: with counts of 0..4 the largest addend is 26.
ADDENDS = {"known": tuple(range(1, 5)), "train": (24, 25, 26), "calib": tuple(range(6, 23, 2)),
           "test": tuple(range(5, 24, 2))}
MAX_ANSWER = 30
MAX_COUNT = 4
TOOL_TYPES = ("price", "sum")

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_TEMPLATES = {
    "price": ("what does the {a} one cost at {b}?", "price of the {a} one at {b}?", "what does {a} cost at {b}?"),
    "sum": ("what is {b} plus the number of {a}s?", "{b} plus the number of {a}s?", "add {b} to the number of {a}s"),
}


@dataclass(frozen=True, slots=True)
class ToolQuestion:
    """A question that a tool can answer.

    ``known`` says whether training showed this key (shop or addend) with its answer; ``tool``, ``arguments``
    and ``result`` are the call that gives the answer and the text it returns.  Whether a model *needs* the
    call is not known until it has been asked.
    """

    query: str
    answer: str
    type: str
    known: bool
    key: str
    tool: str
    result: str
    arguments: dict = field(hash=False)
    relational: bool = False
    family: str = "tool"


def _differs(name, other):
    return sum(a != b for a, b in zip(name, other)) >= 2


@lru_cache(maxsize=8)
def _pools(seed):
    draws, taken, pools = Draws("shops", seed), set(KNOWN_SHOPS), {"known": KNOWN_SHOPS}
    for pool, size in POOL_SIZES.items():
        names = []
        while len(names) < size:
            name = "".join(draws.choice(letters) for letters in (_CONSONANTS, _VOWELS) * 2 + (_CONSONANTS,))
            # One letter away from a known shop would be a riddle, not an unseen key.
            if name not in taken and all(_differs(name, known) for known in KNOWN_SHOPS):
                taken.add(name)
                names.append(name)
        pools[pool] = tuple(names)
    return pools


def shop_names(pool, seed=0):
    """The shop names of a pool, a tuple of five-letter strings; pools share no name.

    Raises ConfigError for an unknown pool.
    """
    if pool not in POOLS:
        raise ConfigError(f"unknown pool {pool!r}; the pools are {', '.join(POOLS)}")
    return _pools(seed)[pool]


def price_list(seed=0):
    """All prices, ``{shop: {shape: int}}`` with prices in 0..30, three different ones in every shop.

    Covers the known shops and every name of every pool: this is what the lookup tool reads.
    """
    prices = {}
    for pool in POOLS:
        for shop in shop_names(pool, seed):
            prices[shop] = dict(zip(SHAPES, _prices_of(shop, seed)))
    return prices


@lru_cache(maxsize=4096)
def _prices_of(shop, seed):
    return tuple(Draws("price", seed, shop).sample(range(MAX_ANSWER + 1), len(SHAPES)))


def write_price_list(path, seed=0):
    """Write ``price_list(seed)`` as JSON, one shop per line, for the lookup tool."""
    rows = (f"  {json.dumps(shop)}: {json.dumps(row)}" for shop, row in price_list(seed).items())
    with open(path, "w", encoding="utf-8") as file:
        file.write("{\n" + ",\n".join(rows) + "\n}\n")


def tool_questions(scene, pool, types=TOOL_TYPES, per_type=1, templates="plain"):
    """Tool questions about a scene with keys of one pool, a list of ToolQuestion.

    In the ``ood`` split the object asked about has a held-out colour × shape pair.  A scene with more than
    four objects of the drawn shape gets no sum.  ``templates`` as in ``questions``.  Raises ConfigError for an
    unknown pool, type or template set.
    """
    if templates not in TEMPLATE_SETS:
        raise ConfigError(f"unknown template set {templates!r}; choose one of {', '.join(TEMPLATE_SETS)}")
    names = shop_names(pool, scene.seed)
    unknown = [kind for kind in types if kind not in TOOL_TYPES]
    if unknown:
        raise ConfigError(f"unknown tool question {unknown[0]!r}; the types are {', '.join(TOOL_TYPES)}")
    asked_of = "test" if scene.split == "corrupt" else scene.split
    draws, result = Draws("tools", scene.seed, asked_of, scene.index, pool), []
    for kind in types:
        for _ in range(per_type):
            ask = _price if kind == "price" else _sum
            question = ask(scene, names, pool, draws, templates)
            if question is not None:
                result.append(question)
    return result


def _about(scene):
    return [thing for thing in scene.objects if thing.held_out or scene.split != "ood"]


def _word(kind, draws, templates, asked, key):
    if templates == "wide":
        return wide(_TEMPLATES[kind] + WIDE[kind], {"a": asked, "b": key}, Draw(draws.word()))
    return draws.choice(_TEMPLATES[kind] if templates == "plain" else UNSEEN[kind]).format(a=asked, b=key)


def _price(scene, names, pool, draws, templates):
    thing, shop = draws.choice(_about(scene)), draws.choice(names)
    answer = str(dict(zip(SHAPES, _prices_of(shop, scene.seed)))[thing.shape])
    query = _word("price", draws, templates, thing.colour, shop)
    return ToolQuestion(query, answer, "price", pool == "known", shop, "lookup", answer,
                        {"shop": shop, "shape": thing.shape})


def _sum(scene, names, pool, draws, templates):
    shape = draws.choice(_about(scene)).shape if scene.split == "ood" else draws.choice(SHAPES)
    addend = draws.choice(ADDENDS[pool])
    query = _word("sum", draws, templates, shape, str(addend))
    count = sum(thing.shape == shape for thing in scene.objects)
    if count > MAX_COUNT:
        return None
    answer = str(addend + count)
    return ToolQuestion(query, answer, "sum", pool == "known", str(addend), "calculator", answer,
                        {"expression": f"{addend} + {count}"})
