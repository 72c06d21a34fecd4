"""Arguments are copied from the question or asked of the model; what does not match is named."""

import pytest

from xuravljepa.agent.arguments import AskModel, Constant, FromQuestion, Template, fill_arguments, matches
from xuravljepa.agent.errors import ArgumentError, ToolError

PRICE = {"shop": FromQuestion(r"cost at (\w+)"),
         "item": AskModel("what shape is the {colour} one?", r"the (?P<colour>\w+) one")}
SUM = {"expression": Template("{a} + {count}", a=FromQuestion(r"what is (\d+) plus", int),
                              count=AskModel("how many {shape}s are there?",
                                             r"number of (?P<shape>\w+?)s\b", int))}


def nobody(question):
    raise AssertionError(f"the model was asked {question!r}")


def test_a_price_question_asks_for_the_shape():
    asked = {"what shape is the red one?": "circle"}
    filled = fill_arguments(PRICE, "What does the red one cost at Zorba?", asked.__getitem__)
    assert filled == {"shop": "Zorba", "item": "circle"}


def test_a_sum_asks_for_the_count():
    asked = {"how many circles are there?": "3"}
    question = "what is 7 plus the number of circles?"
    assert fill_arguments(SUM, question, asked.__getitem__) == {"expression": "7 + 3"}


def test_a_named_group_serves_another_parameter():
    sources = {"colour": FromQuestion(r"the (?P<colour>\w+) one"),
               "item": AskModel("what is the {colour} one?")}
    filled = fill_arguments(sources, "the red one", str.upper)
    assert filled == {"colour": "red", "item": "WHAT IS THE RED ONE?"}


def test_a_constant_is_itself():
    assert fill_arguments({"k": Constant(3)}, "anything", nobody) == {"k": 3}


@pytest.mark.parametrize("question, parameter", [
    ("what does the red one cost?", "shop"), ("what does it cost at zorba?", "item"), ("", "shop"),
    ("x" * 3000, "question"),
])
def test_a_question_that_does_not_match_names_the_parameter_and_asks_nothing(question, parameter):
    with pytest.raises(ArgumentError) as caught:
        fill_arguments(PRICE, question, nobody)
    assert caught.value.parameter == parameter
    assert not matches(PRICE, question)


@pytest.mark.parametrize("answer", ["three", "", "3.5", "٣", None])
def test_an_answer_that_is_no_number_is_refused(answer):
    with pytest.raises(ArgumentError, match="count"):
        fill_arguments(SUM, "what is 7 plus the number of circles?", lambda question: answer)


def test_two_values_for_one_name_are_refused():
    sources = {"a": FromQuestion(r"first (?P<x>\w+)"), "b": FromQuestion(r"second (?P<x>\w+)")}
    with pytest.raises(ArgumentError, match="two values"):
        fill_arguments(sources, "first red second blue", nobody)


def test_numbers_are_converted():
    sources = {"n": FromQuestion(r"(-?[\d.]+)", float)}
    assert fill_arguments(sources, "about -2.5", nobody) == {"n": -2.5}


@pytest.mark.parametrize("build", [
    lambda: FromQuestion("no group"), lambda: FromQuestion("(two) (groups)"), lambda: FromQuestion("(open"),
    lambda: FromQuestion("(a)", list), lambda: AskModel("{0}"), lambda: AskModel("{a.b}"),
    lambda: AskModel("{open"), lambda: Template("{a}", b=Constant(1)), lambda: Template("{a}", a=1),
])
def test_a_wrong_declaration_is_refused_when_it_is_made(build):
    with pytest.raises(ToolError):
        build()


def test_a_missing_group_is_named():
    with pytest.raises(ArgumentError, match="colour"):
        fill_arguments({"item": AskModel("what is the {colour} one?")}, "what?", nobody)
