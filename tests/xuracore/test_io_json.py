"""JSON documents: bounded, unambiguous, and equal after a round trip."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xuracore.errors import FormatError
from xuracore.io import load_json, parse_json, save_json

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**200), 2**200)
    | st.floats(allow_nan=False, allow_infinity=False)
    | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=12,
)


def same(a, b):
    """Equal with equal types: 1, 1.0 and True are three values here."""
    if isinstance(a, dict):
        return type(b) is dict and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return type(b) is list and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@given(values)
def test_what_is_saved_is_loaded(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "v.json"
    written = save_json(path, value)
    assert same(load_json(path), value)
    assert written.bytes == path.stat().st_size


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (float("nan"), r"'\$': is nan"),
        ({"a": [0, float("inf")]}, r"'\$\.a\[1\]': is inf"),
        ({"a": {1: 2}}, r"'\$\.a': key 1 is a int"),
        ({"a": {3, 4}}, r"'\$\.a': is a set"),
        ({"a": b"bytes"}, r"'\$\.a': is a bytes"),
        ({"a": object}, r"'\$\.a': is a type"),
        ({"a": "\udc80"}, r"'\$\.a': .* surrogate"),
        ({"\udc80": 1}, r"'\$': .* surrogate"),
        ({"a": 1 << 5000}, r"'\$\.a': is an integer of more than 4096 bits"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_place_and_the_old_file_stays(tmp_path, value, place):
    save_json(tmp_path / "v.json", {"old": True})
    with pytest.raises(FormatError, match=f"v.json: {place}"):
        save_json(tmp_path / "v.json", value)
    assert load_json(tmp_path / "v.json") == {"old": True}


def nested(levels):
    value = []
    for _ in range(levels - 1):
        value = [value]
    return value


def test_depth_is_bounded_alike_when_saving_and_loading(tmp_path):
    path = tmp_path / "v.json"
    save_json(path, nested(64))
    assert load_json(path) == nested(64)
    with pytest.raises(FormatError, match="deeper than 64"):
        save_json(path, nested(65))
    path.write_text("[" * 65 + "]" * 65)
    with pytest.raises(FormatError, match="deeper than 64"):
        load_json(path)


def test_a_value_that_holds_itself_is_refused(tmp_path):
    value = []
    value.append(value)
    with pytest.raises(FormatError, match="deeper than 64"):
        save_json(tmp_path / "v.json", value)


def test_size_is_bounded(tmp_path):
    path = tmp_path / "v.json"
    path.write_text('"' + "a" * 98 + '"')
    assert load_json(path, maximum_bytes=100) == "a" * 98
    with pytest.raises(FormatError, match="larger than 99 bytes"):
        load_json(path, maximum_bytes=99)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1,]", "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b"\xef\xbb\xbf[]", "not valid JSON"),
        (b'["\xff"]', "not UTF-8"),
        (b'{"a": 1, "a": 1}', "'a': appears twice"),
        (b'[{"b": {"a": 1, "\\u0061": 2}}]', "'a': appears twice"),
        (b"[NaN]", "NaN is not"),
        (b"[1e999]", "number 1e999 is too large"),
        (b"[-1e999]", "number -1e999 is too large"),
        (b'["\\ud800"]', "surrogate"),
        (b'{"\\udc00": 1}', "surrogate"),
        (b"[" + b"7" * 5000 + b"]", "not valid JSON"),
        (b'["a\nb"]', "not valid JSON"),
    ],
)
def test_ambiguous_or_broken_text_is_refused(data, reason):
    with pytest.raises(FormatError, match=f"some.json: .*{reason}"):
        parse_json(data, "some.json")


def test_brackets_inside_strings_do_not_nest():
    assert parse_json(b'["' + b"[" * 1000 + rb'\"[[[\\", "{{"]', maximum_depth=1) == [
        "[" * 1000 + '"[[[\\',
        "{{",
    ]


def test_a_surrogate_pair_is_one_character():
    assert parse_json(b'"\\ud83d\\ude00"') == "\N{GRINNING FACE}"


@given(st.binary(max_size=60))
def test_any_bytes_end_in_a_value_or_in_a_format_error(data):
    with contextlib.suppress(FormatError):  # anything else that is raised fails the test
        parse_json(data)


def test_bare_infinity_is_taken_only_where_it_is_allowed():
    limits = b'{"limit": [0.0, Infinity, -Infinity]}'
    assert parse_json(limits, allow_infinity=True) == {"limit": [0.0, float("inf"), float("-inf")]}
    for text, allowed in ((limits, False), (b"[NaN]", True), (b"[1e999]", True)):
        with pytest.raises(FormatError):
            parse_json(text, allow_infinity=allowed)
