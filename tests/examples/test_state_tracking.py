"""The strings mean what they say, and the example trains, tests, tabulates and draws."""

import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from examples.state_tracking import DIGIT_0, EQUALS, MIXERS, MODULUS, TASKS, Tracker, arithmetic, main, parity


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def read(tokens):
    """An expression as text, without its '='."""
    return "".join("+-*"[token - 1] if token < EQUALS else str(token - DIGIT_0) for token in tokens[:-1])


def value(text):
    """The expression's value, by splitting at signs and then at products."""
    terms = re.findall(r"([+-]?)(\d(?:\*\d)*)", text)
    assert "".join(sign + product for sign, product in terms) == text
    return sum((-1 if sign == "-" else 1) * int(np.prod([int(d) for d in product.split("*")])) for sign, product in terms)


def test_arithmetic_says_the_value_of_what_can_be_read(rng):
    tokens, lengths, answers = arithmetic(rng, 200, 2, 21)
    assert lengths.min() >= 2 and lengths.max() <= 21 and not (lengths % 2).any()
    for row, length, answer in zip(tokens, lengths, answers):
        assert row[length - 1] == EQUALS and not row[length:].any()
        assert value(read(row[:length])) % MODULUS == answer


def test_parity_counts_the_ones(rng):
    tokens, lengths, answers = parity(rng, 200, 3, 12)
    assert lengths.min() == 3 and lengths.max() == 12
    for row, length, answer in zip(tokens, lengths, answers):
        assert not row[length:].any() and row[:length].min() >= 1
        assert (row[:length] == 2).sum() % 2 == answer


def test_answers_are_spread_over_all_classes(rng):
    assert set(np.unique(parity(rng, 200, 3, 8)[2])) == {0, 1}
    assert set(np.unique(arithmetic(rng, 400, 2, 8)[2])) == set(range(MODULUS))


@pytest.mark.parametrize("name", MIXERS)
def test_the_answer_does_not_see_the_padding(name, rng):
    model = Tracker(TASKS["parity"], MIXERS[name], rng=rng)
    tokens, lengths, _ = parity(rng, 4, 3, 9)
    longer = np.concatenate([tokens, np.full((4, 5), 2)], axis=1)
    np.testing.assert_allclose(
        model(tokens, lengths).numpy(), model(longer, lengths).numpy(), rtol=1e-4, atol=1e-5
    )


def test_it_writes_a_table_a_plot_and_the_numbers(tmp_path, capsys):
    folder = tmp_path / "out"
    asked = ["--task", "parity", "--model", "mamba3", "mamba2", "--steps", "3", "--batch-size", "4"]
    assert main([*asked, "--max-length", "8", "--jobs", "1", "--output", str(folder)]) == 0
    numbers = json.loads((folder / "results.json").read_text())["results"]
    assert [result["model"] for result in numbers] == ["mamba3", "mamba2"]
    assert all(0 <= a <= 1 for result in numbers for a in result["by_length"].values())
    assert (folder / "table.md").read_text().count("\n| ") == 3
    ElementTree.parse(folder / "parity.svg")
    assert "| mamba3 |" in capsys.readouterr().out


def test_bad_options_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--max-length", "3"])
    assert "at least 8" in capsys.readouterr().err
