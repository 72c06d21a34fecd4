"""Questions about what was seen earlier: the answer is in the agent's memory, not in the picture.

A row shows scene ``i`` and asks about the three scenes after it in their split, which count as seen before, the
last of them last.  "Was there …?" is about all of them; how many there were and what shape something had, about the
last.  Whether something was there is yes half of the time, whatever the present picture shows.
"""

from training.data.manifest import Sample
from training.data.rng import Draws
from training.data.scenes import ALLOWED_SHAPES, COLOURS, SHAPES, scene

EARLIER = 3  # scenes
TOOL = "memory_search"
TEMPLATES = {
    "existence": ("was there {an} {a} {b} before?", "did you see {an} {a} {b} earlier?",
                  "have you seen {an} {a} {b} before?", "earlier, was there {an} {a} {b}?"),
    "count": ("how many {b}s were there before?", "how many {b}s did you see earlier?",
              "before, how many {b}s were there?"),
    "shape": ("what shape was the {a} one before?", "earlier, what shape was the {a} one?"),
}
PARAPHRASES = {
    "existence": ("previously, was there {an} {a} {b}?", "was {an} {a} {b} there earlier?"),
    "count": ("how many {b}s were there previously?",),
    "shape": ("previously, what shape was the {a} one?",),
}
PRESENT = {"existence": "is there {an} {a} {b}?", "count": "how many {b}s are there?",
           "shape": "what shape is the {a} one?"}


def earlier_scenes(this):
    """The scenes that count as seen before scene ``this``, oldest first."""
    return [scene(this.split, this.index + i, this.seed) for i in range(1, EARLIER + 1)]


def memory_rows(split, count, seed=0, start=0, templates="train"):
    """One question of each kind for ``count`` scenes from number ``start``: a list of Samples.

    templates : "train" or "paraphrase".  ``tool`` holds the call that answers; its argument is the question in the
    present tense.
    """
    rows = []
    for index in range(start, start + count):
        this = scene(split, index, seed)
        draws = Draws("memory", seed, split, index)
        for kind, words, answer in _questions(earlier_scenes(this), draws):
            wording = draws.choice((TEMPLATES if templates == "train" else PARAPHRASES)[kind])
            rows.append(Sample(
                f"{split}/{seed}/{index}/memory/{kind}", this, wording.format(**words), answer, (answer,),
                type=f"earlier {kind}", split=split, meta={"known": False, "key": kind},
                tool={"name": TOOL, "arguments": {"question": PRESENT[kind].format(**words)}, "result": answer}))
    return rows


def _questions(seen, draws):
    """(kind, words, answer) about the scenes ``seen``."""
    there = sorted({(thing.colour, thing.shape) for one in seen for thing in one.objects})
    absent = [(colour, shape) for colour in COLOURS for shape in ALLOWED_SHAPES[colour] if (colour, shape) not in there]
    answer = draws.choice(("yes", "no")) if absent else "yes"
    colour, shape = draws.choice(there if answer == "yes" else absent)
    yield "existence", {"a": colour, "b": shape, "an": "an" if colour == "orange" else "a"}, answer
    last, shape = seen[-1].objects, draws.choice(SHAPES)
    count = sum(thing.shape == shape for thing in last)
    if count <= 4:  # more are never asked about
        yield "count", {"b": shape}, str(count)
    thing = draws.choice(last)
    yield "shape", {"a": thing.colour}, thing.shape
