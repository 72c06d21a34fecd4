"""Tools: what the agent may call, how a call is checked and run, and what comes back.

A tool is a function with type hints and a Google docstring.  Everything that can go wrong with a call
(an unknown name, a wrong argument, an exception, a hang, a gigabyte) comes back as a ``ToolResult`` that
says so; only a wrong *registration* raises.  A result is data: nothing in it can register a tool, raise
a limit or be executed.
"""

import dataclasses
import difflib
import hashlib
import inspect
import json
import keyword
import time

from xuravljepa.agent.arguments import fill_arguments, matches
from xuravljepa.agent.errors import ArgumentError, ToolError
from xuravljepa.agent.sandbox import Limits, Sandbox
from xuravljepa.agent.sandbox_worker import OutputError, describe_error, plain_output
from xuravljepa.agent.schema import check_arguments, check_value, function_schema

MAX_TEXT = 2000  # characters of a result that are read back into the model
_JSON_TYPES = {"string", "boolean", "integer", "number", "array", "object", "null"}


class Output:
    """What a tool returns when the text to be read differs from the value to be kept."""

    is_tool_output = True
    __slots__ = ("value", "text")

    def __init__(self, value, text):
        self.value, self.text = value, text


@dataclasses.dataclass(frozen=True)
class ToolRequest:
    """One call that is wanted."""

    tool: str
    arguments: dict
    question: str = ""
    depth: int = 0  # how often the model had read again before this call

    def key(self):
        """Equal for equal calls: the name and the canonical JSON of the arguments."""
        try:
            return f"{self.tool}({_canonical(self.arguments)})"
        except (TypeError, ValueError, RecursionError):
            return f"{self.tool}({type(self.arguments).__name__} without a JSON form)"


@dataclasses.dataclass(frozen=True)
class ToolFailure:
    """Why a call gave nothing.

    The type is UnknownTool, ArgumentError, Timeout, Crashed, OutputError, MemoryError or the name of the
    exception that the tool raised.
    """

    type: str
    message: str


@dataclasses.dataclass(frozen=True)
class ToolResult:
    """What came of a call."""

    tool: str
    ok: bool
    value: object = None  # plain JSON data
    text: str = ""  # what the model reads; at most MAX_TEXT characters
    error: ToolFailure | None = None
    ms: float = 0.0
    truncated: bool = False  # the text was cut
    late: bool = False  # an inline tool overran its limit, which nobody could enforce

    def digest(self):
        """SHA-256 (hex) of what the result says; the time it took does not count."""
        content = {"tool": self.tool, "ok": self.ok, "value": self.value, "text": self.text,
                   "error": None if self.error is None else dataclasses.asdict(self.error)}
        return hashlib.sha256(_canonical(content).encode()).hexdigest()

    def to_dict(self):
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data):
        """Rebuild a result from ``to_dict()``.

        Raises:
            ArgumentError: a key is missing, unknown or of the wrong type.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(data, dict) or set(data) != fields:
            raise ArgumentError("result", f"expected an object with exactly: {', '.join(sorted(fields))}")
        kinds = {"tool": str, "ok": bool, "text": str, "truncated": bool, "late": bool}
        for name, kind in kinds.items():
            if not isinstance(data[name], kind):
                raise ArgumentError(f"result.{name}", f"expected {kind.__name__}, got {data[name]!r:.80}")
        check_value({"type": "number"}, data["ms"], "result.ms")
        error = data["error"]
        if error is not None:
            error = check_value({"type": "object", "additionalProperties": {"type": "string"}}, error,
                                "result.error")
            if set(error) != {"type", "message"}:
                raise ArgumentError("result.error", "expected exactly: message, type")
            error = ToolFailure(**error)
        if (error is None) != data["ok"]:
            raise ArgumentError("result", "ok means that there is no error, and only that")
        return cls(**(data | {"error": error, "ms": float(data["ms"])}))


@dataclasses.dataclass(frozen=True)
class Usefulness:
    """What calling a tool is expected to do, estimated on validation questions (vljepa §4.2).

    A call is worth it where ``p_wrong · fixes − (1 − p_wrong) · breaks > cost``.
    """

    fixes: float = 0.9  # P(the answer becomes right | it was wrong)
    breaks: float = 0.02  # P(the answer becomes wrong | it was right)
    cost: float = 0.05  # of one call, in units of a right answer
    errs: float = 0.0  # P(what the tool says is wrong): how little it is believed against a sure answer

    def __post_init__(self):
        for name in ("fixes", "breaks", "errs"):
            if not 0 <= getattr(self, name) <= 1:
                raise ToolError(f"Usefulness.{name} is a probability, not {getattr(self, name)}")
        if not 0 <= self.cost < float("inf"):
            raise ToolError(f"Usefulness.cost must be finite and not negative, not {self.cost}")

    def gain(self, p_wrong):
        """Expected gain of a call, its cost already taken off; call if it is positive."""
        return p_wrong * self.fixes - (1.0 - p_wrong) * self.breaks - self.cost


@dataclasses.dataclass(frozen=True)
class Tool:
    """A registered function.  Built by ``ToolRegistry.register``."""

    name: str
    function: object = dataclasses.field(repr=False)
    schema: dict = dataclasses.field(repr=False)
    arguments: dict = dataclasses.field(default_factory=dict)  # parameter → how its value is produced
    when: tuple[str, ...] = ()  # examples of questions that need this tool
    isolation: str = "process"
    limits: Limits = Limits()
    usefulness: Usefulness = Usefulness()
    takes_deadline: bool = False

    @property
    def description(self):
        return self.schema["description"]

    @property
    def parameters(self):
        return self.schema["parameters"]["properties"]

    @property
    def output_type(self):
        kind = self.schema.get("return", {}).get("type", "any")
        return kind if kind in _JSON_TYPES else "any"

    def card(self):
        """The text that stands for the tool where questions are compared with tools by meaning."""
        parameters = [f"{name}: {entry.get('type', 'any')}" for name, entry in self.parameters.items()]
        return "\n".join([f"{self.name}({', '.join(parameters)})", self.description, *self.when])

    def function_card(self):
        """The schema as language models are given it: ``{"type": "function", "function": {...}}``."""
        return {"type": "function", "function": self.schema}

    def applies(self, question):
        """True if this tool's arguments can be looked for: every pattern they need is in the question."""
        if not self.arguments and self.schema["parameters"]["required"]:
            return False
        return matches(self.arguments, question)

    def fill(self, question, ask):
        """Produce this tool's arguments for a question; see ``arguments.fill_arguments``."""
        return self.check(fill_arguments(self.arguments, question, ask))

    def check(self, arguments):
        """The arguments as plain JSON values; raises ArgumentError naming what does not fit."""
        return check_arguments(self.schema["parameters"], arguments)


class ToolRegistry:
    """The tools an agent has, by name.

    Args:
        sandbox: where isolated tools run; a new ``Sandbox`` by default.
    """

    def __init__(self, sandbox=None):
        self._tools = {}
        self._sandbox = Sandbox() if sandbox is None else sandbox

    def register(self, function, *, name=None, description=None, arguments=None, when=(),
                 isolation="process", limits=Limits(), usefulness=Usefulness()):
        """Add a tool.

        Args:
            function: a function with a hint and a described line (``Args:``) for each parameter.  A
                parameter ``deadline: float`` is not part of the schema: it receives the value of
                ``time.monotonic()`` at which the call should be over.
            name: its public name, a Python identifier; the function's own by default.
            description: what it does, for choosing between tools; the docstring's by default.
            arguments: how each required parameter gets its value from a question: ``{parameter:
                FromQuestion | AskModel | Template | Constant}``.  Without it the caller supplies them.
            when: an example of a question that needs this tool, or several.
            isolation: ``"process"``: in a process of its own, stopped when its time is up; module globals
                and closures are copies there.  ``"inline"``: in this process, for fast and trusted
                functions: an overrun is recorded but cannot be stopped.
            limits: time, memory and size of result.
            usefulness: what a call is expected to gain.

        Returns:
            The ``Tool``.

        Raises:
            ToolError: the name is taken or no identifier, the function is not fully described, or
                ``arguments`` does not fit its parameters.
        """
        takes_deadline = _takes_deadline(function)
        schema = function_schema(function, name, description, hidden=("deadline",) if takes_deadline else ())
        name = schema["name"]
        if not name.isidentifier() or keyword.iskeyword(name):
            raise ToolError(f"{name!r} is no valid tool name; give an identifier with name=")
        if name in self._tools:
            raise ToolError(f"there is a tool named {name!r} already; remove it first, or give another name=")
        if isolation not in ("process", "inline"):
            raise ToolError(f"isolation is 'process' or 'inline', not {isolation!r}")
        arguments = {} if arguments is None else dict(arguments)
        _check_sources(name, schema["parameters"], arguments)
        when = (when,) if isinstance(when, str) else tuple(when)
        tool = Tool(name, function, schema, arguments, when, isolation, limits, usefulness, takes_deadline)
        self._tools[name] = tool
        return tool

    def appraise(self, name, usefulness):
        """Replace what calling a tool is expected to do; raises ToolError where there is none of that name."""
        self._tools[name] = dataclasses.replace(self.get(name), usefulness=usefulness)

    def remove(self, name):
        """Take a tool out; raises ToolError where there is none of that name."""
        del self._tools[self.get(name).name]

    def get(self, name):
        """The tool of that name; raises ToolError with the nearest name where there is none."""
        if not isinstance(name, str) or name not in self._tools:
            raise ToolError(f"there is no tool named {name!r}{self._suggestion(name)}")
        return self._tools[name]

    def names(self):
        return list(self._tools)

    def is_empty(self):
        return not self._tools

    def __len__(self):
        return len(self._tools)

    def __iter__(self):
        return iter(list(self._tools.values()))

    def __contains__(self, name):
        return name in self._tools

    def schemas(self):
        return [tool.function_card() for tool in self]

    def run(self, request, seconds=None):
        """Make one call; never raises for anything that the request or the tool did.

        Args:
            request: ``ToolRequest``.
            seconds: time that is left to the caller; the tool's own limit if that is shorter.

        Returns:
            ``ToolResult``.
        """
        start = time.monotonic()
        try:
            tool = self.get(request.tool)
        except ToolError as error:
            return _failed(request, "UnknownTool", str(error), start)
        try:
            arguments = tool.check(request.arguments)
        except ArgumentError as error:
            return _failed(request, "ArgumentError", str(error), start)
        limits = tool.limits
        if seconds is not None and seconds < limits.seconds:
            if seconds <= 0:
                return _failed(request, "Timeout", "no time is left for a call", start)
            limits = dataclasses.replace(limits, seconds=seconds)
        if tool.takes_deadline:
            arguments["deadline"] = start + limits.seconds
        if tool.isolation == "inline":
            reply = _run_inline(tool.function, arguments, limits)
        else:
            reply = self._sandbox.run(tool.function, arguments, limits)
        return _result(tool, request, reply, start, limits)

    def warm_up(self):
        """Let the process for isolated tools start in the background, if any tool needs it."""
        if any(tool.isolation == "process" for tool in self):
            self._sandbox.warm_up()

    def close(self):
        """End the processes of isolated tools; the registry stays usable."""
        self._sandbox.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _suggestion(self, name):
        if not self._tools:
            return "; none is registered"
        near = difflib.get_close_matches(str(name), self._tools, n=1)
        return f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(self._tools)}"


def _takes_deadline(function):
    try:
        return "deadline" in inspect.signature(function).parameters
    except (ValueError, TypeError):
        return False  # function_schema says what is wrong


def _check_sources(name, parameters, arguments):
    for parameter, source in arguments.items():
        if parameter not in parameters["properties"]:
            known = ", ".join(parameters["properties"]) or "none"
            raise ToolError(f"tool {name!r} has no parameter {parameter!r}; it has: {known}")
        if not callable(getattr(source, "resolve", None)):
            raise ToolError(f"tool {name!r}: the source of {parameter!r} must be FromQuestion, AskModel, "
                            f"Template or Constant, not {source!r:.80}")
    missing = [parameter for parameter in parameters["required"] if arguments and parameter not in arguments]
    if missing:
        raise ToolError(f"tool {name!r}: arguments= says nothing about {', '.join(missing)}")


def _run_inline(function, arguments, limits):
    try:
        value, text = plain_output(function(**arguments), limits.output_bytes)
    except (Exception, SystemExit) as error:  # Ctrl-C is the user's and passes
        return {"ok": False, "error": describe_error(error)}
    return {"ok": True, "value": value, "text": text}


def _result(tool, request, reply, start, limits):
    ms = 1e3 * (time.monotonic() - start)
    late = tool.isolation == "inline" and ms > 1e3 * limits.seconds
    if not reply["ok"]:
        return ToolResult(tool.name, False, error=ToolFailure(**reply["error"]), ms=ms, late=late)
    value = reply["value"]
    try:
        value = check_value(tool.schema.get("return", {}), value, "result")
    except ArgumentError as error:
        return dataclasses.replace(_failed(request, "OutputError", str(error), start), late=late)
    text = reply["text"]
    if text is None:
        text = value if isinstance(value, str) else _canonical(value)
    return ToolResult(tool.name, True, value, text[:MAX_TEXT], ms=ms, truncated=len(text) > MAX_TEXT,
                      late=late)


def _failed(request, kind, message, start):
    return ToolResult(str(request.tool), False, error=ToolFailure(kind, message),
                      ms=1e3 * (time.monotonic() - start))


def _canonical(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
