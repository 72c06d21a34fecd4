"""What there is to show of a trace: the common ground of the page and the picture."""

import dataclasses

from PIL import Image

from xuravljepa.agent.trace import printable
from xuravljepa.agent.trace_text import REASON_TEXT, format_arguments
from xuravljepa.image import read_rgb

MAX_SIDE = 512  # pixels of a picture that is shown
GUESS_ABOVE = 0.5  # p(wrong) above which an answer is shown as a guess
DOUBT_ABOVE = 0.2
BARS = 4  # nearest answers shown for a reading
WORDS = {"sure": "sure", "doubt": "sure", "guess": "sure: a guess"}  # after the percentage
LABELS = {"asked": "asked itself", "call": "called", "failed": "failed", "injected": "injected",
          "read": "read", "note": "note"}


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture and what was asked about it.

    Args:
        image: what ``xuravljepa.image.read_rgb`` takes: a path, an array or a PIL image.
        traces: ``Trace``s about it.
        caption: a line below the picture.
    """

    image: object
    traces: tuple
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Shown:
    """One reading: what it is called, what it said and how sure it was."""

    title: str  # completes "nearest answers": empty, " before" or " after lookup"
    answer: str
    confidence: float
    candidates: tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True)
class Event:
    """One line of the story of a tool call; ``kind`` is asked, call, failed, injected, read or note."""

    kind: str
    text: str
    amount: float | None = None  # of an injection: ‖ΔS‖ / ‖S‖


@dataclasses.dataclass(frozen=True)
class Story:
    question: str
    answer: str
    confidence: float
    verdict: str  # sure, doubt or guess
    right: bool | None  # None where nobody knows the right answer
    expected: str | None
    reason: str
    readings: tuple[Shown, ...]
    events: tuple[Event, ...]
    about: str


def tell(trace):
    """The ``Story`` of a trace; all its text is printable."""
    last = trace.final or (trace.steps[-1] if trace.steps else None)
    answer = "" if last is None else last.answer
    p_wrong = 1.0 if last is None or last.p_wrong_after is None else last.p_wrong_after
    expected = trace.run.expected
    reason = last.reason if last is not None and last.action == "answer" else ""
    run = trace.run
    about = [f"model {run.model}" if run.model else "", f"seed {run.seed}" if run.seed is not None else "",
             f"run {run.run_id}" if run.run_id else "", run.started]
    return Story(
        printable(run.question), printable(answer), 1.0 - p_wrong, verdict(p_wrong),
        None if expected is None else answer.strip().casefold() == expected.strip().casefold(),
        None if expected is None else printable(expected), printable(REASON_TEXT.get(reason, reason)),
        tuple(_readings(trace)), tuple(_events(trace)), printable(" · ".join(filter(None, about))))


def verdict(p_wrong):
    return "guess" if p_wrong > GUESS_ABOVE else "doubt" if p_wrong > DOUBT_ABOVE else "sure"


def picture_to_show(source):
    """A picture as RGB, enlarged by whole factors if it is small and reduced if it is large."""
    image = read_rgb(source)
    longest = max(image.size)
    if longest > MAX_SIDE:
        image.thumbnail((MAX_SIDE, MAX_SIDE))
    elif 2 * longest <= MAX_SIDE:
        factor = MAX_SIDE // longest
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return image


def _readings(trace):
    readings = trace.readings()
    for step in readings:
        title = f" after {printable(step.tool)}" if step.action == "call" else " before" * (len(readings) > 1)
        yield Shown(title, printable(step.answer), 1.0 - step.p_wrong_after,
                    tuple((printable(label), similarity) for label, similarity in step.candidates))


def _events(trace):
    for step in trace.steps:
        for text in _event(step):
            yield dataclasses.replace(text, text=printable(text.text))


def _event(step):
    if step.action == "call":
        for question, answer in step.asked:
            yield Event("asked", f"{question} “{_cut(answer)}”")
        call = f"{step.tool}({format_arguments(step.arguments)})"
        if step.result is not None and not step.result.ok:
            yield Event("failed", f"{call}: {step.result.error.type}: {step.result.error.message}")
        elif step.result is not None:
            yield Event("call", f"{call} = {_cut(step.result.text)}"
                                + ("" if step.ms is None else f"   ({step.ms:.1f} ms)"))
        if step.state_change is not None:
            size = f"{100 * step.state_change:.0f} %"
            yield Event("injected", f"changed the state by {size}", step.state_change)
        if step.p_wrong_after is not None:
            yield Event("read", f"“{_cut(step.answer)}”, {percent(1.0 - step.p_wrong_after)} sure")
    elif step.action == "read" and step.p_wrong_after is not None:
        yield Event("read", f"“{_cut(step.answer)}”, {percent(1.0 - step.p_wrong_after)} sure")
    if step.note:
        yield Event("note", step.note)


def percent(share):
    """A share as whole percent that never claims certainty: 0.999 is 99 %, not 100 %."""
    return f"{min(max(round(100 * share), 1), 99)} %"


def _cut(text, most=160):
    return text if len(text) <= most else text[:most - 1] + "…"
