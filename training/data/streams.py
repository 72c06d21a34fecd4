"""Frame sequences with annotated events, for the selective decoder.

A stream is a scene that mostly stays as it is.  Now and then an object appears, disappears or moves to the
other half of the picture; between events only camera noise changes.  A decoder that speaks when, and only
when, something happened has understood it.
"""
from dataclasses import dataclass, replace

import numpy as np

from training.data.rng import Draws
from training.data.scenes import (ALLOWED_SHAPES, COLOURS, IMAGE_SIZE, MAX_OBJECTS, MIDDLE, MIN_OBJECTS,
                                  RADII, SHAPES, SIZES, SceneObject, add_noise, caption, find_place, render,
                                  scene)
from xuracore.errors import ConfigError

EVENT_KINDS = ("appears", "disappears", "moves")
MIN_HOLD, MAX_HOLD = 6, 18     # frames between events
NOISE = 4                      # standard deviation of the camera noise, of 255


@dataclass(frozen=True, slots=True)
class Event:
    """What changed at ``frame``: ``kind`` is one of EVENT_KINDS, ``text`` says it in words."""

    frame: int
    kind: str
    colour: str
    shape: str
    text: str


@dataclass(frozen=True, slots=True)
class Stream:
    """A sequence of scenes, one per frame (equal between events), and the events between them."""

    scenes: tuple
    events: tuple
    split: str
    index: int
    seed: int

    def captions(self):
        """The true caption of every frame, a list of strings."""
        return [caption(frame) for frame in self.scenes]


def stream(split, index, seed=0, length=60):
    """Stream number ``index`` of ``split``: ``length`` frames, an event every 6–18 of them.

    A longer stream begins with the shorter one.  Raises ConfigError for a length below 1.
    """
    if length < 1:
        raise ConfigError(f"a stream needs at least one frame, got length={length}")
    draws = Draws("stream", seed, split, index)
    # Streams are numbered apart from scenes, so that no stream begins with a picture of the still split.
    current = replace(scene(split, index, f"{seed}-stream"), seed=seed)
    frames, events = [], []
    while len(frames) < length:
        frames += [current] * draws.between(MIN_HOLD, MAX_HOLD)
        if len(frames) < length:
            current, event = _next_event(current, draws, len(frames))
            events.append(event)
    return Stream(tuple(frames[:length]), tuple(events), split, index, seed)


def _next_event(current, draws, frame):
    """The scene after one event, and the event."""
    while True:
        kind = draws.choice(EVENT_KINDS)
        objects = list(current.objects)
        i = draws.below(len(objects))
        if kind == "appears" and len(objects) < MAX_OBJECTS:
            thing = _newcomer(objects, draws, current.split)
            if thing is None:
                continue
            objects.append(thing)
            text = f"{thing.colour} {thing.shape} appears"
        elif kind == "disappears" and len(objects) > MIN_OBJECTS:
            thing = objects.pop(i)
            text = f"{thing.colour} {thing.shape} disappears"
        elif kind == "moves":
            thing = objects[i]
            side, left, right = ("right", 35, IMAGE_SIZE - 1) if thing.x < MIDDLE else ("left", 0, 28)
            taken = [(o.x, o.y, o.radius) for o in objects if o is not thing]
            place = find_place(draws, thing.radius, taken, left, right)
            if place is None:
                continue
            thing = objects[i] = replace(thing, x=place[0], y=place[1])
            text = f"{thing.colour} {thing.shape} moves {side}"
        else:
            continue
        return replace(current, objects=tuple(objects)), Event(frame, kind, thing.colour, thing.shape, text)


def _newcomer(objects, draws, split):
    colour = draws.choice([c for c in COLOURS if c not in {o.colour for o in objects}])
    size = draws.choice(SIZES)
    radius = draws.choice(RADII[size])
    place = find_place(draws, radius, [(o.x, o.y, o.radius) for o in objects])
    shape = draws.choice(SHAPES if split == "ood" else ALLOWED_SHAPES[colour])
    return None if place is None else SceneObject(colour, shape, size, *place, radius)


def render_stream(stream, noise=NOISE):
    """The frames, uint8 (length, 64, 64, 3), with camera noise of standard deviation ``noise`` (0: none)."""
    still = {this: render(this) for this in dict.fromkeys(stream.scenes)}
    images = []
    for i, this in enumerate(stream.scenes):
        draws = Draws("camera", stream.seed, stream.split, stream.index, i)
        images.append(add_noise(still[this], draws, noise) if noise else still[this])
    return np.stack(images)
