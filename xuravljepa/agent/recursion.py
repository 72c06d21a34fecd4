"""The recursion layer: read, doubt, call a tool, inject what it said, read again (vljepa §4.5).

    best ← read the picture and the question
    while unsure and the budget lasts:
        choose a tool whose expected gain is positive, produce its arguments, call it
        inject the result into the state, read the question again, keep the answer least likely wrong

This module is the control loop alone.  What reads, doubts, chooses and injects are protocols: a model
plugs into them, and so does a test that tries to make the loop run forever.  The loop always ends within
its budget and always has an answer, the best so far.  A tool's text is handed to the injector and to
nothing else: it cannot register a tool, change a limit or steer the loop.

A tool may err, or lie.  Where it changes an answer that was right with probability 1 - p, one of the two is
wrong; by Bayes' rule it is the tool with probability e (1 - p) / (e (1 - p) + (1 - e) p), e being how often it
errs (``Usefulness.errs``).  So against a sure answer a tool is not believed.
"""

import dataclasses
import itertools
import math
import time
from typing import Protocol

from xuracore.errors import ConfigError
from xuravljepa.agent.budget import Budget, Meter
from xuravljepa.agent.confusion import words_of
from xuravljepa.agent.errors import ArgumentError, ReplayError
from xuravljepa.agent.sandbox_worker import describe_error
from xuravljepa.agent.tools import ToolFailure, ToolRequest, ToolResult, Usefulness
from xuravljepa.agent.trace import Run, Step, Trace

MAX_PROPOSALS = 64
MAX_DIGITS = 20  # of a number that a tool gives and no reading can say
DISBELIEF = 0.2  # probability that a tool is wrong from which the trace speaks of it


@dataclasses.dataclass(frozen=True)
class Reading:
    """What one pass over the question gave."""

    answer: str
    candidates: tuple[tuple[str, float], ...] = ()  # nearest answers with their similarity, nearest first
    state: object = None  # sequence state before the question is read (again): what is injected into
    hidden: object = None  # whatever the monitor and the selector look at


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A tool that might help."""

    tool: str
    score: float = 1.0  # how well it fits the question
    arguments: dict | None = None  # None: from the sources declared with the tool
    usefulness: Usefulness | None = None  # None: the tool's own


class Reader(Protocol):
    def read(self, state: object | None) -> Reading:
        """Read picture and question from the start (``state`` None), or the question again from a state."""


class Monitor(Protocol):
    def p_wrong(self, reading: Reading, depth: int) -> float:
        """Probability that the reading's answer is wrong; ``depth`` counts the re-readings so far.

        What an attribute ``note`` then says goes into the trace.  Where ``foreign`` holds words of the question that
        no tool took as an argument, no reading of it is to be trusted, and what a tool says is given as it stands.
        """


class Selector(Protocol):
    def rank(self, reading: Reading, question: str, tools: list) -> list[Proposal]:
        """The tools (of ``tools``: ``Tool``) that fit, best first; empty to abstain."""


class Injector(Protocol):
    def inject(self, reading: Reading, result: ToolResult) -> tuple[object, float]:
        """The state with the result written into it, and the relative size ‖ΔS‖ / ‖S‖ of the change."""


class Runner(Protocol):
    def run(self, request: ToolRequest, seconds: float) -> ToolResult:
        """Make a call within so many seconds: a ``ToolRegistry``, or a ``Replay`` of a trace."""


class PatternSelector:
    """Proposes the tools whose argument patterns are all found in the question, as registered."""

    def rank(self, reading, question, tools):
        return [Proposal(tool.name) for tool in tools if tool.applies(question)]


@dataclasses.dataclass(frozen=True)
class RecursionConfig:
    """When to stop."""

    confident_below: float = 0.1  # p(wrong) under which nothing is called
    abstain_above: float = 0.5  # p(wrong) over which the answer is given as a guess
    most_rises: int = 2  # re-readings that made p(wrong) larger before it gives up
    most_state_change: float = 10.0  # ‖ΔS‖ / ‖S‖ over which an injection is refused
    candidates: int = 5  # nearest answers kept in the trace
    budget: Budget = Budget()

    def __post_init__(self):
        if not 0 <= self.confident_below <= self.abstain_above <= 1:
            raise ConfigError("RecursionConfig needs 0 ≤ confident_below ≤ abstain_above ≤ 1, got "
                              f"{self.confident_below} and {self.abstain_above}")
        if self.most_rises < 1 or not self.most_state_change > 0 or self.candidates < 0:
            raise ConfigError("RecursionConfig needs most_rises ≥ 1, most_state_change > 0, candidates ≥ 0")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The answer, how sure it is, and why the search for a better one ended."""

    answer: str
    p_wrong: float
    reason: str  # one of trace.REASONS
    unsure: bool  # p_wrong is above RecursionConfig.abstain_above: the answer is a guess
    reading: Reading
    trace: Trace

    @property
    def confidence(self):
        return 1.0 - self.p_wrong

    @property
    def calls(self):
        """Calls that were made: ``[(ToolRequest, ToolResult)]``."""
        return self.trace.recorded_results()


class RecursionLayer:
    """The loop of one question.

    Args:
        reader, monitor, selector, injector: see the protocols above.
        tools: ``ToolRegistry``, from which calls are chosen.
        runner: what makes the calls; the registry by default.
        config: ``RecursionConfig``.
        clock: gives seconds; a replay brings its own.
        answers: all that the reader can answer, where that is known: a number of a tool that is not among them
            is the answer as it stands.
    """

    def __init__(self, reader, monitor, selector, injector, tools, runner=None, config=RecursionConfig(),
                 clock=time.monotonic, answers=None):
        self.answers = answers
        self.reader, self.monitor, self.selector, self.injector = reader, monitor, selector, injector
        self.tools, self.runner = tools, tools if runner is None else runner
        self.config, self.clock = config, clock

    def run(self, question, ask=None, run=None):
        """Answer a question.

        Args:
            question: the user's words.
            ask: ``ask(question) -> str``, the model's answer to a question that a tool's arguments need.
            run: ``Run``, the heading of the trace.

        Returns:
            ``Outcome``.  What the first reading raises passes through: there is no answer then.
        """
        return _Search(self, question, ask, run).outcome()


class _Search:
    """One run of the loop; it exists while ``RecursionLayer.run`` does."""

    def __init__(self, layer, question, ask, run):
        self.layer, self.config, self.question = layer, layer.config, question
        self.trace = Trace(Run("", question) if run is None else run)
        self.meter = Meter(layer.config.budget, layer.clock)
        self.asked, self._ask = [], ask
        self.used, self.unavailable, self.rises = set(), set(), 0
        self.tools = {tool.name: tool for tool in layer.tools}  # as they are now: no call can add to them

    def outcome(self):
        self.reading = self.layer.reader.read(None)
        self.p, note = self._doubt(self.reading)
        self.foreign = getattr(self.layer.monitor, "foreign", ())
        self.best, self.best_p = self.reading, self.p
        self._record("read", p_wrong_after=self.p, candidates=self._nearest(), note=note)
        stop = None
        while stop is None:
            stop = self._next()
        reason, more = stop
        self._record("answer", p_wrong_after=self.best_p, reason=reason, **more)
        return Outcome(self.best.answer, self.best_p, reason, self.best_p > self.config.abstain_above,
                       self.best, self.trace)

    # -- one turn: (reason, what else to record) to stop, None to go on ----------------------------

    def _next(self):
        if self.best_p < self.config.confident_below:
            return "confident", {}
        if self.rises >= self.config.most_rises:
            return self._settled(), {}
        if reason := self.meter.exhausted():
            return reason, {}
        proposal, stop = self._choose()
        if proposal is None:
            return stop
        self.asked = []
        try:
            arguments = self._arguments(proposal, self.tools[proposal.tool])
        except Exception as error:
            return self._failed(proposal.tool, None, _failure(proposal.tool, error))
        request = ToolRequest(proposal.tool, arguments, self.question, self.meter.depth)
        if request.key() in self.used:
            return "repeated_call", {"tool": proposal.tool, "arguments": arguments}
        left = self.meter.seconds_left()  # producing the arguments took time as well
        if left <= 0:
            return "budget", {}
        return self._call(request, left)

    def _choose(self):
        """The best proposal that promises a gain, or None and how to stop."""
        available = [tool for name, tool in self.tools.items() if name not in self.unavailable]
        missing = ("tool_error" if self.unavailable else "no_tool"), {}
        if not available:
            return None, missing
        names = {tool.name for tool in available}
        try:
            ranked = self.layer.selector.rank(self.reading, self.question, available)
            ranked = [proposal for proposal in itertools.islice(ranked, MAX_PROPOSALS)
                      if proposal.tool in names]
        except Exception as error:
            return None, ("tool_error", {"note": f"the selector failed: {_describe(error)}"})
        if not ranked:
            return None, missing
        for proposal in ranked:
            usefulness = proposal.usefulness or self.tools[proposal.tool].usefulness
            if usefulness.gain(self.best_p) > 0:
                return proposal, None
        note = (f"not worth a call: {proposal.tool} mends {usefulness.fixes:.2f} of wrong answers and breaks "
                f"{usefulness.breaks:.2f} of right ones")
        return None, (self._settled(), {"note": note})

    def _arguments(self, proposal, tool):
        if proposal.arguments is not None:
            return tool.check(proposal.arguments)
        return tool.fill(self.question, self._ask_model)

    def _ask_model(self, question):
        if self._ask is None:
            raise ConfigError("a tool's argument needs an answer of the model, and no ask= was given")
        answer = self._ask(question)
        self.asked.append((question, str(answer)))
        return answer

    def _call(self, request, seconds):
        self.used.add(request.key())
        self.meter.calls += 1
        try:
            result = self.layer.runner.run(request, seconds)
        except ReplayError:
            raise
        except Exception as error:
            result = _failure(request.tool, error)
        if not result.ok:
            return self._failed(request.tool, request.arguments, result)
        if not self.meter.charge_text(result.text):
            self._record_call(request.tool, request.arguments, result,
                              note="the text is more than what is left to be read")
            return "budget", {}
        try:
            state, change = self.layer.injector.inject(self.reading, result)
            if not 0 <= change <= self.config.most_state_change:
                raise ArgumentError("state", f"the injection would change it by {change:.3g} times its size")
            reading = self.layer.reader.read(state)
        except Exception as error:
            return self._failed(request.tool, request.arguments, result, _describe(error))
        self._read_again(request, result, reading, float(change))
        return None

    def _as_it_stands(self, request, result):
        """Why the result itself is the answer, if it is: no reading can say it, or none understands the question.

        A word that the tool took as an argument, the name of a shop say, is understood by the tool.
        """
        known = self.layer.answers
        number = type(result.value) in (int, float) and len(result.text) <= MAX_DIGITS
        if known is not None and number and result.text not in known:
            return "the number is none of the known answers: it is given as the tool gave it"
        misunderstood = set(self.foreign) - set(words_of(map(str, request.arguments.values())))
        if misunderstood and (number or known is not None and result.text in known):
            return "the question is not understood: the answer is given as the tool gave it"
        return ""

    def _read_again(self, request, result, reading, change):
        self.meter.depth += 1
        before, earlier = self.p, self.reading
        if note := self._as_it_stands(request, result):
            reading = dataclasses.replace(reading, answer=result.text)
            self.p = self.tools[request.tool].usefulness.errs
        else:
            self.p, note = self._doubt(reading)
        self.reading = reading
        if reading.answer != earlier.answer:
            astray = tool_astray(before, self.tools[request.tool].usefulness.errs)
            if astray > max(self.p, DISBELIEF):
                note = note or (f"the tool contradicts an answer of confidence {1 - before:.2f}: "
                                f"it is the tool that is wrong with probability {astray:.2f}")
            if astray:
                self.p = 1 - (1 - self.p) * (1 - astray)
        self.rises += self.p > before
        if self.p < self.best_p:
            self.best, self.best_p = reading, self.p
        self._record_call(request.tool, request.arguments, result, p_wrong_after=self.p, note=note,
                          state_change=change, candidates=self._nearest(), answer=reading.answer,
                          p_wrong_before=before)

    def _failed(self, tool, arguments, result, note=""):
        """Record a failure, do without the tool from now on, and stop after one too many."""
        self.unavailable.add(tool)
        self.meter.errors += 1
        self._record_call(tool, arguments, result, note=note)
        return ("tool_error", {}) if self.meter.errors > self.config.budget.errors else None

    def _settled(self):
        return "abstain" if self.best_p > self.config.abstain_above else "confident"

    # -- reading and recording ---------------------------------------------------------------------

    def _doubt(self, reading):
        """p(wrong) of a reading.  A monitor that fails knows nothing: then the answer counts as wrong."""
        try:
            p = float(self.layer.monitor.p_wrong(reading, self.meter.depth))
        except Exception as error:
            return 1.0, f"the monitor failed: {_describe(error)}"
        if not math.isfinite(p):
            return 1.0, f"the monitor gave {p}"
        return min(max(p, 0.0), 1.0), getattr(self.layer.monitor, "note", "")

    def _nearest(self):
        pairs = [(str(label), float(similarity)) for label, similarity in self.reading.candidates]
        return tuple(pair for pair in pairs if math.isfinite(pair[1]))[:self.config.candidates]

    def _record_call(self, tool, arguments, result, **more):
        self._record("call", **({"p_wrong_before": self.p, "tool": tool, "arguments": arguments,
                                 "asked": tuple(self.asked), "result": result, "ms": result.ms} | more))

    def _record(self, action, **more):
        if action != "answer":  # the end carries the time at which the loop decided to end
            self.meter.seconds_left()
        self.trace.append(Step(len(self.trace.steps), self.meter.elapsed, action,
                               **({"answer": self.best.answer} | more)))


def tool_astray(p, errs):
    """P(the tool is wrong | it contradicts an answer that is wrong with probability p and itself errs so often)."""
    tool, answer = errs * (1 - p), (1 - errs) * p
    return tool / (tool + answer) if tool else 0.0


def _failure(tool, error):
    return ToolResult(str(tool), False, error=ToolFailure(**describe_error(error)))


def _describe(error):
    return ": ".join(describe_error(error).values())
