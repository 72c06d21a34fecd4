"""How a tool's arguments come out of a question, declared instead of programmed.

    lookup:      {"shop": FromQuestion(r"cost at (\\w+)"),
                  "item": AskModel("what shape is the {colour} one?", r"the (?P<colour>\\w+) one")}
    calculator:  {"expression": Template("{a} + {count}", a=FromQuestion(r"what is (\\d+) plus", int),
                                         count=AskModel("how many {shape}s are there?",
                                                        r"number of (?P<shape>\\w+?)s\\b", int))}

A value is copied out of the question, asked of the model itself (a question about the picture that it
can answer), built from such values, or constant.  Nothing is guessed: what does not match is an
``ArgumentError`` that names the parameter, and the tool is not called.
"""

import re
import string

from xuravljepa.agent.errors import ArgumentError, ToolError

MAX_QUESTION = 2000  # characters in which patterns are searched: bounds their running time
_MARK = r"(?:earlier|before|previously|from memory)"
# At the beginning; or at the end of a question in the past tense: "what is left of it, before?" is none.
_EARLIER = re.compile(rf"^\s*{_MARK}\b[\s,:]*\S|"
                      rf"\b(?:was|were|did|had|seen|saw)\b.*\b{_MARK}\s*[?.!]*\s*$",
                      re.IGNORECASE | re.DOTALL)
_PRESENT = (  # in this order
    (rf"^\s*{_MARK}\b[\s,:]*", ""), (rf"[\s,]*\b{_MARK}\s*([?.!]*)\s*$", r"\1"),
    (r"^have you seen\b", "do you see"), (r"\bdid you see\s*([?.!]*)$", r"are there\1"),
    (r"^did you see\b", "do you see"), (r"^was (an? .+?) there\b", r"is there \1"),
    (r"\bwas\b", "is"), (r"\bwere\b", "are"), (r"\bdid\b", "does"),
)
_NUMBERS = {int: re.compile(r"[+-]?[0-9]{1,18}"), float: re.compile(r"[+-]?[0-9]{1,30}(\.[0-9]{1,30})?")}


class FromQuestion:
    """The text of a pattern's one group in the question (case is ignored).

    Args:
        pattern: a regular expression with exactly one group, which may be named: a named group is
            also available to the templates of ``AskModel``.
        convert: str, int or float.
    """

    def __init__(self, pattern, convert=str):
        self.pattern, self.convert = _compile(pattern), _conversion(convert)
        if self.pattern.groups != 1:
            raise ToolError(f"the pattern {pattern!r} must have exactly one group, "
                            f"it has {self.pattern.groups}")

    def patterns(self):
        return [self.pattern]

    def resolve(self, parameter, question, groups, ask):
        found = self.pattern.search(question)
        if found is None or found.group(1) is None:  # an optional group takes part or not
            raise ArgumentError(parameter, f"the question does not match {self.pattern.pattern!r}")
        return _convert(parameter, found.group(1), self.convert)

    def __repr__(self):
        return f"FromQuestion({self.pattern.pattern!r}, {self.convert.__name__})"


class AskModel:
    """The model's own answer to a question about the same picture.

    Args:
        template: that question, with ``{name}`` for named groups found in the user's question.
        pattern: finds these groups; needless where another source of the same tool finds them.
        convert: str, int or float.
    """

    def __init__(self, template, pattern=None, convert=str):
        self.template, self.convert = template, _conversion(convert)
        self.pattern = None if pattern is None else _compile(pattern)
        self.fields = _fields(template)

    def patterns(self):
        return [] if self.pattern is None else [self.pattern]

    def resolve(self, parameter, question, groups, ask):
        missing = [name for name in self.fields if name not in groups]
        if missing:
            raise ArgumentError(parameter, f"nothing in the question gives {', '.join(missing)}")
        answer = ask(self.template.format_map(groups))
        if not isinstance(answer, str) or not answer.strip():
            raise ArgumentError(parameter, f"the model gave no answer to {self.template!r}")
        return _convert(parameter, answer, self.convert)

    def __repr__(self):
        return f"AskModel({self.template!r})"


class Template:
    """A text built from other sources: ``Template("{a} + {b}", a=..., b=...)``."""

    def __init__(self, template, **parts):
        self.template, self.parts = template, parts
        if set(_fields(template)) != set(parts):
            raise ToolError(f"the fields of {template!r} are {_fields(template)}, the parts given are "
                            f"{sorted(parts)}")
        for name, part in parts.items():
            if not callable(getattr(part, "resolve", None)):
                raise ToolError(f"part {name!r} of {template!r} must be FromQuestion, AskModel, Template or "
                                f"Constant, not {part!r:.80}")

    def patterns(self):
        return [pattern for part in self.parts.values() for pattern in part.patterns()]

    def resolve(self, parameter, question, groups, ask):
        return self.template.format_map({
            name: part.resolve(f"{parameter} ({name})", question, groups, ask)
            for name, part in self.parts.items()})

    def __repr__(self):
        return f"Template({self.template!r}, {', '.join(f'{k}={v!r}' for k, v in self.parts.items())})"


class Constant:
    """The same value every time."""

    def __init__(self, value):
        self.value = value

    def patterns(self):
        return []

    def resolve(self, parameter, question, groups, ask):
        return self.value

    def __repr__(self):
        return f"Constant({self.value!r})"


class InThePresent:
    """The source of an argument: the question as it would have been asked of an earlier picture at the time."""

    def __init__(self):
        self.pattern = _EARLIER

    def patterns(self):
        return [self.pattern]

    def resolve(self, parameter, question, groups, ask):
        return in_the_present(question)

    def __repr__(self):
        return "InThePresent()"


def speaks_of_earlier(question):
    """Whether a question is about what was seen before: no picture in view can answer it."""
    return len(question) <= MAX_QUESTION and _EARLIER.search(question) is not None


def in_the_present(question):
    """"was there a red circle before?" → "is there a red circle?"."""
    for pattern, words in _PRESENT:
        question = re.sub(pattern, words, question.strip(), flags=re.IGNORECASE)
    return question


def matches(sources, question):
    """True if every pattern of these sources is found in the question: the tool can be called for it."""
    return len(question) <= MAX_QUESTION and all(
        pattern.search(question) for source in sources.values() for pattern in source.patterns())


def fill_arguments(sources, question, ask):
    """Produce the arguments of a call.

    Args:
        sources: ``{parameter: FromQuestion | AskModel | Template | Constant}``.
        question: the user's question.
        ask: ``ask(question) -> str``, the model's answer about the same picture.

    Returns:
        ``{parameter: value}``.

    Raises:
        ArgumentError: names the parameter that found no value, and the pattern or the answer at fault.
    """
    if len(question) > MAX_QUESTION:
        raise ArgumentError("question", f"is longer than {MAX_QUESTION} characters ({len(question)})")
    # All that the question tells is looked for first: a question that does not fit costs no answer.
    groups = {}
    for parameter, source in sources.items():
        for pattern in source.patterns():
            found = pattern.search(question)
            if found is None:
                raise ArgumentError(parameter, f"the question does not match {pattern.pattern!r}")
            for name, text in found.groupdict().items():
                if text is not None and groups.setdefault(name, text) != text:
                    raise ArgumentError(parameter, f"the question gives two values for {name!r}: "
                                                   f"{groups[name]!r} and {text!r}")
    return {parameter: source.resolve(parameter, question, groups, ask)
            for parameter, source in sources.items()}


def _compile(pattern):
    try:
        return re.compile(pattern, re.IGNORECASE)
    except (re.error, TypeError) as error:
        raise ToolError(f"{pattern!r} is no regular expression: {error}") from None


def _conversion(convert):
    if convert not in (str, int, float):
        raise ToolError(f"convert is str, int or float, not {convert!r}")
    return convert


def _convert(parameter, text, convert):
    text = text.strip()
    if convert is str:
        return text
    if not _NUMBERS[convert].fullmatch(text):
        kind = "a whole number" if convert is int else "a number"
        raise ArgumentError(parameter, f"expected {kind}, got {text[:60]!r}")
    return convert(text)


def _fields(template):
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ToolError(f"the template {template!r} is malformed: {error}") from None
    if not all(field.isidentifier() for field in fields):
        raise ToolError(f"the fields of a template are plain names, not {fields}")
    return fields
