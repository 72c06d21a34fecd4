"""The predictor's states go from turn to turn, through files and replays; and the agent looks again where it doubts."""

import numpy as np
import pytest

from xuracore import io
from xuracore.errors import FormatError
from xuravljepa.agent.agent import Agent
from xuravljepa.agent.errors import ReplayError
from xuravljepa.agent.heads import AgentConfig, AgentHeads
from xuravljepa.agent.session import digest
from xuravljepa.model import VLJEPA
from xuravljepa.presets import VLJEPAConfig

ANSWERS = ("circle", "square", "triangle", "yes", "no", *map(str, range(9)))
TALK = ("how many circles?", "what shape is the red one?", "is there a red square?")


@pytest.fixture(scope="module")
def model():
    return VLJEPA(VLJEPAConfig.tiny().replace(answers=ANSWERS), rng=np.random.default_rng(0))


def agent_of(model, doubt=-6.0, **more):
    """An agent whose p(wrong) has always this logit."""
    heads = AgentHeads(AgentConfig.for_model(model.config), model.config.predictor, rng=np.random.default_rng(1))
    heads.monitor.output.bias.data[:] = doubt
    heads.monitor.trust.data[:] = 0
    return Agent(model, heads, **more)


def picture(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def nearest(reply):
    """All that a first reading saw: equal bits mean equal states."""
    return reply.trace.steps[0].candidates


def test_a_question_goes_on_from_the_states_of_the_one_before(model):
    agent = agent_of(model)
    first = agent.ask(picture(), TALK[0])
    second = agent.ask(None, TALK[1])
    query = [model.query_tokens([text]) for text in TALK]
    visual = agent.seen[:1]
    reading = model.predictor.read(query[0], model.predictor.look(query[0], visual))
    after = model.predictor.read(query[1], reading.states)
    cosines = np.sort(model.similarities(after.embedding)[0])[::-1]
    np.testing.assert_allclose([similarity for _, similarity in nearest(second)], cosines[:5], atol=2e-5)
    assert nearest(second) != nearest(agent.ask(picture(), TALK[1])) and first.trace.run.image == second.trace.run.image
    assert agent.looked


def test_it_looks_again_where_it_doubts_after_enough_turns_and_when_told(model):
    doubtful = agent_of(model, 4.0)
    afresh = nearest(doubtful.ask(picture(), TALK[1]))
    doubtful.ask(picture(), TALK[0])
    assert nearest(doubtful.ask(None, TALK[1])) == afresh and doubtful.looked
    agent = agent_of(model, turns=3)
    looked = []
    for turn in range(7):
        agent.ask(None if turn else picture(), TALK[turn % 3])
        looked.append(agent.looked)
    assert looked == [True, False, False, True, False, False, True]
    agent.turns = 0
    assert nearest(agent.ask(None, TALK[1])) == afresh
    agent.turns = 3
    agent.ask(picture(1), TALK[0])
    assert nearest(agent.ask(picture(), TALK[1])) == afresh  # another picture: nothing is carried over


def test_a_reset_by_the_gates_forgets_states_and_picture(model):
    agent = agent_of(model, auto_reset=1.1)  # every gate is below
    agent.ask(picture(), TALK[0])
    assert agent.seen is None and agent.states is None
    agent.auto_reset = None
    agent.ask(picture(), TALK[0])
    assert agent.seen is not None and agent.states is not None


def test_states_survive_a_restart_bit_by_bit(model, tmp_path):
    agent = agent_of(model)
    agent.ask(picture(), TALK[0])
    agent.save_state(tmp_path / "state")
    later = agent_of(model)
    later.load_state(tmp_path / "state")
    for question in TALK:
        one, other = agent.ask(None, question), later.ask(None, question)
        assert nearest(one) == nearest(other) and one.confidence == other.confidence and not later.looked
    agent.look(picture(1))
    agent.save_state(tmp_path / "fresh")  # nothing was asked: there are no states yet
    later.load_state(tmp_path / "fresh")
    later.ask(None, TALK[0])
    assert later.looked


def test_states_are_checked_and_those_of_another_predictor_left_out(model, tmp_path):
    agent, path = agent_of(model), tmp_path / "state"
    agent.ask(picture(), TALK[0])
    agent.save_state(path)
    tensors, about = io.load_safetensors(path), io.read_metadata(path)
    retrained = VLJEPA(model.config, rng=np.random.default_rng(0))
    retrained.predictor.read_tokens.data[:] += 1
    other = agent_of(retrained)
    other.load_state(path)
    other.ask(None, TALK[0])
    assert other.looked
    name = "states.1.h"
    missing = {key: value for key, value in tensors.items() if key != name}
    for damaged in ({**tensors, name: tensors[name][:, :1]}, {**tensors, name: tensors[name] * np.nan}, missing):
        io.save_safetensors(path, damaged, about | {"sha256": digest(damaged)})
        with pytest.raises(FormatError, match=name):
            agent.load_state(path)
    for more in ({"sha256": "0"}, {"turn": "-1"}, {"turn": "x"}):
        io.save_safetensors(path, tensors, about | more)
        with pytest.raises(FormatError):
            agent.load_state(path)
    assert not agent.ask(None, TALK[1]).unsure and not agent.looked  # what it had is still there


def test_a_replay_needs_the_states_it_went_on_from(model, tmp_path):
    agent = agent_of(model)
    first = agent.ask(picture(), TALK[0])
    agent.save_state(tmp_path / "between")
    second = agent.ask(None, TALK[1])
    with pytest.raises(ReplayError, match="save_state"):
        agent_of(model).replay(picture(), second.trace)
    later = agent_of(model)
    later.load_state(tmp_path / "between")
    assert nearest(later.replay(picture(), second.trace)) == nearest(second)
    assert nearest(later.replay(picture(), first.trace)) == nearest(first)
