"""What a decode is worth: laws of the rules, of accuracy, latency and the factor of saved decodes."""

import numpy as np
import pytest

from training import streams
from training.data.streams import render_stream, stream
from training.scripts import evaluate_streams
from training.streams import Decoded, Watched, Worth
from xuracore.errors import ConfigError
from xuravljepa.agent.agent import Agent
from xuravljepa.agent.memory import MemoryConfig
from xuravljepa.agent.selective import SelectiveConfig
from xuravljepa.model import VLJEPA


def watched(noise=0.3, questions=2, length=200, seed=0, width=16):
    """Answers that change at random, with noise around their embeddings."""
    rng = np.random.default_rng(seed)
    bank = np.linalg.qr(rng.standard_normal((width, width)))[0][:8]
    right = np.zeros((length, questions), int)
    for t in range(1, length):
        right[t] = right[t - 1]
        if rng.random() < 0.05:
            right[t, rng.integers(questions)] += 1 + rng.integers(7)
    right %= 8
    return Watched(bank[right] + noise * rng.standard_normal((length, questions, width)) / 4, right, bank)


def test_every_frame_of_a_clear_stream_is_right_at_once():
    clear = watched(noise=0)
    whole = streams.worth(clear, streams.uniform(clear, 1))
    assert (whole.accuracy, whole.latency, whole.rate) == (1, 0, 100)
    live = streams.worth(clear, streams.online(clear, SelectiveConfig(drift=0.1)))
    assert (live.accuracy, live.boundary_f1) == (1, 1) and live.decodes == len(clear.changes) + 1
    later = streams.worth(clear, streams.ward(clear, threshold=1e-6), offline=True)
    assert (later.accuracy, later.boundary_f1, later.decodes) == (1, 1, live.decodes)


def test_accuracy_and_latency_are_counted_by_hand():
    bank = np.eye(2)
    seen = Watched(bank[[0, 0, 1, 1, 1, 0]][:, None], np.array([0, 0, 1, 1, 1, 0])[:, None], bank)
    assert seen.changes == [2, 5]
    found = streams.worth(seen, streams.uniform(seen, 4))  # 0 0 0 0 1 1 against 0 0 1 1 1 0
    assert (found.right, found.changes, found.delay) == (3, 2, 2 + 1)
    held = streams.worth(seen, [Decoded(5, 0, bank[0]), Decoded(5, 2, bank[1])], offline=True)  # 0 0 1 1 1 1
    assert (held.right, held.f1) == (5, 2 / 3)
    with pytest.raises(ConfigError, match="decodes the first frame"):
        streams.worth(seen, [Decoded(5, 2, bank[1])])


def test_the_means_of_uniform_sampling_are_of_the_newest_frames():
    seen = watched()
    for moment in streams.uniform(seen, 7, pooled=4):
        expected = seen.flat[max(0, moment.frame - 3) : moment.frame + 1].mean(axis=0)
        np.testing.assert_allclose(moment.embedding, expected)


def test_the_rule_of_distance_rests_after_a_decode():
    frames = [moment.frame for moment in streams.moved_since(watched(), 0.3, lag=8)]
    assert frames[0] == 0 and len(frames) > 3 and min(np.diff(frames)) >= 8


def test_the_factor_is_where_the_curve_of_uniform_sampling_is_as_accurate():
    curve = [Worth(100, 100, 90), Worth(100, 10, 80), Worth(100, 20, 70), Worth(100, 5, 60)]  # one point is no gain
    assert streams.saved(Worth(100, 5, 80), curve) == (pytest.approx(2), True)
    assert streams.saved(Worth(100, 10, 90), curve) == (pytest.approx(10), True)
    assert streams.saved(Worth(100, 10, 85), curve) == (pytest.approx(np.sqrt(1000) / 10), True)
    assert streams.saved(Worth(100, 4, 95), curve) == (25, False)
    assert streams.saved(Worth(100, 10, 10), curve) == (0.5, True)


def test_the_selective_decoder_saves_most_of_the_decodes_on_noisy_streams():
    seen = [watched(noise=1.0, seed=seed) for seed in range(4)]
    curve = [streams.total(seen, lambda one: streams.uniform(one, every, pooled))
             for every in (1, 2, 5, 10, 20, 50) for pooled in (1, 4)]  # fmt: skip
    live = streams.total(seen, lambda one: streams.online(one, SelectiveConfig(drift=0.1)))
    assert streams.saved(live, curve)[0] > 2.85


def test_what_a_model_sees_of_a_stream_is_what_it_answers():
    model = VLJEPA.from_pretrained("tiny")
    *alone, together = streams.watch(model, "test", 0, length=20)
    assert len(alone) == len(streams.QUESTIONS) and together.embeddings.shape[:2] == (20, len(streams.QUESTIONS))
    np.testing.assert_array_equal(together.flat[:, 64:128], alone[1].flat)
    whole = streams.worth(together, streams.uniform(together, 1))
    assert whole.accuracy > 0.95 and together.changes


def test_the_script_writes_tables_numbers_and_pictures(tmp_path, capsys):
    evaluate_streams.main(["--noise", "4", "--seeds", "1", "--streams", "1", "--length", "20", "--output-dir",
                           str(tmp_path)])  # fmt: skip
    printed = capsys.readouterr().out
    assert "| online, drift 0.1 " in printed and "Five questions at once, noise 4: 20 frames" in printed
    assert {path.name for path in tmp_path.iterdir()} == {
        "streams.json", "streams_one_noise4.svg", "streams_five_noise4.svg"}  # fmt: skip


def test_an_agent_speaks_where_the_answer_changes_and_can_be_asked_what_it_saw(tmp_path):
    this = stream("test", 0, length=24)
    agent = Agent(VLJEPA.from_pretrained("tiny"))
    agent.open_memory(tmp_path, MemoryConfig(max_age=1e10, sync=False))
    asked, later = 1, 4  # of QUESTIONS: while watching, and afterwards
    spoken = list(agent.stream(render_stream(this), streams.QUESTIONS[asked], times=range(24)))
    right = [streams.right_answers(scene) for scene in this.scenes]
    standing = [[answer for number, answer, _ in spoken if number <= frame][-1] for frame in range(24)]
    assert standing == [answers[asked] for answers in right]
    assert len(spoken) <= 1 + sum(a[asked] != b[asked] for a, b in zip(right, right[1:]))
    sights = agent.recall(streams.QUESTIONS[later], k=99)
    assert [one.memory.time for one in sights] == [event.frame for event in this.events[::-1]] + [0]
    assert [one.answer for one in sights] == [right[int(one.memory.time)][later] for one in sights]
