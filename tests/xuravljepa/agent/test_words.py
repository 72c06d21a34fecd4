"""A request for a text is told from a question, written by the Y-Decoder, and doubted as the decoder doubts it."""

import numpy as np
import pytest

from training.data.captions import TEMPLATES
from training.data.dataset import Dataset
from xuravljepa.agent.agent import Agent
from xuravljepa.agent.arguments import FromQuestion
from xuravljepa.agent.confusion import FOREIGN, UNCHARTED
from xuravljepa.agent.heads import AgentConfig, AgentHeads
from xuravljepa.agent.recursion import Reading
from xuravljepa.agent.tools import Usefulness
from xuravljepa.agent.words import Writer, asks_for_text
from xuravljepa.model import VLJEPA
from xuravljepa.presets import VLJEPAConfig

ANSWERS = ("circle", "square", "yes", "no", *map(str, range(9)))
PICTURE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


@pytest.fixture
def agent(monkeypatch):
    """Random weights, a decoder whose looks add something, and which always says the same."""
    rng = np.random.default_rng(0)
    model = VLJEPA(VLJEPAConfig.tiny().looking().replace(answers=ANSWERS), rng=rng)
    for look in model.y_decoder.looks:
        look.attention.out_proj.weight.data[:] = 0.1 * rng.standard_normal((64, 64))
    monkeypatch.setattr(model.y_decoder, "write", lambda given, sight: ["red and blue"] * len(given))
    return Agent(model, AgentHeads(AgentConfig.for_model(model.config), model.config.predictor, rng=rng))


def test_a_request_is_answered_in_words_without_tools(agent):
    def price(shop: str) -> int:
        """Tell a price.

        Args:
            shop: its name
        """
        return 7

    agent.register_tool(price, arguments={"shop": FromQuestion(r"\bat (\w+)")}, usefulness=Usefulness(1.0, 0.0, 0.0))
    reply = agent.ask(PICTURE, "describe the picture at zorba")
    assert reply.answer == "red and blue" and reply.text == "I am not sure. My best guess is: red and blue"
    assert reply.unsure and reply.confidence < 1e-6 and not reply.tool_calls  # untrained: no text is likely
    assert agent.looked and agent.ask(None, "what shape is it?").answer in ANSWERS
    again = agent.ask(None, "list the colours")
    assert agent.replay(PICTURE, again.trace).answer == again.answer
    agent.tools.close()


def test_the_doubt_is_the_decoders_over_all_views(agent, monkeypatch):
    agent.look(PICTURE)
    model, monitor, query = agent.model, agent.heads.monitor, agent.model.query_tokens(["describe the picture"])
    asked = []

    def log_probability(embedding, texts, sight):
        given = model.predictor(query, agent.seen[len(asked)][None]).embedding.data[0]
        np.testing.assert_allclose(embedding, given, atol=1e-5)
        own = model.predictor.sight(agent.seen[len(asked)][None])
        np.testing.assert_allclose(sight.tokens.data, own.tokens.data, atol=1e-4)
        asked.append(texts)
        return np.log([0.9, 0.6, 0.6])[len(asked) - 1 : len(asked)]

    monkeypatch.setattr(model.y_decoder, "log_probability", log_probability)
    writer = Writer(model, monitor, query, agent.seen)
    reading = writer.read(None)
    assert asked == [["red and blue"]] * 3 and reading.answer == "red and blue"
    assert writer.p_wrong(reading, 0) == pytest.approx(0.3)
    foreign = Writer(model, monitor, query, agent.seen, ("furry",))
    assert foreign.p_wrong(reading, 0) == pytest.approx(FOREIGN + (1 - FOREIGN) * 0.3) and "furry" in foreign.note
    monitor.strangest_known[...] = -100.0
    assert Writer(model, monitor, query, agent.seen).p_wrong(reading, 0) == pytest.approx(UNCHARTED + 0.1 * 0.3)


def test_a_text_that_does_not_end_is_a_guess(agent, monkeypatch):
    monkeypatch.setattr(agent.model.y_decoder, "write", lambda given, sight: ["a" * 159])
    assert agent.ask(PICTURE, "describe the picture").confidence == 0


@pytest.mark.parametrize("templates", ["plain", "wide", "paraphrase"])
def test_requests_are_told_from_questions_by_their_words(templates):
    asked = Dataset.captions("val", 60, types=tuple(TEMPLATES), templates=templates).rows
    assert [row.query for row in asked if not asks_for_text(row.query)] == []
    closed = [*Dataset.scenes("val", 60, templates=templates).rows, *Dataset.tools("val", 60, templates=templates).rows]
    assert [row.query for row in closed if asks_for_text(row.query)] == []


def test_other_wordings():
    for question in ("what shape do you see left of the red one?", "describe the shape of the red one", "what is it?",
                     "how many shapes are there?", "is a circle to be seen in the picture?", "", "a" * 10**5):
        assert not asks_for_text(question)
    for request in ("Describe the picture.", "what do you see", "caption this", "please list all objects",
                    "what's in this photo?"):
        assert asks_for_text(request)
