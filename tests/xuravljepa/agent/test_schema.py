"""A tool's schema follows from its hints and docstring; the check against it coerces nothing."""

import math
from typing import Any, Literal, Optional, Union

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xuravljepa.agent.errors import ArgumentError, ToolError
from xuravljepa.agent.schema import (
    check_arguments, check_value, function_schema, hint_schema, parse_docstring)


def paint(name: str, size: int, tint: Literal["red", "blue"] = "red", at: tuple[float, float] = (0.0, 0.0),
          tags: list[str] = (), extra: Optional[dict[str, int]] = None) -> bool:
    """Paint a thing
    on the wall.

    Args:
        name: what to paint
        size: how large,
            in centimetres
        tint: its colour
        at (tuple): where
        tags: labels
        extra: more numbers

    Returns:
        Whether it worked.
    """


def test_schema_of_a_described_function():
    schema = function_schema(paint)
    assert schema["name"] == "paint"
    assert schema["description"] == "Paint a thing on the wall."
    assert schema["return"] == {"type": "boolean", "description": "Whether it worked."}
    parameters = schema["parameters"]
    assert parameters["required"] == ["name", "size"]
    assert parameters["additionalProperties"] is False
    assert parameters["properties"] == {
        "name": {"type": "string", "description": "what to paint"},
        "size": {"type": "integer", "description": "how large, in centimetres"},
        "tint": {"type": "string", "enum": ["red", "blue"], "description": "its colour"},
        "at": {"type": "array", "prefixItems": [{"type": "number"}] * 2, "description": "where"},
        "tags": {"type": "array", "items": {"type": "string"}, "description": "labels"},
        "extra": {"type": "object", "additionalProperties": {"type": "integer"}, "nullable": True,
                  "description": "more numbers"},
    }


@pytest.mark.parametrize("hint, schema", [
    (int, {"type": "integer"}), (float, {"type": "number"}), (str, {"type": "string"}),
    (bool, {"type": "boolean"}), (None, {"type": "null"}), (list, {"type": "array"}),
    (dict, {"type": "object"}), (Any, {}), (int | None, {"type": "integer", "nullable": True}),
    (Union[int, str], {"type": ["integer", "string"]}),
    (Union[int, list[str]], {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "string"}}]}),
    (tuple[int, ...], {"type": "array", "items": {"type": "integer"}}),
    (Literal[1, "a"], {"type": ["integer", "string"], "enum": [1, "a"]}),
])
def test_schema_of_a_hint(hint, schema):
    assert hint_schema(hint) == schema


@pytest.mark.parametrize("hint", [set, dict[int, str], complex, bytes, np.ndarray, "nonsense"])
def test_a_hint_without_a_json_form_is_refused(hint):
    with pytest.raises(ToolError):
        hint_schema(hint)


def test_choices_at_the_end_of_a_description_are_an_enumeration():
    def choose(colour: str) -> str:
        """Choose.

        Args:
            colour: which one (choices: ["red", "blue"])
        """

    entry = function_schema(choose)["parameters"]["properties"]["colour"]
    assert entry == {"type": "string", "enum": ["red", "blue"], "description": "which one"}


def _no_hint(a):
    """Do. \n\nArgs:\n    a: it"""


def _no_description(a: int):
    """Do."""


def _star(*a: int):
    """Do. \n\nArgs:\n    a: it"""


def _positional(a: int, /):
    """Do. \n\nArgs:\n    a: it"""


def _undocumented(a: int):
    pass


def _bad_choices(a: int):
    """Do. \n\nArgs:\n    a: it (choices: ["red"])"""


async def _async(a: int):
    """Do. \n\nArgs:\n    a: it"""


def _generator(a: int):
    """Do. \n\nArgs:\n    a: it"""
    yield a


@pytest.mark.parametrize("function, says", [
    (_no_hint, "no type hint"), (_no_description, "not described"), (_star, "by name"),
    (_positional, "by name"), (_undocumented, "no description"), (_bad_choices, "choices"), (_async, "async"),
    (_generator, "generator"), (int, "function"), (7, "function"),
])
def test_a_function_that_is_not_fully_described_is_refused(function, says):
    with pytest.raises(ToolError, match=says):
        function_schema(function)


def test_methods_and_callable_objects_have_schemas():
    class Shop:
        def price(self, item: str) -> int:
            """Price of an item.

            Args:
                item: which
            """

        def __call__(self, n: int) -> int:
            """Call it.

            Args:
                n: a number
            """

    assert list(function_schema(Shop().price)["parameters"]["properties"]) == ["item"]
    assert list(function_schema(Shop())["parameters"]["properties"]) == ["n"]


def test_sections_of_a_docstring():
    summary, described, returned = parse_docstring(
        "One.\nTwo: three.\n\nArgs:\n    a (int): first\n    b: second:\n        more\n\nReturns:\n    It.\n")
    assert (summary, described, returned) == ("One. Two: three.", {"a": "first", "b": "second: more"}, "It.")


PARAMETERS = function_schema(paint)["parameters"]


@pytest.mark.parametrize("arguments, names", [
    ({"size": 1}, "name"),
    ({"name": "a", "size": 1, "colour": 1}, "colour"),
    ({"name": "a", "size": "1"}, "size"),
    ({"name": "a", "size": 1.0}, "size"),
    ({"name": "a", "size": True}, "size"),
    ({"name": "a", "size": 2**63}, "size"),
    ({"name": "a", "size": 10**5000}, "size"),
    ({"name": 5, "size": 1}, "name"),
    ({"name": None, "size": 1}, "name"),
    ({"name": "x" * 70_000, "size": 1}, "name"),
    ({"name": "\ud800", "size": 1}, "name"),
    ({"name": "a", "size": 1, "tint": "green"}, "tint"),
    ({"name": "a", "size": 1, "at": [1.0]}, "at"),
    ({"name": "a", "size": 1, "at": [1.0, math.nan]}, r"at\[1\]"),
    ({"name": "a", "size": 1, "at": [1.0, math.inf]}, r"at\[1\]"),
    ({"name": "a", "size": 1, "at": [1.0, 10**400]}, r"at\[1\]"),
    ({"name": "a", "size": 1, "at": [1.0, True]}, r"at\[1\]"),
    ({"name": "a", "size": 1, "tags": "ab"}, "tags"),
    ({"name": "a", "size": 1, "tags": ["a", 1]}, r"tags\[1\]"),
    ({"name": "a", "size": 1, "extra": {"x": 1.5}}, "extra.x"),
    ({"name": "a", "size": 1, "extra": {1: 1}}, "extra"),
    ([("name", "a")], "arguments"),
    (None, "arguments"),
])
def test_an_argument_that_does_not_fit_is_named(arguments, names):
    with pytest.raises(ArgumentError, match=f"^{names}:"):
        check_arguments(PARAMETERS, arguments)


def test_a_whole_number_is_a_number_and_tuples_are_lists():
    checked = check_arguments(PARAMETERS, {"name": "a", "size": 1, "at": (1, 2), "extra": None})
    assert checked == {"name": "a", "size": 1, "at": [1.0, 2.0], "extra": None}
    assert [type(x) for x in checked["at"]] == [float, float]


def test_a_subclass_becomes_the_plain_type():
    assert type(check_value({"type": "number"}, np.float64(0.5))) is float


def test_nesting_and_size_are_bounded():
    loop = []
    loop.append(loop)
    with pytest.raises(ArgumentError, match="nested deeper"):
        check_value({}, loop)
    with pytest.raises(ArgumentError, match="too many"):
        check_value({}, [0] * 100_000)


JSON = st.recursive(st.none() | st.booleans() | st.integers(-2**63 + 1, 2**63 - 1)
                    | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner,
                                                                                max_size=3), max_leaves=8)
KINDS = ["null", "boolean", "integer", "number", "string", "array", "object"]
PYTHON = {"null": type(None), "boolean": bool, "integer": int, "number": float, "string": str, "array": list,
          "object": dict}


@given(JSON, st.sampled_from(KINDS))
def test_a_value_passes_unchanged_or_is_refused(value, kind):
    fits = type(value) is PYTHON[kind] or kind == "number" and type(value) is int
    if fits:
        assert check_value({"type": kind}, value) == value
    else:
        with pytest.raises(ArgumentError):
            check_value({"type": kind}, value)
