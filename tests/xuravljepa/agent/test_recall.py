"""What a stream showed can be asked afterwards: with its times, after a restart, with the answer of then."""

import os
import warnings

import numpy as np
import pytest
from PIL import Image

from training.data.memory_data import memory_rows
from xuracore import io
from xuracore.errors import ConfigError, FormatError, ShapeError
from xuravljepa.agent import memory as memories
from xuravljepa.agent.agent import Agent
from xuravljepa.agent.arguments import InThePresent, in_the_present, speaks_of_earlier
from xuravljepa.agent.errors import MemoryBusyError
from xuravljepa.agent.heads import AgentConfig, AgentHeads
from xuravljepa.agent.memory import MemoryConfig
from xuravljepa.agent import recall
from xuravljepa.agent.recall import Recollection, frames_in, picture_of
from xuravljepa.agent.tools import ToolRequest
from xuravljepa.agent.selective import Decode, SelectiveConfig, SelectiveDecoder
from xuravljepa.model import VLJEPA
from xuravljepa.presets import VLJEPAConfig
from xuravljepa.vit import VitConfig

ANSWERS = ("circle", "square", "triangle", "yes", "no", *map(str, range(9)))
ASKED = "what shape is the red one?"
NOW = 1.7e9
KEPT = MemoryConfig(max_age=1e10, sync=False, same=1e-4)  # random weights: all pictures look alike


@pytest.fixture(scope="module")
def model():
    return VLJEPA(VLJEPAConfig.tiny().replace(answers=ANSWERS), rng=np.random.default_rng(0))


@pytest.fixture
def agent(model):
    return agent_of(model)


def agent_of(model, **more):
    """An agent that always doubts."""
    heads = AgentHeads(AgentConfig.for_model(model.config), model.config.predictor, rng=np.random.default_rng(1))
    heads.monitor.output.weight.data[:] = 0
    heads.monitor.trust.data[:] = 0
    heads.monitor.output.bias.data[:] = 4.0
    return Agent(model, heads, **more)


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def watch(agent, seeds, times=None):
    return list(agent.stream([picture(seed) for seed in seeds], "how many?", times=times))


# ---------------------------------------------------------------------- asked afterwards
def test_an_answer_from_memory_is_that_of_the_picture(agent, model, tmp_path):
    agent.open_memory(tmp_path, KEPT)
    watch(agent, [0, 1, 2], [NOW, NOW + 10, NOW + 20])
    found = agent.recall(ASKED)
    assert [one.memory.time - NOW for one in found] == [20, 10, 0]
    agent.memory.close()
    later = agent_of(model)  # another program, later
    later.open_memory(tmp_path, KEPT)
    for one, then, seed in zip(later.recall(ASKED), found, [2, 1, 0]):
        reply = agent_of(model).ask(picture(seed), ASKED)
        assert one == then and one.answer == reply.trace.steps[0].answer
        assert one.confidence == pytest.approx(1 - reply.trace.steps[0].p_wrong_after)
        assert one.memory.source == f"frame {seed}" and one.answer in str(one)


def test_memories_are_found_by_time_and_by_likeness(agent, tmp_path):
    agent.open_memory(tmp_path, KEPT)
    watch(agent, range(5), [NOW + i for i in range(5)])
    assert [one.memory.number for one in agent.recall(ASKED, since=NOW + 1, until=NOW + 3)] == [3, 2, 1]
    found = agent.recall(ASKED, k=2, like=picture(3))
    assert found[0].memory.number == 3 and found[0].similarity == pytest.approx(1)
    assert found[1].similarity <= found[0].similarity


def test_a_sight_that_stays_is_remembered_once_with_its_end(agent, tmp_path):
    agent.open_memory(tmp_path, KEPT)
    watch(agent, [0] * 10 + [1] * 5 + [0] * 5, [NOW + i for i in range(20)])
    first, second = agent.memory
    assert (first.time, first.last, first.seen) == (NOW, NOW + 19, 2)
    assert (second.time, second.last, second.seen) == (NOW + 10, NOW + 14, 1)
    agent.memory.close()
    assert [(entry.last, entry.seen) for entry in agent.open_memory(tmp_path, KEPT)] == [
        (first.last, 2), (second.last, 1)]


def test_a_change_is_remembered_even_where_the_answer_stays(agent, tmp_path):
    agent.open_memory(tmp_path, KEPT)
    deaf = SelectiveDecoder(SelectiveConfig(drift=1.9))
    assert len(list(agent.stream([picture(0), picture(1), picture(2)], ASKED, deaf))) == 1
    assert len(agent.memory) == 3


def test_the_stream_may_end_early(agent, tmp_path):
    agent.open_memory(tmp_path, KEPT)
    stream = agent.stream((picture(0) for _ in range(100)), ASKED)
    next(stream)
    stream.close()
    assert len(agent.memory) == 1


def test_asking_memory_leaves_the_picture_in_view(agent, tmp_path):
    agent.open_memory(tmp_path, KEPT)
    watch(agent, [0, 1])
    before = agent.ask(picture(5), ASKED).trace.run.image
    agent.recall(ASKED, like=picture(0))
    assert agent.ask(None, ASKED).trace.run.image == before


def test_a_picture_in_view_can_be_remembered(agent, tmp_path):
    agent.look(picture(4))
    with pytest.raises(ConfigError, match="open_memory"):
        agent.remember()
    agent.open_memory(tmp_path / "memory", KEPT)
    assert agent.remember("here", time=NOW).source == "here"
    assert agent.recall(ASKED, like=picture(4))[0].similarity == pytest.approx(1)
    agent.save_state(tmp_path / "state")
    agent.load_state(tmp_path / "state")
    with pytest.raises(ShapeError, match="no picture to remember"):
        agent.remember()


def test_pixels_are_remembered_exactly(model):
    every = np.arange(256, dtype=np.uint8).repeat(48).reshape(64, 64, 3)
    assert np.array_equal(picture_of(model.pixels(every), model.config), every)


# ---------------------------------------------------------------------- the tool
def test_the_agent_searches_its_memory_itself(agent, tmp_path):
    agent.open_memory(tmp_path, KEPT, tool=True)
    watch(agent, [0, 1], [NOW, NOW + 1])
    reply = agent.ask(picture(7), f"earlier: {ASKED}")
    (call,) = reply.tool_calls[:1]
    assert call["tool"] == "memory_search" and call["ok"] and call["arguments"] == {"question": ASKED}
    recalled = agent.recall(ASKED)
    assert [one.memory.time for one in recalled] == [NOW + 1, NOW]
    value = reply.trace.calls()[0].result.value
    assert call["result"] == recalled[len(value) - 1].answer and value[0]["time"] == NOW + 1
    assert agent.ask(None, ASKED).tool_calls == []


def test_an_empty_memory_is_a_failed_call_not_an_error(agent, tmp_path):
    agent.open_memory(tmp_path, KEPT, tool=True)
    (call,) = agent.ask(picture(7), f"before, {ASKED}").tool_calls[:1]
    assert not call["ok"] and "nothing was seen" in call["error"]


# ---------------------------------------------------------------------- folders, times and mistakes
def test_a_folder_is_a_stream_in_the_order_of_its_numbers(agent, tmp_path):
    agent.open_memory(tmp_path / "memory", KEPT)
    for i in (10, 2, 1):
        path = tmp_path / f"frame{i}.png"
        Image.fromarray(picture(i)).save(path)
        os.utime(path, (NOW + i, NOW + i))
    (tmp_path / "notes.txt").write_text("no picture")
    assert [path.name for path in frames_in(tmp_path)] == ["frame1.png", "frame2.png", "frame10.png"]
    assert next(agent.stream(tmp_path, "how many?"))[0] == 0
    list(agent.stream(str(tmp_path)))
    assert [(os.path.basename(entry.source), entry.time - NOW) for entry in agent.memory] == [
        ("frame1.png", 1), ("frame2.png", 2), ("frame10.png", 10)]


@pytest.mark.parametrize("kind", ["folder", "list", "generator"])
def test_what_any_stream_showed_can_be_asked_afterwards(agent, model, tmp_path, kind):
    seeds, taken = [0, 0, 1, 1, 1, 2], []

    def camera():
        for seed in seeds:
            taken.append(seed)  # a frame is only taken when its turn has come
            yield picture(seed)

    for i, seed in enumerate(seeds):
        Image.fromarray(picture(seed)).save(tmp_path / f"{i}.png")
        os.utime(tmp_path / f"{i}.png", (NOW + i, NOW + i))
    frames = {"folder": tmp_path, "list": [picture(seed) for seed in seeds], "generator": camera()}[kind]
    times = None if kind == "folder" else [NOW + i for i in range(len(seeds))]
    agent.open_memory(tmp_path / "memory", KEPT)
    decoder = SelectiveDecoder(SelectiveConfig(drift=1e-6, surprise=1e-6))
    spoken = []
    for number, answer, confidence in agent.stream(frames, "how many?", decoder, times):
        spoken.append(number)
        assert answer in ANSWERS and 0 <= confidence <= 1
        assert kind != "generator" or taken == seeds[: number + 1]
    assert spoken == [0, 2, 5]
    found = agent.recall(ASKED)
    assert [one.memory.time - NOW for one in found] == [5, 2, 0]
    assert [one.memory.last - NOW for one in found] == [5, 4, 1]
    assert [one.answer for one in found] == [model.answer(picture(seed), ASKED) for seed in (2, 1, 0)]
    (nearest,) = agent.recall(ASKED, k=1, like=picture(1))
    assert nearest.memory.time == NOW + 2


def test_a_video_encoder_watches_clips(tmp_path):
    vision = VitConfig(image_size=16, patch_size=8, d_model=24, depth=1, n_heads=2, tubelet_size=2,
                       class_token=False, class_position=False)
    tiny = VLJEPAConfig.tiny()
    predictor = tiny.predictor.replace(vision_dim=24, n_visual=4, n_layers=1)
    model = VLJEPA(tiny.replace(answers=ANSWERS, vision=vision, predictor=predictor), rng=np.random.default_rng(0))
    agent = agent_of(model)
    frames = [picture(seed) for seed in (0, 0, 0, 0, 1, 1, 2)]
    assert model.pixels(frames[:3]).shape == (1, 4, 3, 16, 16)  # the last one twice
    np.testing.assert_array_equal(model.visual_tokens(model.pixels(frames[:1])),
                                  model.visual_tokens(model.pixels(frames[0])))  # a picture is a video that stands
    agent.open_memory(tmp_path, KEPT)
    decoder = SelectiveDecoder(SelectiveConfig(drift=1e-6, surprise=1e-6))
    assert [number for number, _, _ in agent.stream(frames, "how many?", decoder, range(7), clip=2)] == [1, 5, 6]
    assert [memory.time for memory in agent.memory] == [1, 5, 6]
    second = list(agent.memory)[1]
    np.testing.assert_array_equal(agent.memory.picture(second.number), picture_of(model.pixels(frames[4:6]), model.config))
    assert agent.ask(frames[:4], ASKED).answer in ANSWERS
    with pytest.raises(ShapeError, match="no frames"):
        model.pixels([])
    with pytest.raises(ConfigError, match="reads pictures"):
        VLJEPA(tiny).pixels(frames)
    with pytest.raises(ConfigError, match="clip is 0"):
        next(agent.stream(frames, clip=0))


def test_the_answer_is_that_of_all_frames_since_the_change(agent, model):
    """It is the decoder's mean that is put into words, not the newest frame."""
    answers, bank = model.answer_bank()

    class Told:
        def push(self, embedding):
            return Decode(3, 0, bank[2], drift=1.0, surprise=9.0)

    assert next(agent.stream([picture(0)], "how many?", Told()))[1] == answers[2]


def test_what_is_no_stream_is_refused(agent, tmp_path):
    with pytest.raises(FormatError, match="no folder"):
        next(agent.stream(str(tmp_path / "missing")))
    with pytest.raises(ConfigError, match="times"):
        watch(agent, [0, 1], [NOW])
    with pytest.raises(ConfigError, match="open_memory"):
        agent.recall(ASKED)
    agent.open_memory(tmp_path)
    with pytest.raises(ShapeError):
        agent.recall(" ")


def test_another_models_memory_is_refused(agent, tmp_path):
    mine = agent.open_memory(tmp_path / "a", KEPT)
    watch(agent, [0])
    other = agent_of(VLJEPA(VLJEPAConfig.tiny().replace(answers=ANSWERS), rng=np.random.default_rng(9)))
    with pytest.raises(MemoryBusyError):
        other.open_memory(tmp_path / "a")
    mine.close()
    with pytest.raises(FormatError, match="another model"):
        other.open_memory(tmp_path / "a", read_only=True)
    assert other.memory is None


def test_a_memory_for_reading_is_asked_but_not_written(agent, model, tmp_path):
    agent.open_memory(tmp_path, KEPT)
    watch(agent, [0])
    reader = agent_of(model)
    reader.open_memory(tmp_path, KEPT, read_only=True)
    watch(reader, [3, 4])
    assert len(reader.recall(ASKED)) == 1


def test_a_full_disk_does_not_stop_watching(agent, tmp_path, monkeypatch):
    agent.open_memory(tmp_path, KEPT)

    def full(file, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(memories, "_write", full)
    with pytest.warns(UserWarning, match="cannot remember: No space left"):
        assert watch(agent, [0, 1])
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch(agent, [2])
    assert len(agent.memory) == 1


def test_a_lost_picture_is_a_warning(agent, tmp_path):
    agent.open_memory(tmp_path, KEPT)
    watch(agent, [0, 1])
    path = next(tmp_path.glob("*.log"))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.warns(UserWarning, match="lost"):
        assert len(agent.recall(ASKED)) == 1


# ---------------------------------------------------------------------- state
def test_the_gates_reset_the_context_when_told_to(model):
    patient, strict = agent_of(model, auto_reset=0.01), agent_of(model, auto_reset=0.99)
    for agent in (agent_of(model), patient):
        agent.ask(picture(0), ASKED)
        agent.ask(None, ASKED)
    answer = strict.ask(picture(0), ASKED).answer
    assert answer == patient.ask(picture(0), ASKED).answer
    with pytest.raises(ShapeError, match="no picture"):
        strict.ask(None, ASKED)
    frames = [picture(0)] * 4
    assert len(list(patient.stream(frames))) == 1 and len(list(strict.stream(frames))) == 4


def test_a_state_cannot_stand_in_for_a_picture(agent, model, tmp_path):
    """A file that claims another picture's digest does not change what is seen in that picture."""
    honest = agent.ask(picture(0), ASKED)
    agent.save_state(tmp_path / "state")
    about = io.read_metadata(tmp_path / "state")
    agent.ask(picture(1), ASKED)
    agent.save_state(tmp_path / "other")
    other = io.load_safetensors(tmp_path / "other")
    forged = io.read_metadata(tmp_path / "other") | {"picture": about["picture"]}
    io.save_safetensors(tmp_path / "forged", other, forged)
    victim = agent_of(model)
    victim.load_state(tmp_path / "forged")
    reply = victim.ask(picture(0), ASKED)
    assert reply.trace.steps[0].candidates == honest.trace.steps[0].candidates


@pytest.mark.parametrize("question, present", [
    ("Earlier, what was it?", "what is it?"), ("was there a red circle before?", "is there a red circle?"),
    ("did you see an orange square earlier?", "do you see an orange square?"),
    ("have you seen a red circle before?", "do you see a red circle?"),
    ("how many circles did you see earlier?", "how many circles are there?"),
    ("previously, was there a red circle?", "is there a red circle?"),
    ("was a red circle there earlier?", "is there a red circle?"), ("before: what shape is the red one?", ASKED),
    ("what shape was the red one before?", ASKED)])
def test_what_speaks_of_earlier_goes_to_memory_in_the_present_tense(question, present):
    source = InThePresent()
    assert source.pattern.search(question) and source.resolve("question", question, {}, None) == present


@pytest.mark.parametrize("question", ["what is earlier than red?", "beforehand?", "is there a red circle before?",
                                      "earlier", "was there a red circle?", "which is before the last?"])
def test_other_questions_do_not(question):
    assert not InThePresent().pattern.search(question) and not speaks_of_earlier(question)


def test_no_picture_in_view_answers_what_is_asked_about_earlier(model):
    sure = agent_of(model)
    sure.heads.monitor.output.bias.data[:] = -6.0
    assert not sure.ask(picture(0), "is there a red circle?").unsure
    reply = sure.ask(picture(0), "was there a red circle before?")
    assert reply.unsure and reply.reason == "no_tool" and "earlier" in reply.trace.steps[0].note


def test_every_question_about_earlier_that_is_taught_is_understood():
    for templates in ("train", "paraphrase"):
        for row in memory_rows("val", 40, templates=templates):
            assert InThePresent().pattern.search(row.query)
            assert in_the_present(row.query).split()[-2:] == row.tool["arguments"]["question"].split()[-2:] or (
                row.type == "earlier count" and in_the_present(row.query) == row.tool["arguments"]["question"])


def test_memory_answers_for_all_pictures_or_for_the_last(agent, tmp_path, monkeypatch):
    """Yes if it was so in any of them; else the newest picture counts, and never the one in view."""
    agent.open_memory(tmp_path, KEPT, tool=True)
    watch(agent, [0, 1, 2, 3], [NOW, NOW + 1, NOW + 2, NOW + 3])  # 3 stays in view
    said, asked = {0: "yes", 1: "no", 2: "no"}, []

    def recollect(agent, query, memory, similarity=None):
        asked.append(memory.number)
        return Recollection(memory, said[memory.number], 0.9)

    monkeypatch.setattr(recall, "_recollect", recollect)
    call = agent.tools.run(ToolRequest("memory_search", {"question": "is there a red circle?"}))
    assert (call.text, asked) == ("yes", [2, 1, 0])
    said.update({0: "no"})
    assert agent.tools.run(ToolRequest("memory_search", {"question": "is there a red circle?"})).text == "no"
    said.update({2: "circle", 1: "square"})
    assert agent.tools.run(ToolRequest("memory_search", {"question": ASKED})).text == "circle"
