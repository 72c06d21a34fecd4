"""The built-in tools are right, bounded, and fail in words."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xuracore.errors import FormatError, ShapeError
from xuravljepa.agent.builtin import KnowledgeBase, MemorySearch, add, calculator, echo
from xuravljepa.agent.errors import ArgumentError, ToolError
from xuravljepa.agent.tools import ToolRegistry, ToolRequest


@pytest.mark.parametrize("expression, value", [
    ("7 + 3 * 2", 13), ("(7 + 3) * 2", 20), ("-3 + 5", 2), ("7 / 2", 3.5), ("6 / 2", 3), ("7 // 2", 3),
    ("7 % 4", 3), ("2 ** 10", 1024), ("1e3", 1000), ("2 ** -1", 0.5), ("+4", 4), ("2 ** 62", 2**62),
])
def test_calculator(expression, value):
    result = calculator(expression)
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize("expression", [
    "", "1 +", "x", "__import__('os')", "().__class__", "'a' * 9", "True + 1", "1 if 1 else 2", "[1][0]",
    "f(1)", "9 ** 9 ** 9", "9 ** 65", "(-1) ** 0.5",
    "1 / 0", "1 // 0", "1e308 * 10", "1j", "1 < 2", "1; 2", "1 << 5",
    "9" * 31, "2 ** 63", "(10 ** 29) ** 8", "1" + "+1" * 200, "(" * 90 + "1" + ")" * 90 + "x", "\x00",
    "lambda: 1",
])
def test_calculator_refuses_in_words(expression):
    with pytest.raises(ValueError, match="."):
        calculator(expression)


TERMS = st.integers(-999, 999).map(lambda n: f"({n})")
EXPRESSIONS = st.recursive(TERMS, lambda e: st.tuples(e, st.sampled_from("+-*"), e).map(
    lambda parts: f"({' '.join(parts)})"), max_leaves=6)


@given(EXPRESSIONS)
def test_calculator_equals_arithmetic(expression):
    assert calculator(expression) == eval(expression)


@given(st.text(alphabet="0123456789+-*/%(). e", max_size=40))
def test_calculator_gives_a_finite_number_or_a_value_error(expression):
    try:
        value = calculator(expression)
    except ValueError:
        return
    assert type(value) in (int, float) and math.isfinite(value)


def test_add_and_echo():
    assert add(7, 3) == 10
    assert echo("as it was") == "as it was"


PRICES = {"Zorba": {"circle": 7, "square": 2.5}, "kumo": {"circle": "free"}}


def test_lookup_ignores_case_and_blanks():
    base = KnowledgeBase(PRICES)
    assert len(base) == 3
    assert base.lookup(" zorba ", "CIRCLE") == 7
    assert base.lookup("Kumo", "circle") == "free"


@pytest.mark.parametrize("shop, item, says", [
    ("zorbo", "circle", "did you mean 'zorba'"), ("zorba", "circel", "did you mean 'circle'"),
    ("", "", "no shop"), ("q" * 10_000, "x", "no shop"),
])
def test_lookup_of_an_unknown_name_suggests(shop, item, says):
    with pytest.raises(LookupError, match=says):
        KnowledgeBase(PRICES).lookup(shop, item)


@pytest.mark.parametrize("table", [
    {"a": 1}, {"a": {"b": None}}, {"a": {"b": math.nan}}, {"a": {"b": [1]}}, {"a": {"b": True}}, {1: {}},
    {"a": {"b": 1}, "A": {"B ": 2}},
])
def test_a_table_that_is_none_is_refused(table):
    with pytest.raises(ToolError):
        KnowledgeBase(table)


def test_files_give_the_same_table(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(PRICES))
    (tmp_path / "p.csv").write_text("shop,item,price\nZorba,circle,7\nZorba,square,2.5\nkumo,circle,free\n")
    for base in (KnowledgeBase.from_json(tmp_path / "p.json"), KnowledgeBase.from_csv(tmp_path / "p.csv")):
        questions = [("zorba", "circle"), ("zorba", "square"), ("kumo", "circle")]
        assert [base.lookup(shop, item) for shop, item in questions] == [7, 2.5, "free"]


@pytest.mark.parametrize("name, content", [
    ("p.json", b"{"), ("p.json", b"[1]"), ("p.json", b"\xff\xfe"), ("p.json", b'{"a": 1}'),
    ("p.json", b"[" * 100_000), ("p.csv", b"shop,item,price\na,b\n"),
    ("p.csv", b"shop,item,price\na,b,1\na,b,2\n"), ("p.csv", b"\xff"),
])
def test_a_damaged_file_is_named(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    read = KnowledgeBase.from_json if name.endswith("json") else KnowledgeBase.from_csv
    with pytest.raises(FormatError, match=name):
        read(path)
    with pytest.raises(FormatError, match="missing"):
        read(tmp_path / "missing")


AXES = {"red": [1, 0, 0], "blue": [0, 1, 0], "reddish": [1, 0.5, 0]}


def memory():
    search = MemorySearch(AXES.get, 3)
    for label in ("red", "blue"):
        search.add_entry(AXES[label], {"seen": label}, label)
    return search


def test_memory_search_gives_the_nearest_with_their_ids():
    hits = memory().search(AXES["reddish"], k=2)
    assert [hit["id"] for hit in hits] == [0, 1]
    assert hits[0]["value"] == {"seen": "red"}
    assert hits[0]["similarity"] == pytest.approx(1 / math.hypot(1, 0.5))


def test_memory_search_as_a_tool_cites_what_it_found():
    with ToolRegistry() as registry:
        registry.register(memory().memory_search, isolation="inline")
        result = registry.run(ToolRequest("memory_search", {"query": "reddish", "k": 1}))
    assert result.text == "Found: red (similarity: 0.8944) [0]"
    assert result.value[0]["id"] == 0


def test_an_empty_memory_says_so():
    with ToolRegistry() as registry:
        registry.register(MemorySearch(AXES.get, 3).memory_search, isolation="inline")
        result = registry.run(ToolRequest("memory_search", {"query": "red"}))
    assert not result.ok and result.error.message == "Knowledge base is empty"


@pytest.mark.parametrize("vector, error", [
    ([1, 0], ShapeError), ([0, 0, 0], ArgumentError), ([np.nan, 0, 0], ArgumentError),
    ([np.inf, 0, 0], ArgumentError),
])
def test_a_key_without_a_direction_is_refused(vector, error):
    with pytest.raises(error):
        memory().add_entry(vector, None, "x")
    with pytest.raises(error):
        memory().search(vector)
