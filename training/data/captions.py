"""Questions whose answer is a text of its own: what a picture shows, in a sentence or a list.

Such an answer is none of a closed set, so it is a row's ``caption`` and not its ``answer``: the Y-Decoder is to
write it.  The order in which things are named follows from the question, so that a picture has one right text.

    caption          a small red circle, a large cyan triangle and a small gray square      left to right
    caption_down     the same from top to bottom
    colours          red, cyan and gray                                                     in the order of COLOURS
    shapes           1 circle, 1 square and 1 triangle                                      likewise
    colours_of       red and gray          of one shape, or of one size; "none"             likewise
"""
from training.data.questions import Question, TEMPLATE_SETS
from training.data.rng import Draws
from training.data.scenes import COLOURS, SHAPES, SIZES, caption, listed
from training.data.wordings import UNSEEN, WIDE, Draw, wide
from xuracore.errors import ConfigError

TEMPLATES = {
    "caption": ("what is in the image?", "describe the picture"),
    "caption_down": ("describe the picture from top to bottom",),
    "colours": ("which colours are there?",),
    "shapes": ("which shapes are there?",),
    "colours_of": ("which colours are the {a}?",),
}


def captions(scene, types=tuple(TEMPLATES), templates="plain"):
    """One question of each type that is answered in free words, a list of Question.

    ``templates`` as in ``questions``.  Raises ConfigError for an unknown type or template set.
    """
    unknown = [kind for kind in types if kind not in TEMPLATES]
    if unknown:
        raise ConfigError(f"unknown caption type {unknown[0]!r}; the types are {', '.join(TEMPLATES)}")
    if templates not in TEMPLATE_SETS:
        raise ConfigError(f"unknown template set {templates!r}; choose one of {', '.join(TEMPLATE_SETS)}")
    draws, found = Draws("captions", scene.seed, scene.split, scene.index), []
    for kind in types:
        about = draws.choice((*SHAPES, *SIZES))
        choice = draws.word()
        words = {"a": "" if kind != "colours_of" else f"{about}s" if about in SHAPES else f"{about} ones"}
        if templates == "wide":
            query = wide(TEMPLATES[kind] + WIDE[kind], words, Draw(choice))
        else:
            query = Draw(choice).choice(TEMPLATES[kind] if templates == "plain" else UNSEEN[kind]).format(**words)
        found.append(Question(query, _text(kind, scene, about), kind, False, "caption",
                              (about,) if kind == "colours_of" else (), templates == "paraphrase"))
    return found


def _text(kind, scene, about):
    if kind.startswith("caption"):
        return caption(scene, "top" if kind == "caption_down" else "left")
    if kind == "shapes":
        count = {shape: sum(thing.shape == shape for thing in scene.objects) for shape in SHAPES}
        return listed([f"{n} {shape}{'s' * (n > 1)}" for shape, n in count.items() if n])
    chosen = {thing.colour for thing in scene.objects if kind == "colours" or about in (thing.shape, thing.size)}
    return listed([colour for colour in COLOURS if colour in chosen]) or "none"
