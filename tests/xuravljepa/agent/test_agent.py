"""Whatever a picture, a question, a tool or a file does, the agent answers or says plainly why not."""

import io as streams
import json
import struct
import time

import numpy as np
import pytest
from PIL import Image

from xuracore import io, is_grad_enabled
from xuracore.errors import ConfigError, DTypeError, FormatError, ShapeError, XuraError
from xuracore.nn.module import StateDictError
from xuravljepa.agent import agent as agents
from xuravljepa.agent.agent import Agent
from xuravljepa.agent.arguments import AskModel, Constant, FromQuestion
from xuravljepa.agent.builtin import KnowledgeBase
from xuravljepa.agent.errors import ReplayError, ToolError
from xuravljepa.agent.heads import AgentConfig, AgentHeads
from xuravljepa.agent.recursion import RecursionConfig
from xuravljepa.agent.budget import Budget
from xuravljepa.agent.sandbox import Limits
from xuravljepa.agent.scene_tools import register_scene_tools
from xuravljepa.agent.selective import SelectiveConfig, SelectiveDecoder
from xuravljepa.agent.tools import ToolRegistry, Usefulness
from xuravljepa.agent.trace import Trace
from xuravljepa.model import VLJEPA
from xuravljepa.presets import VLJEPAConfig

ANSWERS = ("circle", "square", "triangle", "yes", "no", *map(str, range(31)))
PRICE = "what does the red one cost at zorba?"
SURE = Usefulness(fixes=1.0, breaks=0.0, cost=0.0)


@pytest.fixture(scope="module")
def model():
    """Random weights: nothing here depends on an answer being right."""
    return VLJEPA(VLJEPAConfig.tiny().replace(answers=ANSWERS), rng=np.random.default_rng(0))


def heads_of(model, doubt):
    """Heads whose monitor always says p(wrong) = σ(doubt)."""
    config = AgentConfig.for_model(model.config)
    heads = AgentHeads(config, model.config.predictor, rng=np.random.default_rng(1))
    heads.monitor.output.weight.data[:] = 0
    heads.monitor.trust.data[:] = 0
    heads.monitor.output.bias.data[:] = doubt
    for write in getattr(heads.injector, "writes", ()):
        write.gain.data[:] = 0.3
    return heads


@pytest.fixture
def agent(model):
    """An agent that always doubts and has no tool yet."""
    with ToolRegistry() as tools:
        yield Agent(model, heads_of(model, 4.0), tools)


def picture(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def png(seed=0, size=(64, 64)):
    buffer = streams.BytesIO()
    Image.fromarray(picture(seed)).resize(size).save(buffer, "PNG")
    return buffer.getvalue()


def lookup_tool(agent, function, **settings):
    arguments = {"shop": FromQuestion(r"\bat (\w+)")}
    agent.register_tool(function, arguments=arguments, usefulness=SURE, **settings)


# ---------------------------------------------------------------------- pictures and questions
def test_a_picture_may_be_a_file_an_array_or_a_pil_image(agent, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    sources = str(tmp_path / "a.png"), tmp_path / "a.png", picture(), Image.fromarray(picture())
    replies = [agent.ask(source, "what shape is the red one?") for source in sources]
    assert len({(reply.answer, reply.confidence) for reply in replies}) == 1
    assert len({reply.trace.run.image for reply in replies}) == 1


def bombs():
    """(name, bytes): files that claim to be pictures."""
    whole = png()
    side = 2**31 - 1
    header = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    yield "empty", b""
    yield "text", b"this is not a picture"
    yield "truncated", whole[: len(whole) // 2]
    yield "header only", whole[:33]
    yield "four billion pixels", header + b"\0\0\0\0"
    yield "eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"
    yield "noise", bytes(np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8))


@pytest.mark.parametrize("name, data", list(bombs()))
def test_a_hostile_picture_is_refused_by_name_and_the_last_one_stays(agent, tmp_path, name, data):
    first = agent.ask(picture(), "how many circles are there?")
    path = tmp_path / "hostile.png"
    path.write_bytes(data)
    with pytest.raises(FormatError, match="hostile.png"):
        agent.ask(path, "how many circles are there?")
    again = agent.ask(None, "how many circles are there?")
    assert (again.answer, again.confidence) == (first.answer, first.confidence)


def test_what_is_no_picture_is_refused(agent, tmp_path):
    with pytest.raises(FormatError, match="no such file"):
        agent.ask(tmp_path / "missing.png", "any?")
    with pytest.raises(FormatError, match="directory"):
        agent.ask(tmp_path, "any?")
    for wrong in (np.zeros((64, 64, 7), np.uint8), np.zeros((0, 64, 3), np.uint8), np.zeros(5, np.uint8)):
        with pytest.raises(XuraError):
            agent.ask(wrong, "any?")
    with pytest.raises(DTypeError):
        agent.ask(np.full((8, 8, 3), np.nan), "any?")
    with pytest.raises(DTypeError):
        agent.ask(7, "any?")
    with pytest.raises(ShapeError, match="no picture yet"):
        agent.ask(None, "any?")


@pytest.mark.parametrize("question, error", [
    ("", ShapeError), ("  \n", ShapeError), ("x " * 65, ShapeError), ("ü " * 65, ShapeError),
    (None, DTypeError), (b"red?", DTypeError)])
def test_a_wrong_question_is_refused_and_changes_nothing(agent, question, error):
    before = agent.ask(picture(0), "how many?")
    with pytest.raises(error):
        agent.ask(picture(1), question)
    assert agent.ask(None, "how many?").answer == before.answer
    assert agent.ask(None, "how many?").trace.run.image == before.trace.run.image


def test_the_longest_question_is_answered(agent):
    assert agent.ask(picture(), "x" * 64).answer in ANSWERS


def test_questions_without_a_picture_are_about_the_last_one(agent):
    first, second = agent.ask(picture(0), "how many?"), agent.ask(picture(1), "how many?")
    assert first.trace.run.image != second.trace.run.image
    assert agent.ask(None, "how many?").trace.run.image == second.trace.run.image
    assert [agent.ask(None, "how many?").confidence, agent.ask(picture(1), "how many?").confidence] == [
        second.confidence] * 2


def test_asking_leaves_the_gradient_mode_alone(agent):
    agent.ask(picture(), "how many?")
    assert is_grad_enabled()


# ---------------------------------------------------------------------- doubt
def test_without_trained_heads_the_agent_answers_and_never_doubts(model):
    reply = Agent(model).ask(picture(), PRICE)
    assert (reply.confidence, reply.unsure, reply.reason, reply.tool_calls) == (1.0, False, "confident", [])
    assert str(reply) == reply.text == reply.answer


def test_an_unsure_answer_says_that_it_is_a_guess(agent):
    reply = agent.ask(picture(), "what is this?")
    assert reply.unsure and reply.reason == "no_tool"
    assert reply.text.startswith("I am not sure") and reply.answer in reply.text
    assert reply.confidence == pytest.approx(1 - 1 / (1 + np.exp(-4.0)), abs=1e-6)


def test_a_sure_answer_calls_nothing(model):
    with ToolRegistry() as tools:
        agent = Agent(model, heads_of(model, -6.0), tools)
        lookup_tool(agent, price_of, isolation="inline")
        assert agent.ask(picture(), PRICE).tool_calls == []


# ---------------------------------------------------------------------- tools
def price_of(shop: str) -> int:
    """Tell what things cost.

    Args:
        shop: the name of the shop
    """
    return len(shop)


def test_a_tool_is_called_and_what_it_says_is_taken_in(agent):
    lookup_tool(agent, price_of, isolation="inline")
    reply = agent.ask(picture(), PRICE)
    assert reply.tool_calls == [
        {"tool": "price_of", "arguments": {"shop": "zorba"}, "result": "5", "ok": True, "error": None}]
    read, call, end = reply.trace.steps
    assert call.state_change > 0
    assert call.candidates != read.candidates  # the second reading saw another state
    assert end.reason == reply.reason == "repeated_call"


def test_a_bidirectional_predictor_hears_what_a_tool_says(model, tmp_path):
    small = model.config.predictor.replace(bidirectional=True, n_layers=1, pool="mean")
    both_ways = VLJEPA(model.config.replace(predictor=small), rng=np.random.default_rng(0))
    with ToolRegistry() as tools:
        agent = Agent(both_ways, heads_of(both_ways, 4.0), tools)
        lookup_tool(agent, price_of, isolation="inline")
        read, call, _ = agent.ask(picture(), PRICE).trace.steps
        assert call.result.text == "5" and call.state_change > 0 and call.candidates != read.candidates
        assert [number for number, _, _ in agent.stream([picture(), picture()])] == [0]
        answer = agent.ask(picture(), PRICE).answer
        agent.save_state(tmp_path / "state.safetensors")
        agent.reset()
        agent.load_state(tmp_path / "state.safetensors")
        assert agent.ask(None, PRICE).answer == answer
    with pytest.raises(ConfigError, match="no states to write into"):
        AgentHeads(AgentConfig(), small)


def test_the_scene_tools_ask_the_model_for_what_the_question_does_not_say(agent):
    shops = {"zorba": {answer: 9 for answer in ANSWERS}}
    register_scene_tools(agent.tools, KnowledgeBase(shops), usefulness=SURE)
    call = agent.ask(picture(), PRICE).trace.calls()[0]
    assert call.tool == "lookup" and call.arguments["shop"] == "zorba"
    assert call.asked == (("what shape is the red one?", call.arguments["item"]),)
    assert call.result.text == "9"


def raising(shop: str) -> int:
    """Tell what things cost.

    Args:
        shop: the name of the shop
    """
    raise RuntimeError(f"{shop} is closed")


def hanging(shop: str) -> int:
    """Tell what things cost.

    Args:
        shop: the name of the shop
    """
    while True:
        time.sleep(1)


def gigabyte(shop: str) -> str:
    """Tell what things cost.

    Args:
        shop: the name of the shop
    """
    return "x" * 10**9


def endless(shop: str) -> str:
    """Tell what things cost.

    Args:
        shop: the name of the shop
    """
    return "a very long story " * 20


def no_number(shop: str) -> float:
    """Tell what things cost.

    Args:
        shop: the name of the shop
    """
    return float("nan")


def dying(shop: str) -> int:
    """Tell what things cost.

    Args:
        shop: the name of the shop
    """
    import os

    os.abort()


@pytest.mark.parametrize("function, error", [
    (raising, "zorba is closed"), (hanging, "stopped after 0.5 s"), (gigabyte, "bytes of memory"),
    (no_number, "finite"), (dying, "SIGABRT")])
def test_a_tool_that_fails_is_recorded_and_the_agent_still_answers(agent, tmp_path, function, error):
    lookup_tool(agent, function, limits=Limits(seconds=0.5 if function is hanging else 5.0))
    reply = agent.ask(picture(), PRICE)
    assert reply.answer in ANSWERS and reply.unsure
    (call,) = reply.tool_calls
    assert not call["ok"] and call["result"] == ""
    assert error in call["error"]
    assert reply.trace.final.reason == "tool_error"
    reply.trace.write(tmp_path / "run.jsonl")
    assert Trace.read(tmp_path / "run.jsonl") == reply.trace


def test_a_text_too_long_to_take_in_is_recorded(agent):
    lookup_tool(agent, endless, isolation="inline")
    reply = agent.ask(picture(), PRICE)
    call = reply.trace.calls()[0]
    assert call.result.ok and "limit" in call.note
    assert call.p_wrong_after is None and reply.answer in ANSWERS
    assert reply.answer == reply.trace.steps[0].answer


def test_arguments_that_cannot_be_produced_are_recorded(agent):
    agent.register_tool(price_of, usefulness=SURE, isolation="inline",
                        arguments={"shop": AskModel("which shop?", r"(?P<colour>\w+) one")}, name="asks")
    agent.tools.register(price_of, usefulness=SURE, isolation="inline",
                         arguments={"shop": AskModel("how many?", r"\bat (\w+)", float)}, name="converts")
    reply = agent.ask(picture(), "what does the red one cost?")
    assert [call["tool"] for call in reply.tool_calls][0] == "asks"
    assert reply.answer in ANSWERS


def test_the_time_of_a_question_is_not_spent_on_compiling(agent, monkeypatch):
    """The first reading of a process may take seconds; the budget starts after it."""
    slow, read = [], agents._Reader.read

    def first_is_slow(self, state):
        if not slow:
            slow.append(time.sleep(0.3))
        return read(self, state)

    monkeypatch.setattr(agents._Reader, "read", first_is_slow)
    agent.recursion = RecursionConfig(budget=Budget(seconds=0.25))
    lookup_tool(agent, price_of, isolation="inline")
    assert agent.ask(picture(), PRICE).tool_calls


def test_registering_is_strict_and_inherits_the_expected_gain(agent):
    tool = agent.register_tool(price_of, arguments={"shop": Constant("zorba")})
    config = agent.heads.config
    assert tool.usefulness == Usefulness(config.fixes, config.breaks, config.cost, config.errs)
    with pytest.raises(ToolError, match="already"):
        agent.register_tool(price_of)
    with pytest.raises(ToolError):
        agent.register_tool(lambda shop: shop, name="undescribed")


# ---------------------------------------------------------------------- replay
def test_a_replay_gives_the_same_bits_without_calling_the_tool(agent, tmp_path):
    calls = []

    def told(shop: str) -> int:
        """Tell what things cost.

        Args:
            shop: the name of the shop
        """
        calls.append(shop)
        return 7

    lookup_tool(agent, told, isolation="inline")
    first = agent.ask(picture(), PRICE, expected="7")
    first.trace.write(tmp_path / "run.jsonl")
    again = agent.replay(picture(), Trace.read(tmp_path / "run.jsonl"))
    assert calls == ["zorba"]
    assert (again.answer, again.confidence, again.reason, again.tool_calls) == (
        first.answer, first.confidence, first.reason, first.tool_calls)
    for one, other in zip(again.trace.steps, first.trace.steps, strict=True):
        assert (one.p_wrong_after, one.candidates, one.state_change) == (
            other.p_wrong_after, other.candidates, other.state_change)


def test_a_replay_refuses_another_picture_and_another_agent(agent, model):
    trace = agent.ask(picture(), PRICE).trace
    with pytest.raises(ReplayError, match="picture"):
        agent.replay(picture(1), trace)
    with pytest.raises(ReplayError, match="configuration"):
        Agent(model, heads_of(model, 4.0), recursion=RecursionConfig(0.0, 0.9)).replay(picture(), trace)


# ---------------------------------------------------------------------- streams
def test_a_stream_speaks_first_and_where_something_changes(agent):
    frames = [picture(0)] * 6 + [picture(5) // 8] * 6
    decoder = SelectiveDecoder(SelectiveConfig(drift=1e-6, surprise=1e-6))
    spoken = list(agent.stream(frames, "how many?", decoder))
    assert [number for number, _, _ in spoken] == [0, 6]
    assert all(answer in ANSWERS and 0 <= confidence <= 1 for _, answer, confidence in spoken)
    assert agent.ask(None, "how many?").trace.run.image == agent.ask(frames[-1], "how many?").trace.run.image


def test_a_stream_leaves_the_gradient_mode_alone(agent):
    stream = agent.stream([picture(), picture()])
    next(stream)
    assert is_grad_enabled()
    stream.close()
    assert is_grad_enabled()


def test_a_bad_frame_is_an_error_at_that_frame(agent):
    stream = agent.stream([picture(), np.zeros((3, 3), np.int32)])
    assert next(stream)[0] == 0
    with pytest.raises(DTypeError):
        next(stream)
    with pytest.raises(ShapeError):
        next(agent.stream([picture()], ""))


# ---------------------------------------------------------------------- files
def test_an_agent_comes_back_from_its_folder(agent, tmp_path):
    agent.save_pretrained(tmp_path / "agent")
    again = Agent.from_pretrained(tmp_path / "agent")
    assert again.heads.config == agent.heads.config and again.trained
    first, second = agent.ask(picture(), PRICE), again.ask(picture(), PRICE)
    assert (second.answer, second.confidence) == (first.answer, first.confidence)


def test_the_price_list_goes_with_the_agent(agent, tmp_path):
    agent.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "prices.json").write_text(json.dumps({"zorba": {"circle": 3}}))
    Agent.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert Agent.from_pretrained(tmp_path / "b").tools.names() == ["lookup", "calculator"]


def test_an_agent_without_trained_heads_stays_without(model, tmp_path):
    Agent(model).save_pretrained(tmp_path)
    assert not Agent.from_pretrained(tmp_path).trained


def test_damaged_folders_are_refused(agent, tmp_path):
    agent.save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="no such folder"):
        Agent.from_pretrained(tmp_path / "nothing")
    whole = (tmp_path / "agent.safetensors").read_bytes()
    (tmp_path / "agent.safetensors").write_bytes(whole[:-5])
    with pytest.raises(FormatError, match="agent.safetensors"):
        Agent.from_pretrained(tmp_path)
    io.save_safetensors(tmp_path / "agent.safetensors", {"other": np.zeros(3, np.float32)})
    with pytest.raises(StateDictError, match="other"):
        Agent.from_pretrained(tmp_path)
    (tmp_path / "agent.safetensors").write_bytes(whole)
    (tmp_path / "agent.json").write_text('{"monitr": {}}')
    with pytest.raises(ConfigError, match="monitor"):
        Agent.from_pretrained(tmp_path)
    (tmp_path / "agent.json").write_text("[" * 100_000)
    with pytest.raises(FormatError, match="agent.json"):
        Agent.from_pretrained(tmp_path)


def test_heads_of_another_model_are_refused_when_they_are_loaded(agent, tmp_path):
    agent.save_pretrained(tmp_path)
    settings = io.load_json(tmp_path / "agent.json")
    settings["monitor"]["read_dim"] += 1
    io.save_json(tmp_path / "agent.json", settings)
    with pytest.raises(FormatError, match="monitor.read_dim is 97; the model beside it has 96"):
        Agent.from_pretrained(tmp_path)


def test_what_was_seen_survives_a_restart(agent, model, tmp_path):
    first = agent.ask(picture(), PRICE)
    agent.save_state(tmp_path / "state")
    later = Agent(model, heads_of(model, 4.0))
    later.load_state(tmp_path / "state")
    second = later.ask(None, PRICE)
    assert (second.answer, second.confidence, second.trace.run.image) == (
        first.answer, first.confidence, first.trace.run.image)


def test_there_is_no_state_before_a_picture(agent, tmp_path):
    with pytest.raises(ShapeError, match="seen nothing"):
        agent.save_state(tmp_path / "state")


def test_a_state_of_another_model_is_refused(agent, tmp_path):
    agent.ask(picture(), "how many?")
    agent.save_state(tmp_path / "state")
    other = Agent(VLJEPA(agent.model.config, rng=np.random.default_rng(9)))
    with pytest.raises(FormatError, match="another model"):
        other.load_state(tmp_path / "state")


def test_a_damaged_state_is_refused_and_the_picture_stays(agent, tmp_path):
    agent.ask(picture(), "how many?")
    path = tmp_path / "state"
    agent.save_state(path)
    whole, about = path.read_bytes(), io.read_metadata(path)
    visual = io.load_safetensors(path)["visual"]
    with pytest.raises(FormatError, match="cannot be read"):
        agent.load_state(tmp_path / "missing")
    for damaged in (b"", whole[:100], whole[:-1], whole + b"\0", b"\xff" * 64):
        path.write_bytes(damaged)
        with pytest.raises(FormatError):
            agent.load_state(path)
    foreign = [({"visual": visual}, {"version": "1"}), ({"visual": visual}, {"x_encoder": "0" * 64})]
    wrong = visual[:, :3], visual.astype(np.float64), visual * np.nan
    for tensors, more in [({"other": visual}, {}), *foreign, *(({"visual": array}, {}) for array in wrong)]:
        io.save_safetensors(path, tensors, about | more)
        with pytest.raises(FormatError, match="state"):
            agent.load_state(path)
    assert agent.ask(None, "how many?").trace.run.image == about["picture"]


def test_a_question_in_words_nobody_taught_is_doubted_until_a_tool_answers():
    agent = Agent.from_pretrained("tiny")
    if not agent.heads.config.words:
        pytest.skip("these heads do not know what was taught")

    def heft(shape: str) -> int:
        """Tell what an object weighs.

        Args:
            shape: circle, square or triangle
        """
        return 400 + len(shape)

    reply = agent.ask(picture(), "is the blorf one frumious?")
    assert reply.unsure and "blorf" in reply.trace.steps[0].note
    agent.register_tool(heft, isolation="inline", arguments={
        "shape": AskModel("what shape is the {colour} one?", r"is the (?P<colour>\w+) one frumious")})
    reply = agent.ask(picture(), "is the red one frumious?")
    assert reply.tool_calls and reply.answer == reply.tool_calls[0]["result"]
    assert agent.replay(picture(), reply.trace).answer == reply.answer
