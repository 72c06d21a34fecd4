"""What the agent saw, asked afterwards: frames become memories, and a memory's picture can be asked anything.

A frame's key is the X-Encoder's [CLS] token (``sight``): with the shipped model noise moves it by a cosine
distance under 0.002, a scene that lost one object by more than 0.1.  A question is not compared with keys: it is
put to the remembered pictures themselves, which gives the answer that it would have had then.
"""

import dataclasses
import datetime
import math
import os
import re
import time
import warnings
from pathlib import Path

import numpy as np

from xuracore import no_grad
from xuracore.errors import ConfigError, FormatError, ShapeError
from xuravljepa.agent.arguments import InThePresent
from xuravljepa.agent.memory import Memory, MemoryConfig, VisualMemory
from xuravljepa.agent.tools import Output
from xuravljepa.model import CAPTION_QUERY

MOST_SEARCHED = 64  # memories that one question is put to
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


@dataclasses.dataclass(frozen=True)
class Recollection:
    """An answer from memory.

    memory : what was seen, with its times.   answer, confidence : of this question, about that picture.
    similarity : cosine with the picture that was searched for, or None.
    """

    memory: Memory
    answer: str
    confidence: float
    similarity: float | None = None

    def __str__(self):
        seen = clock_text(self.memory.time)
        if self.memory.last > self.memory.time:
            seen += f" to {clock_text(self.memory.last)}"
        return f"{seen}  {self.memory.source}: {self.answer}"


def clock_text(seconds):
    """Seconds since 1970 as local time, to be read."""
    try:
        return datetime.datetime.fromtimestamp(seconds).isoformat(" ", "seconds")
    except (OverflowError, OSError, ValueError):
        return f"{seconds:.0f} s"


def open_memory(agent, directory, config=None, read_only=False, tool=False):
    """See ``Agent.open_memory``."""
    width, eyes = agent.model.config.vision.d_model, agent.eyes()[:32]
    memory = VisualMemory(directory, width, MemoryConfig() if config is None else config, eyes, read_only)
    if tool and "memory_search" not in agent.tools:
        register_search(agent.tools, agent, usefulness=agent.usefulness)
    return memory


def register_search(registry, agent=None, **settings):
    """Register ``memory_search`` over an agent's memory; settings : for ``register``."""
    return registry.register(_search_tool(agent), description="Remember what was seen earlier.",
                             arguments={"question": InThePresent()}, isolation="inline", **settings)


def _search_tool(agent):
    def memory_search(question: str, deadline: float) -> Output:
        """Answer a question from pictures that were seen earlier.

        Args:
            question: what to ask the remembered pictures

        Returns:
            Of a question for yes or no: yes if it was so in any picture.  Of others: the answer of the last
            picture.  With all answers and their times, newest first.
        """
        found = []
        for one in _search(agent, question) if agent.memory is not None else ():
            found.append(one)
            if one.answer not in ("yes", "no") or one.answer == "yes" and one.confidence > 0.5:
                break
            if time.monotonic() > deadline:
                break
        if not found:
            raise LookupError("nothing was seen yet")
        value = [{"number": one.memory.number, "time": one.memory.time, "last": one.memory.last,
                  "source": one.memory.source, "answer": one.answer, "confidence": one.confidence}
                 for one in found]
        return Output(value, found[-1].answer)

    return memory_search


@no_grad()
def remember(agent, visual, pixels, source, time):
    """See ``Agent.remember``."""
    _check_open(agent)
    if pixels is None:
        raise ShapeError("there is no picture to remember: a state holds what was seen in it, not itself")
    reading, confidence = agent.glance(agent.model.query_tokens([CAPTION_QUERY]), visual)
    return agent.memory.add(sight(visual, agent.model.config.vision), picture_of(pixels, agent.model.config), source,
                            CAPTION_QUERY, reading.answer, confidence, time)


def _check_open(agent):
    if agent.memory is None:
        raise ConfigError("the agent has no memory yet: call open_memory(directory) first")


def _search(agent, question):
    """Recollections one by one, newest first, without the picture in view."""
    memory, query = agent.memory, agent.model.query_tokens([question])
    in_view = set() if agent.seen is None else {
        near.number for near, cosine in memory.search(sight(agent.seen, agent.model.config.vision), 3)
        if 1 - cosine <= memory.config.same}
    for one in memory.newest(MOST_SEARCHED):
        if one.number not in in_view and (found := _recollect(agent, query, one)) is not None:
            yield found


def _recollect(agent, query, memory, similarity=None):
    """The Recollection of a memory, or None with a warning where its picture is lost."""
    try:
        picture = agent.memory.picture(memory.number)
    except FormatError as error:
        warnings.warn(f"a memory is lost: {error}", stacklevel=4)
        return None
    reading, confidence = agent.glance(query, agent.view(agent.model.pixels(picture)))
    return Recollection(memory, reading.answer, confidence, similarity)


@no_grad()
def recall(agent, question, k=5, since=None, until=None, like=None):
    """See ``Agent.recall``."""
    _check_open(agent)
    query = agent.model.query_tokens([question])
    span = -math.inf if since is None else since, math.inf if until is None else until
    if like is None:
        found = [(memory, None) for memory in agent.memory.newest(k, *span)]
    else:
        visual = agent.model.visual_tokens(agent.model.pixels(like))
        found = agent.memory.search(sight(visual, agent.model.config.vision), k, *span)
    recollections = (_recollect(agent, query, memory, similarity) for memory, similarity in found)
    return [one for one in recollections if one is not None]


def sight(visual, vision):
    """(d,) the key of visual tokens (1, n, d) in memory: [CLS], or the mean where the X-Encoder has none."""
    return visual[0, 0] if vision.class_token else visual[0].mean(axis=0)


def picture_of(pixels, config):
    """Normalised pixels (1, 3, S, S), or the last of (1, F, 3, S, S) → the uint8 (S, S, 3) they were, exactly."""
    last = pixels.reshape(-1, *pixels.shape[-3:])[-1]
    values = np.moveaxis(last, 0, -1) * np.asarray(config.std, np.float32)
    return np.round((values + np.asarray(config.mean, np.float32)) * 255).astype(np.uint8)


class Watching:
    """Turns the frames of one stream into memories: one for each new sight, touched again when it ends.

    A memory that cannot be written (disk full) is a warning: watching goes on without it.
    """

    def __init__(self, memory):
        self.memory = None if memory is None or memory.read_only else memory
        self._sight, self._key, self._until = None, None, -math.inf

    def see(self, key, when, remember):
        """``remember()`` is called where the frame is no longer what was seen last; it returns a Memory."""
        if self.memory is None:
            return
        key = key / max(float(np.linalg.norm(key)), 1e-12)
        if self._sight is not None and 1 - float(key @ self._key) <= self.memory.config.same:
            self._until = max(self._until, when)
            return
        self.end()
        self._sight, self._key, self._until = self._try(remember), key, when

    def end(self):
        """Note until when the last sight lasted."""
        if self._sight is not None and self._until > self._sight.last:
            self._try(lambda: self.memory.touch(self._sight, self._until))
        self._sight = None

    def _try(self, write):
        try:
            return write()
        except OSError as error:
            warnings.warn(f"{self.memory.directory}: cannot remember: {error.strerror}", stacklevel=5)
            return None


def frames_in(folder):
    """[path] of the pictures in a folder, in the order of their names, numbers in them by value."""
    paths = (path for path in Path(folder).iterdir() if path.suffix.lower() in SUFFIXES)
    return sorted(paths, key=lambda path: ([(int(part), "") if part.isdigit() else (-1, part)
                                            for part in re.split(r"([0-9]+)", path.name) if part], path.name))


def numbered(frames, times, clock):
    """(number, frame, seconds since 1970, name) of the frames of a stream: a folder, or any iterable."""
    if isinstance(frames, (str, os.PathLike)):
        if not Path(frames).is_dir():
            raise FormatError("is no folder of pictures; a single picture is asked with ask()", frames)
        frames = frames_in(frames)
        times = (path.stat().st_mtime for path in frames) if times is None else times
    times = None if times is None else iter(times)
    for number, frame in enumerate(frames):
        name = str(frame) if isinstance(frame, (str, os.PathLike)) else f"frame {number}"
        if times is None:
            yield number, frame, clock(), name
            continue
        when = next(times, None)
        if when is None:
            raise ConfigError(f"times has no entry for frame {number}")
        yield number, frame, float(when), name


def in_clips(frames, length):
    """What ``numbered`` gives, ``length`` frames at a time, each a list with number, time and name of its last.

    What is left at the end is a shorter one.  With a length of 1 the frames come as they are.
    """
    if length < 1:
        raise ConfigError(f"clip is {length}; expected 1 frame or more")
    together = []
    for number, frame, when, name in frames:
        together.append(frame)
        if len(together) == length:
            yield number, together if length > 1 else frame, when, name
            together = []
    if together:
        yield number, together, when, name
