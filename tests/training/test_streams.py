"""Streams: what changes is what the events say, and nothing else."""
import numpy as np
import pytest

from training.data.streams import EVENT_KINDS, MAX_HOLD, MIN_HOLD, render_stream, stream
from xuracore.errors import ConfigError


def changes(this):
    """Frames at which the scene differs from the one before."""
    return [i for i in range(1, len(this.scenes)) if this.scenes[i] != this.scenes[i - 1]]


def test_scenes_change_at_events_and_only_there():
    kinds = set()
    for i in range(30):
        this = stream("train", i, length=80)
        assert len(this.scenes) == 80
        assert changes(this) == [event.frame for event in this.events]
        gaps = np.diff([0] + changes(this))
        assert gaps.min() >= MIN_HOLD and gaps.max() <= MAX_HOLD
        kinds |= {event.kind for event in this.events}
    assert kinds == set(EVENT_KINDS)


def test_each_event_says_what_happened():
    for i in range(30):
        this = stream("test", i, length=80)
        for event in this.events:
            before = {o.colour: o for o in this.scenes[event.frame - 1].objects}
            after = {o.colour: o for o in this.scenes[event.frame].objects}
            changed = {c for c in before | after if before.get(c) != after.get(c)}
            assert changed == {event.colour}
            if event.kind == "appears":
                assert event.colour not in before and after[event.colour].shape == event.shape
            elif event.kind == "disappears":
                assert event.colour not in after and before[event.colour].shape == event.shape
            else:
                sides = [objects[event.colour].x > 31.5 for objects in (before, after)]
                assert sides[0] != sides[1] and event.text.endswith("right" if sides[1] else "left")


def test_objects_never_touch_or_share_a_colour():
    for i in range(30):
        for frame in set(stream("train", i, length=80).scenes):
            assert 3 <= len(frame.objects) <= 6 and not any(o.held_out for o in frame.objects)
            for k, a in enumerate(frame.objects):
                for b in frame.objects[:k]:
                    assert a.colour != b.colour
                    assert max(abs(a.x - b.x), abs(a.y - b.y)) > a.radius + b.radius + 2


def test_a_longer_stream_begins_with_the_shorter_one():
    long, short = stream("val", 3, 2, length=90), stream("val", 3, 2, length=40)
    assert long.scenes[:40] == short.scenes
    assert np.array_equal(render_stream(long)[:40], render_stream(short))


def test_camera_noise_is_small_and_can_be_left_out():
    this = stream("train", 0, length=MIN_HOLD)
    noisy, still = render_stream(this).astype(int), render_stream(this, noise=0).astype(int)
    assert noisy.shape == (MIN_HOLD, 64, 64, 3)
    assert np.all(still == still[0]) and not np.all(noisy == noisy[0])
    assert 2 < (noisy - still).std() < 6


def test_captions_follow_the_scene():
    this = stream("train", 1, length=60)
    assert [i for i in range(1, 60) if this.captions()[i] != this.captions()[i - 1]] == changes(this)


def test_a_stream_without_frames_is_refused():
    with pytest.raises(ConfigError, match="length=0"):
        stream("train", 0, length=0)
