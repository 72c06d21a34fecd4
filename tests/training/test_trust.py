"""The shipped agent with tools that help and lie, with its memory, and in a long talk: a few questions of each."""

import pytest

from training import trust
from xuravljepa.agent.agent import Agent
from xuravljepa.agent.tools import ToolRequest


@pytest.fixture(scope="module")
def agent():
    agent = Agent.from_pretrained("tiny")
    yield agent
    agent.tools.close()


def test_a_liar_is_found_out_by_control_questions_and_no_longer_asked(agent):
    before = agent.tools.get("lookup")
    found = trust.liar_report(agent, scenes=6, controls=40)
    assert found["audit of the honest tool"]["errs"] < 0.2 < 0.8 < found["audit of the liar"]["errs"]
    assert found["liar"]["unseen keys"]["call_rate"] > 0.5  # what it cannot check it believes
    after = found["liar after an audit"]
    assert after["unseen keys"]["call_rate"] == 0 and after["unseen keys"]["unsure"] > 0.5
    assert after["known keys"]["harm_rate"] == 0
    again = agent.tools.get("lookup")
    assert (again.function, again.usefulness, again.schema) == (before.function, before.usefulness, before.schema)


def test_it_remembers_what_was_seen(agent):
    found = trust.memory_report(agent, scenes=4)["taught wording"]["all"]
    assert found["right_tool"] >= 0.9 and found["accuracy_always"] >= 0.75 and found["harm_rate"] == 0
    assert agent.tools.get("memory_search").description == agent.heads.config.cards["memory_search"]


def test_a_talk_about_one_picture_stays_right(agent):
    kept = agent.turns, agent.recursion
    found = trust.session_report(agent, scenes=3, turns=8)
    assert found["up to"] == [1, 2, 4, 8] and found["questions"] == [3, 3, 6, 12]
    assert min(found["agent"] + found["carried"]) > 0.6 and found["looked"][0] == 1 > found["looked"][3]
    assert (agent.turns, agent.recursion) == kept


def test_a_liar_says_something_plausible(agent):
    honest = agent.tools.get("lookup").function
    lie = trust.lying(honest)
    for shape in ("circle", "square", "triangle"):
        assert lie("bamor", shape) != honest("bamor", shape) and 0 <= lie("bamor", shape) <= 30
        assert lie("bamor", shape) == lie("bamor", shape)
    result = agent.tools.run(ToolRequest("lookup", {"shop": "bamor", "item": "circle"}))
    assert result.value == honest("bamor", "circle")
