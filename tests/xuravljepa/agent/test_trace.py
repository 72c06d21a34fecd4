"""A trace is read back exactly as it was written, and nothing damaged is read at all."""

import dataclasses
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xuracore.errors import FormatError
from xuravljepa.agent.errors import ArgumentError
from xuravljepa.agent.tools import ToolFailure, ToolResult
from xuravljepa.agent.trace import ACTIONS, REASONS, Run, Step, Trace, printable, read_traces

READ = Step(0, 0.0125, "read", "4", p_wrong_after=0.93, candidates=(("4", 0.31), ("7", 0.3)))
CALL = Step(1, 0.0375, "call", "7", p_wrong_before=0.93, p_wrong_after=0.04,
            candidates=(("7", 0.8), ("4", 0.2)), tool="lookup", arguments={"shop": "zorba", "item": "circle"},
            asked=(("what shape is the red one?", "circle"),),
            result=ToolResult("lookup", True, 7, "7", ms=0.3), ms=0.3, state_change=0.21)
END = Step(2, 0.04, "answer", "7", reason="confident", p_wrong_after=0.04)
TRACE = Trace(Run("r1", "what does the red one cost at zorba?", "tiny", seed=3, expected="7"),
              [READ, CALL, END])

FLOATS = st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
PROBABILITIES = st.none() | st.floats(0, 1)
VALUES = st.recursive(st.none() | st.booleans() | st.integers(-2**63 + 1, 2**63 - 1) | FLOATS | TEXTS,
                      lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
                      max_leaves=4)
RESULTS = st.builds(ToolResult, tool=TEXTS, ok=st.just(True), value=VALUES, text=TEXTS, ms=FLOATS,
                    truncated=st.booleans()) | st.builds(
    ToolResult, tool=TEXTS, ok=st.just(False), error=st.builds(ToolFailure, TEXTS, TEXTS), ms=FLOATS)
STEPS = st.builds(Step, step=st.just(0), time=FLOATS, action=st.just("call"), answer=TEXTS, note=TEXTS,
                  p_wrong_before=PROBABILITIES, p_wrong_after=PROBABILITIES,
                  candidates=st.lists(st.tuples(TEXTS, FLOATS), max_size=2).map(tuple), tool=TEXTS,
                  arguments=st.none() | st.dictionaries(TEXTS, VALUES, max_size=2),
                  asked=st.lists(st.tuples(TEXTS, TEXTS), max_size=2).map(tuple), result=RESULTS,
                  ms=st.none() | FLOATS, state_change=st.none() | FLOATS)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trace.jsonl"


@given(STEPS, st.builds(Run, run_id=TEXTS, question=TEXTS, seed=st.none() | st.integers(0, 2**32),
                        expected=st.none() | TEXTS))
def test_any_trace_is_read_back_exactly(tmp_path_factory, step, run):
    path = tmp_path_factory.mktemp("traces") / "t.jsonl"
    trace = Trace(run, [step, dataclasses.replace(END, step=1)])
    trace.write(path)
    assert Trace.read(path) == trace


def test_recorded_results_are_the_calls_that_were_made():
    unfilled = dataclasses.replace(CALL, step=2, arguments=None)
    [(request, result)] = Trace(TRACE.run, [READ, CALL, unfilled]).recorded_results()
    assert request.key() == 'lookup({"item":"circle","shop":"zorba"})' and result is CALL.result
    assert TRACE.final is TRACE.steps[2] and Trace(TRACE.run).final is None
    assert TRACE.readings() == [READ, CALL]


def test_steps_are_in_order():
    with pytest.raises(ArgumentError, match="expected number 1"):
        Trace(TRACE.run, [READ, END])


def lines():
    return [json.loads(line) for line in TRACE.lines()]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize("line, change, says", [
    (0, {"version": 2}, "version"), (0, {"extra": 1}, "unknown keys"), (0, {"seed": "3"}, "seed"),
    (0, {"kind": "step"}, "kind"), (0, {"kind": None}, "kind"), (1, {"kind": "other"}, "kind"),
    (1, {"step": 1}, "number 0"), (1, {"step": True}, "step"), (1, {"time": "0"}, "time"),
    (1, {"p_wrong_after": 1.5}, "probability"), (1, {"action": "think"}, "action"),
    (1, {"answer": 4}, "answer"),
    (1, {"candidates": [["4"]]}, "candidates"), (1, {"candidates": [["4", "0.3"]]}, "candidates"),
    (2, {"result": None}, "result"), (2, {"tool": None}, "tool"), (2, {"arguments": ["zorba"]}, "arguments"),
    (2, {"digest": "0" * 64}, "digest"), (2, {"digest": None}, "digest"), (2, {"asked": [["q"]]}, "asked"),
    (2, {"result": {"tool": "lookup"}}, "result"), (3, {"reason": "tired"}, "reason"),
    (3, {"result": {}}, "result"),
])
def test_a_damaged_record_is_refused_with_its_line(path, line, change, says):
    records = lines()
    records[line] |= change
    write(path, records)
    with pytest.raises(FormatError, match=f"line {line + 1}.*{says}"):
        Trace.read(path)


def test_a_changed_result_is_noticed(path):
    records = lines()
    records[2]["result"]["value"] = 8
    write(path, records)
    with pytest.raises(FormatError, match="digest"):
        Trace.read(path)


@pytest.mark.parametrize("content, says", [
    (b"", "0 runs"), (b"{", "not JSON"), (b"[]\n", "not an object"), (b"\xff\n", "UTF-8"),
    (b"[" * 10_000, "not JSON"),
    (b'{"kind": "run", "seed": NaN}\n', "NaN"), (b'"' + b"x" * 2**23 + b'"\n', "longer"),
    (b'{"kind": "run", "seed": ' + b"9" * 10_000 + b"}\n", "not JSON"),
])
def test_a_file_that_is_no_trace_is_refused(path, content, says):
    path.write_bytes(content)
    with pytest.raises(FormatError, match=says):
        Trace.read(path)


def test_a_missing_file_is_named(path):
    with pytest.raises(FormatError, match="trace.jsonl.*cannot be read"):
        list(read_traces(path))


def test_a_run_that_was_cut_off_keeps_its_steps(path):
    write(path, lines()[:3])
    assert Trace.read(path).steps == [READ, CALL] and Trace.read(path).final is None


def test_the_text_tells_the_story():
    text = TRACE.render()
    story = ["what does the red one cost at zorba?", "0.93", "“4”", 'lookup(shop="zorba", item="circle") → 7',
             "what shape is the red one? → “circle”", "21.0 %", "read again: “7”", "answer: “7”", "confident"]
    places = [text.index(part) for part in story]
    assert places == sorted(places)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b[" in TRACE.render(colour=True)


def test_columns_line_up():
    rows = TRACE.render().splitlines()
    column = rows[3].index("what happened")
    assert [row[column:].split()[0] for row in rows if row[:5].strip().isdigit()] == [
        "read", 'lookup(shop="zorba",', "answer:"]
    assert all(row[column - 1] == " " for row in rows[4:])


class Terminal(io.StringIO):
    encoding = "ascii"

    def isatty(self):
        return True


@pytest.mark.parametrize("environment, file, colour", [
    ({}, Terminal, True), ({"NO_COLOR": "1"}, Terminal, False), ({"NO_COLOR": ""}, Terminal, True),
    ({"TERM": "dumb"}, Terminal, False), ({}, io.StringIO, False),
])
def test_colour_is_for_terminals_that_want_it(monkeypatch, environment, file, colour):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    out = file()
    TRACE.show(out)
    assert ("\x1b[" in out.getvalue()) is colour
    assert out.getvalue().isascii() is (file is Terminal)


@given(st.text(max_size=30))
def test_nothing_in_a_text_can_steer_a_terminal(text):
    assert printable(text).isprintable() and len(printable(text)) == len(text)
    step = dataclasses.replace(CALL, answer=text, asked=((text, text),), candidates=((text, 0.5),),
                               arguments={text: text}, result=ToolResult("t", True, text, text))
    shown = Trace(Run(text, text, text), [READ, step]).render()
    assert shown.replace("\n", "").isprintable()


@pytest.mark.parametrize("action, reason",
                         [("read", ""), ("call", ""), *(("answer", reason) for reason in REASONS)])
def test_every_step_can_be_shown(action, reason):
    assert action in ACTIONS
    bare = Step(0, 0.0, action, "", reason=reason, tool="t" if action == "call" else None)
    assert Trace(Run("", ""), [bare]).render()
