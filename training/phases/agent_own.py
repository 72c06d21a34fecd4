"""Phase 3 on one's own pictures and questions: what takes the place of generated scenes.

The monitor learns from the model's answers to questions held out from the phases before, as they are and with
their pictures changed, so that there are wrong ones too, and from pictures of something else altogether.  Tools are
those that rows name; without such rows there are none, and the agent only says where it doubts.
"""

from typing import NamedTuple

import numpy as np

from training.data.strange import TAUGHT, changed
from training.phases.common import generator, image_key
from training.phases.jepa import said_by_tool
from xuracore import no_grad
from xuracore.errors import ConfigError

MORE = ("Hold out more pictures: rows of the split \"calib\" are for this alone, rows of \"val\" serve where there are "
        "none, and otherwise every tenth picture")
ENOUGH = {"train it": 10, "calibrate it": 5}  # wrong answers, and right ones
FEW = 10  # wrong answers to questions about unchanged pictures, under which it should be said


class Group(NamedTuple):
    """Rows that the monitor learns from together, and what is done to their pictures (see ``ViewStore``)."""

    rows: list
    change: object = None


def tool_names(rows):
    """{name of a tool: its card, the words of the name}, of rows that say what a tool gave."""
    names = sorted({row.tool["name"] for row in rows if said_by_tool(row) is not None})
    return {name: name.replace("_", " ") for name in names}


def questions(rows, answers, tools):
    """(rows that one of ``tools`` answers, rows without a tool), of those whose answer is among ``answers``."""
    asked = [row for row in rows if row.query and row.answer in answers]
    return ([row for row in asked if said_by_tool(row) is not None and row.tool["name"] in tools],
            [row for row in asked if said_by_tool(row) is None])


def rumours(rows):
    """{tool: answers that some row has from it word for word}: what it might have said elsewhere."""
    found = {}
    for row in rows:
        if said_by_tool(row) == row.answer.strip().lower():
            found.setdefault(row.tool["name"], set()).add(row.answer)
    return {name: sorted(answers) for name, answers in found.items()}


def check_tools(taught, held):
    """ConfigError where rows of tools are lacking on one side: what a tool mends could not be learned, or measured."""
    if not taught or not held:
        raise ConfigError(f"{len(taught)} rows of tools can be trained on and {len(held)} are held out; it takes some "
                          "of both, with answers that the model knows. Give some the split \"val\" or \"calib\"")


def asked_of(held, preprocessing, seed=0):
    """{name: Group} of held-out rows: as they are, those of tools, and a quarter of them for each change."""
    number = picture_number(held)
    tools = [row for row in held if said_by_tool(row) is not None]
    plain = [row for row in held if said_by_tool(row) is None]
    asked = {"pictures": Group(plain), "tools": Group(tools)}
    for kind, name in enumerate(TAUGHT):
        rows = [row for row in held if number(row) % len(TAUGHT) == kind]
        asked[name] = Group(rows, changer(name, preprocessing, seed))
    return {name: group for name, group in asked.items() if group.rows}


def picture_number(rows):
    """A function from a row to the number of its picture, in the order in which ``rows`` ask about them."""
    numbers = {key: number for number, key in enumerate(dict.fromkeys(map(image_key, rows)))}
    return lambda row: numbers[image_key(row)]


def changer(kind, preprocessing, seed=0):
    """What a ViewStore does to pictures normalised by these means and spreads: ``strange.changed`` wants -1 to 1."""
    rng = generator(seed, 8, TAUGHT.index(kind))
    mean, std = (np.array(part, np.float32)[:, None, None] for part in (preprocessing.mean, preprocessing.std))
    half = np.float32(0.5)
    return lambda pixels: (changed((pixels * std + mean) / half - 1, kind, rng) * half + half - mean) / std


def shift_for(image_size):
    """Pixels by which a picture is moved to see whether the answer stays: 2 of 64, and as much of other sizes."""
    return max(1, round(image_size / 32))


def check_enough(fitting, kept):
    """ConfigError where the answers to train and to calibrate on are nearly all right, or all wrong.

    Returns what should be said, or None.
    """
    for (purpose, least), readings in zip(ENOUGH.items(), (fitting, kept)):
        counted = readings[readings.group != "strange"]
        wrong, right = int(counted.wrong.sum()), int((1 - counted.wrong).sum())
        if min(wrong, right) < least:
            raise ConfigError(
                f"of the {wrong + right} answers to {purpose} with, {wrong} are wrong and {right} right; the monitor "
                f"needs at least {least} of both. "
                + (f"{MORE}. Until then use the model without phase 3: it answers, and never doubts"
                   if wrong < least else f"The model is hardly ever right: train it longer first (phase 1). {MORE}"))
    clear = np.concatenate([part.wrong[part.group == "pictures"] for part in (fitting, kept)])
    if clear.sum() < FEW:
        return (f"only {int(clear.sum())} of {len(clear)} answers about unchanged pictures are wrong: the monitor "
                f"learns from changed ones what wrong answers look like. {MORE}")
    return None


@no_grad()
def keep_the_better(monitor, kept):
    """Calibrate on readings kept back, once as trained and once by the agreement of views alone; keep what is likelier.

    A network taught by some dozens of answers may know less than what it started from.  Returns {"network": whether
    it was kept, "nll", "nll_agreement"}, the mean negative log-likelihoods of right and wrong.
    """
    found, states = {}, {}
    for name in ("nll", "nll_agreement"):
        if name == "nll_agreement":
            monitor.output.weight.data[:], monitor.output.bias.data[:], monitor.trust.data[:] = 0, 0, 1
        monitor.calibrate(monitor(kept.features).data, kept.wrong)
        p = np.clip(monitor.p_wrong(kept.features), 1e-6, 1 - 1e-6)
        found[name] = float(-np.mean(np.where(kept.wrong > 0, np.log(p), np.log(1 - p))))
        states[name] = {key: value.copy() for key, value in monitor.state_dict().items()}
    best = min(found, key=found.get)
    monitor.load_state_dict(states[best])
    return {"network": best == "nll", **found}
