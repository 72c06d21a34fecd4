"""What the agent did and why: steps, their file, their text, and their replay.

A trace file is JSON Lines: one line that describes the run, then one line a step.  Several runs may
follow each other in one file.  Numbers are written so that they are read back exactly, a tool's result
is stored whole beside its SHA-256, so a run can be repeated with the results it got then.
"""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

from xuracore.errors import FormatError
from xuravljepa.agent.errors import ArgumentError, ReplayError
from xuravljepa.agent.schema import check_value
from xuravljepa.agent.tools import ToolRequest, ToolResult

VERSION = 1
REASONS = ("confident", "abstain", "max_depth", "budget", "repeated_call", "tool_error", "no_tool")
ACTIONS = ("read", "call", "answer")
MAX_LINE = 2**22  # characters of one line: a result and arguments of full size, escaped
MAX_STEPS = 1000  # of one run
MAX_RUNS = 100_000  # of one file


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run was: enough to repeat it."""

    run_id: str
    question: str
    model: str = ""  # name or hash of the weights
    config: str = ""  # hash of the configuration
    image: str = ""  # SHA-256 of the picture's pixels
    seed: int | None = None
    started: str = ""  # ISO 8601, UTC
    expected: str | None = None  # the right answer, where somebody knows it


@dataclasses.dataclass(frozen=True)
class Step:
    """One thing that happened.  What does not apply to the action is None or empty."""

    step: int  # from 0
    time: float  # seconds since the run began
    action: str  # "read": the first reading; "call": a tool, and the reading after it; "answer": the end
    answer: str  # the answer as it stands after this step
    reason: str = ""  # of an answer: one of REASONS
    note: str = ""  # what else went wrong, in words
    p_wrong_before: float | None = None
    p_wrong_after: float | None = None
    candidates: tuple[tuple[str, float], ...] = ()  # nearest answers with their similarity, nearest first
    tool: str | None = None
    arguments: dict | None = None  # None for a call whose arguments could not be produced
    asked: tuple[tuple[str, str], ...] = ()  # what the model was asked to fill them, and what it said
    result: ToolResult | None = None
    ms: float | None = None  # of the tool
    state_change: float | None = None  # ‖ΔS‖ / ‖S‖ of the injection

    @property
    def digest(self):
        """SHA-256 of the result, or None."""
        return None if self.result is None else self.result.digest()


class Trace:
    """A run and its steps.

    Args:
        run: ``Run``.
        steps: ``Step``s in order.
    """

    def __init__(self, run, steps=()):
        self.run, self.steps = run, []
        for step in steps:
            self.append(step)

    def append(self, step):
        if step.step != len(self.steps):
            raise ArgumentError("step", f"expected number {len(self.steps)}, got {step.step}")
        if len(self.steps) >= MAX_STEPS:
            raise ArgumentError("step", f"a run has at most {MAX_STEPS} steps")
        self.steps.append(step)

    def __eq__(self, other):
        return isinstance(other, Trace) and (self.run, self.steps) == (other.run, other.steps)

    def __repr__(self):
        return f"Trace({self.run.question!r}, {len(self.steps)} steps)"

    @property
    def final(self):
        """The step that answered, or None in a run that was cut off."""
        return self.steps[-1] if self.steps and self.steps[-1].action == "answer" else None

    def readings(self):
        """The steps after which there was a (new) reading."""
        return [step for step in self.steps if step.action != "answer" and step.p_wrong_after is not None]

    def calls(self):
        return [step for step in self.steps if step.action == "call"]

    def recorded_results(self):
        """Every call that was made, in order: ``[(ToolRequest, ToolResult)]``."""
        return [(ToolRequest(step.tool, step.arguments, self.run.question), step.result)
                for step in self.calls() if step.arguments is not None]

    # -- files ------------------------------------------------------------------------------------

    def lines(self):
        """The trace as JSON, one line at a time."""
        yield _dump({"kind": "run", "version": VERSION} | dataclasses.asdict(self.run))
        for step in self.steps:
            yield _dump({"kind": "step"} | dataclasses.asdict(step) | {"digest": step.digest})

    def write(self, path, append=False):
        """Write the trace as JSON Lines; ``append=True`` adds it to the runs that are there."""
        text = "".join(line + "\n" for line in self.lines())
        with open(path, "a" if append else "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, path):
        """The one run in a file; raises FormatError, with the line, for anything else."""
        traces = list(read_traces(path))
        if len(traces) != 1:
            raise FormatError(f"holds {len(traces)} runs; use read_traces for such a file", path)
        return traces[0]

    # -- text -------------------------------------------------------------------------------------

    def render(self, width=100, colour=False):
        """The trace as text for a person: a string of lines at most about ``width`` wide."""
        from xuravljepa.agent.trace_text import render

        return render(self, width, colour)

    def show(self, file=None, width=None, colour=None):
        """Print the trace.  Colour where the file is a terminal and NO_COLOR is not set, unless told."""
        file = sys.stdout if file is None else file
        terminal = getattr(file, "isatty", lambda: False)()
        if colour is None:
            colour = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        if width is None:
            width = min(shutil.get_terminal_size((100, 24)).columns, 140) if terminal else 100
        text = self.render(width, colour) + "\n"
        encoding = getattr(file, "encoding", None) or "utf-8"
        file.write(text.encode(encoding, "replace").decode(encoding))


def read_traces(path):
    """Read the runs of a trace file one by one.

    Raises:
        FormatError: names the file, the line and what is wrong: unknown or missing keys, wrong types,
            steps out of order, a digest that does not fit its result, a line or run that is too long.
    """
    run, steps, runs, number = None, [], 0, 0
    try:
        with open(Path(path), encoding="utf-8") as file:
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise ArgumentError("line", f"is longer than {MAX_LINE} characters")
                if not line.strip():
                    continue
                data = _load(line)
                kind = data.pop("kind", None)
                if kind == "run":
                    if run is not None:
                        yield Trace(run, steps)
                    run, steps, runs = _read_run(data), [], runs + 1
                    if runs > MAX_RUNS:
                        raise ArgumentError("file", f"holds more than {MAX_RUNS} runs")
                elif kind == "step" and run is not None:
                    step = _read_step(data)
                    if step.step != len(steps) or len(steps) >= MAX_STEPS:
                        raise ArgumentError("step", f"expected number {len(steps)} of at most {MAX_STEPS}, "
                                                    f"got {step.step}")
                    steps.append(step)
                else:
                    raise ArgumentError("kind", f"expected a run, then its steps; got {kind!r:.40}")
    except ArgumentError as error:
        raise FormatError(str(error), path, f"line {number}") from None
    except UnicodeDecodeError:
        raise FormatError("is not UTF-8 text", path, f"line {number + 1}") from None
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", path) from None
    if run is not None:
        yield Trace(run, steps)


class Replay:
    """Runs a trace's calls again from the record: the place of a tool registry's ``run``.

    Its ``clock`` shows the recorded times, so that a run that had stopped because its time was over
    stops at the same place, however fast the replay is.

    Args:
        trace: ``Trace``.
    """

    def __init__(self, trace):
        called = [step for step in trace.calls() if step.arguments is not None]
        self._results = list(zip(called, trace.recorded_results()))
        self._end = trace.steps[-1].time if trace.steps else 0.0
        self._next, self._now, self._started = 0, 0.0, False

    def run(self, request, seconds=None):
        """The recorded result of the next call.

        Raises:
            ReplayError: the trace has no further call, or another one at this place.
        """
        if self._next >= len(self._results):
            raise ReplayError(f"the trace ends before the call {request.key():.200}")
        step, (recorded, result) = self._results[self._next]
        if recorded.key() != request.key():
            raise ReplayError(f"call {self._next} was {recorded.key():.200}; the replay asks for "
                              f"{request.key():.200}")
        self._next += 1
        self._now = step.time
        return result

    def clock(self):
        if not self._started:  # the meter's first look is its zero
            self._started = True
            return 0.0
        return self._end if self._next >= len(self._results) else self._now


# ---------------------------------------------------------------------------------------------
# Records from strangers
# ---------------------------------------------------------------------------------------------


def _dump(data):
    return json.dumps(data, allow_nan=False, separators=(",", ":"))


def _refuse_constant(name):
    raise ArgumentError("number", f"{name} is no number of JSON")


def _load(line):
    try:
        data = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError("line", f"is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ArgumentError("line", "is not an object")
    return data


def _text(nullable=False):
    return {"type": "string"} | ({"nullable": True} if nullable else {})


_NUMBER = {"type": "number", "nullable": True}
_RUN = {"run_id": _text(), "question": _text(), "model": _text(), "config": _text(), "image": _text(),
        "seed": {"type": "integer", "nullable": True}, "started": _text(), "expected": _text(True)}
_STEP = {"step": {"type": "integer"}, "time": {"type": "number"},
         "action": {"type": "string", "enum": list(ACTIONS)}, "answer": _text(),
         "reason": _text(), "note": _text(),
         "p_wrong_before": _NUMBER, "p_wrong_after": _NUMBER,
         "candidates": {"type": "array", "items": {"type": "array",
                                                   "prefixItems": [_text(), {"type": "number"}]}},
         "tool": _text(True), "arguments": {"type": "object", "nullable": True},
         "asked": {"type": "array", "items": {"type": "array", "prefixItems": [_text(), _text()]}},
         "result": {"type": "object", "nullable": True}, "ms": _NUMBER, "state_change": _NUMBER,
         "digest": _text(True)}


def _fields(data, expected):
    if set(data) != set(expected):
        unknown, missing = sorted(set(data) - set(expected)), sorted(set(expected) - set(data))
        raise ArgumentError("line", f"unknown keys {unknown}, missing keys {missing}")
    return {name: check_value(schema, data[name], name, MAX_LINE) for name, schema in expected.items()}


def _read_run(data):
    if data.pop("version", None) != VERSION:
        raise ArgumentError("version", f"this reader knows version {VERSION} only")
    return Run(**_fields(data, _RUN))


def _read_step(data):
    fields = _fields(data, _STEP)
    digest = fields.pop("digest")
    for name in ("p_wrong_before", "p_wrong_after"):
        if fields[name] is not None and not 0 <= fields[name] <= 1:
            raise ArgumentError(name, f"is a probability, not {fields[name]}")
    if fields["action"] == "answer" and fields["reason"] not in REASONS:
        raise ArgumentError("reason", f"expected one of {REASONS}, got {fields['reason']!r:.60}")
    if fields["action"] == "call" and (fields["tool"] is None or fields["result"] is None):
        raise ArgumentError("call", "needs a tool and a result")
    result = None if fields["result"] is None else ToolResult.from_dict(fields["result"])
    fields["result"] = result
    fields["candidates"] = tuple(tuple(pair) for pair in fields["candidates"])
    fields["asked"] = tuple(tuple(pair) for pair in fields["asked"])
    step = Step(**fields)
    if step.digest != digest:
        raise ArgumentError("digest", "does not fit the result: one of them was changed")
    return step


def printable(text):
    """Text without control characters: nothing in it can move a cursor or hide what follows."""
    return "".join(letter if letter.isprintable() else "·" for letter in str(text))
