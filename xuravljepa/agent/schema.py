"""A tool's JSON schema from its type hints and docstring, and the strict check against it.

The conventions are those of ``transformers.utils.chat_template_utils``: a hint for every parameter, a
Google docstring that describes each of them, no default means required, ``Literal`` or a closing
``(choices: [...])`` means an enumeration.  The check is stricter than JSON Schema's: no unknown
names, no NaN or Inf, ``True`` is not a number, a string never becomes a number.  A whole number is
accepted where a fraction is expected.
"""

import inspect
import json
import math
import re
import types
import typing

from xuravljepa.agent.errors import ArgumentError, ToolError

MAX_INTEGER = 2**63 - 1
MAX_SIZE = 65_536  # values and characters in one argument, nested ones included
MAX_DEPTH = 16

_SCALARS = {int: "integer", float: "number", str: "string", bool: "boolean", types.NoneType: "null"}
_SECTION = re.compile(r"(Args|Arguments|Parameters|Returns|Raises|Yields|Examples?|Notes?):\s*$")
_ENTRY = re.compile(r"(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)$")
_CHOICES = re.compile(r"\(choices:\s*(\[.*\])\s*\)\.?\s*$", re.DOTALL)


# ---------------------------------------------------------------------------------------------
# From a function to its schema
# ---------------------------------------------------------------------------------------------


def function_schema(function, name=None, description=None, hidden=()):
    """Describe a function as ``{"name", "description", "parameters", "return"?}``.

    Args:
        function: a plain function, a bound method or an object with ``__call__``.
        name: the public name; the function's own by default.
        description: what the tool does; the docstring's first part by default.
        hidden: parameters that the caller of the tool does not supply.

    Raises:
        ToolError: a hint or a parameter's description is missing, or cannot be expressed.
    """
    label = name or getattr(function, "__name__", type(function).__name__)
    signature, hints = _signature(function, label)
    summary, described, returned = parse_docstring(_docstring(function))
    summary = description or summary
    if not summary:
        raise ToolError(f"tool {label!r} has no description: give it a docstring or description=")

    properties, required = {}, []
    for parameter in signature.parameters.values():
        if parameter.name in hidden:
            continue
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ToolError(f"tool {label!r}: parameter {parameter.name!r} must be passable by name "
                            "(no *args, **kwargs or positional-only parameters)")
        if parameter.name not in hints:
            raise ToolError(f"tool {label!r}: parameter {parameter.name!r} has no type hint")
        if not described.get(parameter.name):
            raise ToolError(f"tool {label!r}: parameter {parameter.name!r} is not described; add a line "
                            f"'{parameter.name}: ...' under 'Args:' in the docstring")
        try:
            entry = hint_schema(hints[parameter.name])
            properties[parameter.name] = _with_description(entry, described[parameter.name])
        except ToolError as error:
            raise ToolError(f"tool {label!r}: parameter {parameter.name!r}: {error}") from None
        if parameter.default is parameter.empty:
            required.append(parameter.name)

    schema = {"name": label, "description": summary,
              "parameters": {"type": "object", "properties": properties, "required": required,
                             "additionalProperties": False}}
    if "return" in hints:
        try:
            schema["return"] = hint_schema(hints["return"])
        except ToolError as error:
            raise ToolError(f"tool {label!r}: return value: {error}") from None
        if returned:
            schema["return"]["description"] = returned
    return schema


def _signature(function, label):
    target = function if inspect.isroutine(function) else getattr(function, "__call__", None)
    if target is None or inspect.isclass(function):
        raise ToolError(f"tool {label!r} must be a function or an object with __call__, not {function!r}")
    if inspect.iscoroutinefunction(target) or inspect.isgeneratorfunction(target):
        raise ToolError(f"tool {label!r} must return its result: async and generator functions do not")
    try:
        # A bound method hides ``self``; the hints live on the function underneath.
        signature = inspect.signature(function)
        hints = typing.get_type_hints(getattr(target, "__func__", target))
    except (ValueError, TypeError, NameError) as error:
        raise ToolError(f"tool {label!r}: its signature cannot be read: {error}") from None
    return signature, hints


def _docstring(function):
    text = inspect.getdoc(function)
    if not inspect.isroutine(function):
        text = inspect.getdoc(type(function).__call__) or text
    return text or ""


def parse_docstring(text):
    """Split a Google docstring into (summary, {parameter: description}, description of the result)."""
    sections, current, seen = {"": []}, "", set()
    for line in inspect.cleandoc(text).splitlines():
        heading = _SECTION.match(line)
        if heading:
            current = heading.group(1)
            seen.add(current)
            sections.setdefault(current, [])
        else:
            sections[current].append(line)

    described = {}
    for heading in ("Args", "Arguments", "Parameters"):
        described.update(_entries(sections.get(heading, [])))
    summary = " ".join(" ".join(sections[""]).split())
    returned = " ".join(" ".join(sections.get("Returns", [])).split())
    return summary, described, returned


def _entries(lines):
    """``name: text`` lines; deeper indented lines continue the entry above them."""
    entries, name, base = {}, None, None
    for line in lines:
        if not line.strip():
            continue
        indent = len(line) - len(line.lstrip())
        base = indent if base is None else base
        found = _ENTRY.match(line.strip()) if indent <= base else None
        if found:
            name = found.group(1)
            entries[name] = found.group(2).strip()
        elif name is not None:
            entries[name] = f"{entries[name]} {line.strip()}".strip()
    return entries


def hint_schema(hint):
    """Translate one type hint.

    Raises:
        ToolError: the hint has no counterpart in JSON.
    """
    if hint is typing.Any:
        return {}
    if hint is None:
        return {"type": "null"}
    if getattr(hint, "is_tool_output", False) is True:
        return {}  # tools.Output: the value inside it can be anything
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return hint_schema(args[0])
    if isinstance(hint, type) and hint in _SCALARS:
        return {"type": _SCALARS[hint]}
    if origin is typing.Literal:
        kinds = sorted({_SCALARS.get(type(choice), "?") for choice in args})
        if "?" in kinds:
            raise ToolError(f"Literal choices must be strings, numbers, booleans or None, not {hint}")
        return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": list(args)}
    if origin in (typing.Union, types.UnionType):
        return _union_schema(args)
    if hint is list or origin is list:
        return {"type": "array", "items": hint_schema(args[0])} if args else {"type": "array"}
    if hint is tuple or origin is tuple:
        if not args or args == ((),):
            return {"type": "array"}
        if len(args) == 2 and args[1] is Ellipsis:
            return {"type": "array", "items": hint_schema(args[0])}
        return {"type": "array", "prefixItems": [hint_schema(arg) for arg in args]}
    if hint is dict or origin is dict:
        if not args:
            return {"type": "object"}
        if args[0] is not str:
            raise ToolError(f"the keys of a JSON object are strings, not {args[0]!r}")
        return {"type": "object", "additionalProperties": hint_schema(args[1])}
    raise ToolError(f"{hint!r} has no JSON form; use int, float, str, bool, list, tuple, dict, Literal, "
                    "Optional or Union of these")


def _union_schema(args):
    members = [hint_schema(arg) for arg in args if arg is not types.NoneType]
    if all(list(member) == ["type"] for member in members):
        kinds = [member["type"] for member in members]
        schema = {"type": kinds[0] if len(kinds) == 1 else kinds}
    else:
        schema = members[0] if len(members) == 1 else {"anyOf": members}
    return schema | {"nullable": True} if types.NoneType in args else schema


def _with_description(schema, text):
    found = _CHOICES.search(text)
    if found:
        try:
            choices = json.loads(found.group(1))
        except ValueError:
            raise ToolError(f"the choices must be a JSON list, not {found.group(1)}") from None
        try:
            choices = [check_value(schema, choice, "choices") for choice in choices]
        except ArgumentError as error:
            raise ToolError(str(error)) from None
        schema = schema | {"enum": choices}
        text = text[:found.start()].strip()
    return schema | {"description": text}


# ---------------------------------------------------------------------------------------------
# The check of arguments and results
# ---------------------------------------------------------------------------------------------


def check_arguments(parameters, arguments):
    """Check a call's arguments against the ``parameters`` part of a schema.

    Returns:
        The arguments as a new dict of plain JSON values; a whole number given for ``number`` is a float.

    Raises:
        ArgumentError: names the parameter and says what was given and what is expected.
    """
    if not isinstance(arguments, dict):
        raise ArgumentError("arguments", f"expected an object with named values, got {_kind(arguments)}")
    properties = parameters["properties"]
    for name in arguments:
        if name not in properties:
            known = ", ".join(properties) or "none"
            raise ArgumentError(str(name), f"no such parameter; the tool has: {known}")
    for name in parameters["required"]:
        if name not in arguments:
            raise ArgumentError(name, "is required and was not given")
    return {name: check_value(properties[name], value, name) for name, value in arguments.items()}


def check_value(schema, value, where="value", most=MAX_SIZE):
    """Check one value against a schema and return it as plain JSON data (tuples become lists).

    Raises:
        ArgumentError: names the place in the value and says what is expected there; also for more
            than ``most`` values and characters.
    """
    return _check(schema, value, where, 0, [most])


def _check(schema, value, where, depth, left):
    left[0] -= 1 + (len(value) if isinstance(value, (str, list, tuple, dict)) else 0)
    if depth > MAX_DEPTH:
        raise ArgumentError(where, f"is nested deeper than {MAX_DEPTH} levels")
    if left[0] < 0:
        raise ArgumentError(where, "holds too many values and characters")
    if value is None and schema.get("nullable"):
        return None
    if "anyOf" in schema:
        for member in schema["anyOf"]:
            try:
                return _check(member, value, where, depth, left)
            except ArgumentError:
                continue
        raise ArgumentError(where, f"fits none of the accepted forms, got {_kind(value)}")

    kind = _kind(value)
    expected = schema.get("type")
    if expected is not None:
        accepted = [expected] if isinstance(expected, str) else expected
        if kind == "integer" and "integer" not in accepted and "number" in accepted:
            value, kind = _as_float(value, where), "number"
        if kind not in accepted:
            raise ArgumentError(where, f"expected {' or '.join(accepted)}, got {kind} {_short(value)}")
    _check_bounds(value, kind, where)
    if "enum" in schema and not any(_same(value, choice) for choice in schema["enum"]):
        raise ArgumentError(where, f"expected one of {schema['enum']}, got {_short(value)}")
    if kind == "array":
        return _check_array(schema, value, where, depth, left)
    if kind == "object":
        inner = schema.get("additionalProperties", {})
        left[0] -= sum(len(key) for key in value)
        return {key: _check(inner, item, f"{where}.{key}", depth + 1, left) for key, item in value.items()}
    # Subclasses (NumPy floats, enumerations) become the plain type that the trace will read back.
    plain = {"integer": int, "number": float, "string": str}.get(kind)
    return plain(value) if plain else value


def _check_array(schema, value, where, depth, left):
    prefix = schema.get("prefixItems")
    if prefix is not None and len(value) != len(prefix):
        raise ArgumentError(where, f"expected {len(prefix)} items, got {len(value)}")
    members = prefix if prefix is not None else [schema.get("items", {})] * len(value)
    return [_check(member, item, f"{where}[{i}]", depth + 1, left)
            for i, (member, item) in enumerate(zip(members, value))]


def _check_bounds(value, kind, where):
    if kind == "number" and not math.isfinite(value):
        raise ArgumentError(where, f"must be finite, got {value}")
    if kind == "integer" and abs(value) > MAX_INTEGER:
        raise ArgumentError(where, "is beyond 64 bits")
    if kind == "string" and not _encodable(value):
        raise ArgumentError(where, "is not valid Unicode: it holds half of a surrogate pair")
    if kind == "object" and not all(isinstance(key, str) and _encodable(key) for key in value):
        raise ArgumentError(where, "has keys that are not Unicode strings")
    if kind not in ("null", "boolean", "integer", "number", "string", "array", "object"):
        raise ArgumentError(where, f"{kind} has no JSON form")


def _encodable(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _as_float(value, where):
    try:
        return float(value)
    except OverflowError:
        raise ArgumentError(where, "is too large for a float") from None


def _same(value, choice):
    return value == choice and isinstance(value, bool) == isinstance(choice, bool)


def _kind(value):
    if value is None:
        return "null"
    for python, name in ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"),
                         ((list, tuple), "array"), (dict, "object")):
        if isinstance(value, python):
            return name
    return type(value).__name__


def _short(value):
    # Slices before formatting: the value may be huge, and a huge int cannot even be formatted.
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > MAX_INTEGER:
        return "(a very large integer)"
    if isinstance(value, str):
        value = value[:60]
    elif isinstance(value, (list, tuple, dict)):
        return f"of {len(value)} items"
    return repr(value)[:80]
