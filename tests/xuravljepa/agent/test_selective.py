"""A stream is decoded where its meaning changes, and nowhere else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xuracore.errors import ConfigError, FormatError, ShapeError
from xuravljepa.agent.selective import SelectiveConfig, SelectiveDecoder, boundary_f1, ward_segments

WIDTH, FRAMES = 64, 600


def stream(noise, seed=0, frames=FRAMES, width=WIDTH):
    """Segments of about 30 frames over 12 concepts, as in the specification's simulation (vljepa §4.6)."""
    rng = np.random.default_rng(seed)
    concepts = rng.normal(size=(12, width))
    concepts /= np.linalg.norm(concepts, axis=1, keepdims=True)
    labels, current = [], int(rng.integers(12))
    while len(labels) < frames:
        labels += [current] * int(rng.integers(20, 41))
        current = (current + int(rng.integers(1, 12))) % 12
    labels = np.array(labels[:frames])
    return concepts, labels, concepts[labels] + noise * rng.normal(size=(frames, width)) / np.sqrt(width)


def decode_all(frames, config=SelectiveConfig()):
    decoder = SelectiveDecoder(config)
    return decoder, [decode for frame in frames if (decode := decoder.push(frame)) is not None]


def changes(labels):
    return (np.flatnonzero(np.diff(labels)) + 1).tolist()


def accuracy(concepts, labels, decodes):
    """Share of the frames whose latest decoded label is right."""
    latest = np.zeros(len(labels), int)
    for decode in decodes:
        latest[decode.frame:] = np.argmax(concepts @ decode.embedding)
    return np.mean(latest == labels)


@pytest.mark.parametrize("noise, width, least",
                         [(0.0, 64, 1.0), (1.0, 64, 0.99), (2.0, 64, 0.9), (1.0, 16, 0.9)])
def test_planted_changes_are_found(noise, width, least):
    concepts, labels, frames = stream(noise, width=width)
    _, decodes = decode_all(frames)
    assert boundary_f1([decode.start for decode in decodes[1:]], changes(labels), tolerance=2) >= 0.9
    assert accuracy(concepts, labels, decodes) >= least
    # As accurate as decoding every fifth frame, with at least five times fewer decodes.
    every_fifth = [(frame, frames[frame]) for frame in range(0, FRAMES, 5)]
    uniform = np.repeat([np.argmax(concepts @ x) for _, x in every_fifth], 5)
    assert accuracy(concepts, labels, decodes) >= np.mean(uniform == labels)
    assert len(decodes) * 5 <= len(every_fifth) + 10


def test_without_noise_a_change_is_seen_in_its_first_frame():
    _, labels, frames = stream(0.0)
    _, decodes = decode_all(frames)
    assert [decode.frame for decode in decodes] == [0] + changes(labels)


@pytest.mark.parametrize("config", [SelectiveConfig(), SelectiveConfig(target_rate=0.2),
                                    SelectiveConfig(window=1)])
def test_a_static_stream_is_decoded_once(config):
    frame = np.random.default_rng(0).normal(size=WIDTH)
    decoder, decodes = decode_all([frame * (1 + i % 3) for i in range(300)], config)
    assert len(decodes) == 1 and decodes[0].frame == 0
    assert np.allclose(decodes[0].embedding, frame / np.linalg.norm(frame))
    assert decoder.rate == 1 / 300


@pytest.mark.parametrize("noise", [0.1, 1.0, 3.0])
def test_noise_alone_is_not_decoded(noise):
    rng = np.random.default_rng(1)
    frame = rng.normal(size=WIDTH) / np.sqrt(WIDTH)
    _, decodes = decode_all(frame + noise * rng.normal(size=(400, WIDTH)) / np.sqrt(WIDTH))
    assert len(decodes) <= 2


def test_a_slow_drift_is_decoded_each_time_it_has_gone_far():
    angle = np.linspace(0, np.pi, 400)
    frames = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    _, decodes = decode_all(frames)
    seen = np.stack([decode.embedding for decode in decodes])
    cosines = np.sum(seen[1:] * seen[:-1], axis=1)
    assert 3 <= len(decodes) <= 12 and cosines.max() < 0.95


def test_decodes_keep_their_distance():
    _, _, frames = stream(0.0)
    _, decodes = decode_all(frames, SelectiveConfig(min_gap=50))
    assert min(np.diff([decode.frame for decode in decodes])) >= 50


@pytest.mark.parametrize("target", [0.02, 0.1])
def test_the_controller_meets_its_rate(target):
    _, _, frames = stream(2.0, frames=3000)
    decoder, _ = decode_all(frames, SelectiveConfig(target_rate=target))
    assert 0.75 * target <= decoder.rate <= 1.25 * target


@given(st.integers(0, 2**32 - 1), st.floats(0, 3), st.floats(1e-3, 1e3))
def test_the_length_of_embeddings_does_not_count(seed, noise, factor):
    _, _, frames = stream(noise, seed, frames=80, width=8)
    one, other = decode_all(frames)[1], decode_all(frames * factor)[1]
    assert [decode.frame for decode in one] == [decode.frame for decode in other]


@given(st.integers(0, 2**32 - 1), st.integers(1, 79))
def test_a_stream_can_be_interrupted(seed, cut):
    _, _, frames = stream(1.0, seed, frames=80, width=8)
    config = SelectiveConfig(target_rate=0.1)
    _, whole = decode_all(frames, config)
    first, before = decode_all(frames[:cut], config)
    second = SelectiveDecoder(config)
    second.load_state_dict(first.state_dict())
    after = [decode for frame in frames[cut:] if (decode := second.push(frame)) is not None]
    assert [(d.frame, d.start, d.drift) for d in before + after] \
        == [(d.frame, d.start, d.drift) for d in whole]


def test_reset_forgets():
    _, _, frames = stream(0.0)
    decoder, _ = decode_all(frames)
    decoder.reset()
    assert decoder.push(frames[0]).frame == 0 and decoder.decodes == 1
    fresh = SelectiveDecoder()
    fresh.load_state_dict(SelectiveDecoder().state_dict())
    assert fresh.push(frames[0]).frame == 0


@pytest.mark.parametrize("frame, error", [
    (np.zeros(4), FormatError), (np.full(4, np.nan), FormatError), (np.array([1, np.inf, 0, 0]), FormatError),
    (np.ones(3), ShapeError), (np.ones((1, 4)), ShapeError), (1.0, ShapeError), ([], ShapeError),
])
def test_a_frame_that_is_none_is_refused_and_nothing_changes(frame, error):
    decoder, _ = decode_all([np.ones(4), np.ones(4)])
    before = decoder.state_dict()
    with pytest.raises(error):
        decoder.push(frame)
    after = decoder.state_dict()
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("change", [{"counters": np.zeros(2)}, {"levels": np.array([np.nan, 0.0, 0.0])},
                                    {"recent": np.zeros(4)}, {"recent": np.full((1, 4), np.nan)},
                                    {"sum": np.zeros(3)}, {"recent": np.zeros((99, 4))}, {"counters": None},
                                    {"levels": np.array([1.0, -1.0, 0.0])}])
def test_a_damaged_state_is_refused(change):
    decoder, _ = decode_all([np.ones(4)])
    with pytest.raises(FormatError):
        SelectiveDecoder().load_state_dict(decoder.state_dict() | change)


@pytest.mark.parametrize("wrong", [
    {"drift": 0.0}, {"drift": 2.0}, {"surprise": 0.0}, {"window": 0}, {"min_gap": 0}, {"target_rate": 0.0},
    {"target_rate": 1.1}, {"gain": 0.0}, {"memory": 0.0}, {"drift": float("nan")},
])
def test_a_configuration_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ConfigError):
        SelectiveConfig(**wrong)


# ---------------------------------------------------------------------------------------------
# Offline
# ---------------------------------------------------------------------------------------------


def brute_force(x, count, threshold=np.inf):
    """Ward's merges, each time by looking at every pair of neighbours."""
    parts = [[i] for i in range(len(x))]
    while len(parts) > count:
        prices = [len(a) * len(b) / (len(a) + len(b)) * np.sum((x[a].mean(0) - x[b].mean(0)) ** 2)
                  for a, b in zip(parts, parts[1:])]
        best = int(np.argmin(prices))
        if prices[best] > threshold:
            break
        parts[best:best + 2] = [parts[best] + parts[best + 1]]
    return [(part[0], part[-1] + 1) for part in parts]


@given(st.integers(0, 2**32 - 1), st.integers(1, 14), st.data())
def test_the_heap_finds_what_brute_force_finds(seed, frames, data):
    x = np.random.default_rng(seed).normal(size=(frames, 3))
    count = data.draw(st.integers(1, frames))
    segments = ward_segments(x, count=count)
    assert [(segment.start, segment.stop) for segment in segments] == brute_force(x, count)
    for segment in segments:
        assert np.allclose(segment.embedding, x[segment.start:segment.stop].mean(axis=0))
        assert segment.start <= segment.middle < segment.stop


@given(st.integers(0, 2**32 - 1), st.integers(1, 14), st.floats(0, 8))
def test_a_threshold_stops_where_brute_force_stops(seed, frames, threshold):
    x = np.random.default_rng(seed).normal(size=(frames, 3))
    segments = ward_segments(x, threshold=threshold)
    assert [(segment.start, segment.stop) for segment in segments] == brute_force(x, 1, threshold)


@pytest.mark.parametrize("noise", [0.0, 1.0, 2.0])
def test_the_true_segments_are_recovered(noise):
    concepts, labels, frames = stream(noise)
    segments = ward_segments(frames, count=len(changes(labels)) + 1)
    assert boundary_f1([segment.start for segment in segments[1:]], changes(labels), tolerance=1) >= 0.95
    right = [np.argmax(concepts @ segment.embedding) == labels[segment.middle] for segment in segments]
    assert np.mean(right) >= 0.95


def test_the_threshold_is_the_price_of_the_last_merge():
    x = np.array([[0.0], [0.0], [3.0], [3.0]])  # merging the halves costs 2·2/4 · 9 = 9
    assert [segment.start for segment in ward_segments(x, threshold=8.9)] == [0, 2]
    assert [segment.start for segment in ward_segments(x, threshold=9.0)] == [0]
    assert len(ward_segments(x, threshold=0.0)) == 2


@pytest.mark.parametrize("x, options, error", [
    (np.zeros(3), {"count": 1}, ShapeError), (np.zeros((0, 3)), {"count": 1}, ShapeError),
    (np.full((2, 2), np.nan), {"count": 1}, FormatError), (np.zeros((2, 2)), {}, ConfigError),
    (np.zeros((2, 2)), {"count": 1, "threshold": 1.0}, ConfigError),
    (np.zeros((2, 2)), {"count": 3}, ConfigError), (np.zeros((2, 2)), {"threshold": -1.0}, ConfigError),
    (np.zeros((2, 2)), {"threshold": np.nan}, ConfigError),
])
def test_what_cannot_be_cut_is_refused(x, options, error):
    with pytest.raises(error):
        ward_segments(x, **options)


def test_f1_of_boundaries():
    assert boundary_f1([10, 50], [11, 48], tolerance=2) == 1.0
    assert boundary_f1([10, 11], [10], tolerance=2) == pytest.approx(2 / 3)
    assert boundary_f1([], [5], tolerance=2) == 0.0
    assert boundary_f1([], [], tolerance=0) == 1.0


def test_the_drift_is_that_of_the_concepts_and_not_of_the_noise():
    rng = np.random.default_rng(0)
    width, drifts = 512, []
    for _ in range(60):
        a, b = np.linalg.qr(rng.normal(size=(width, 2)))[0].T
        means = np.concatenate([np.tile(a, (10, 1)), np.tile(0.5 * a + np.sqrt(0.75) * b, (40, 1))])
        _, decodes = decode_all(means + 2.0 * rng.normal(size=means.shape) / np.sqrt(width))
        drifts += [decode.drift for decode in decodes[1:]]
    assert len(drifts) == 60 and np.mean(drifts) == pytest.approx(0.5, abs=0.04)
