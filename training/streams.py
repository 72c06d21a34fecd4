"""When to put a stream into words: rules that choose the frames to decode, and what each choice is worth.

A ``Watched`` stream is what a model predicted of every frame, with the right answer beside it.  A rule turns it
into ``Decoded`` moments.  Live rules see the frames up to now: the answer of the newest moment stands until the
next one.  Offline rules see the whole stream: each moment's answer holds for its own frames.
"""

from dataclasses import dataclass

import numpy as np

from training.data.scenes import SHAPES, SIZES
from training.data.streams import render_stream, stream
from xuracore import no_grad
from xuracore.errors import ConfigError
from xuravljepa.agent.selective import SelectiveDecoder, boundary_f1, ward_segments

QUESTIONS = (*(f"how many {shape}s are there?" for shape in SHAPES),
             *(f"how many {size} ones are there?" for size in SIZES))  # fmt: skip
TOLERANCE = 2  # frames by which a boundary may be missed


def right_answers(scene):
    """The answers to QUESTIONS, a tuple of texts."""
    kinds = [("shape", shape) for shape in SHAPES] + [("size", size) for size in SIZES]
    return tuple(str(sum(getattr(thing, name) == value for thing in scene.objects)) for name, value in kinds)


@dataclass(frozen=True)
class Watched:
    """What a model predicted of every frame of a stream.

    embeddings (T, Q, E) : of the answers to Q questions.   right (T, Q) : the true answers, as places in the
    bank.   bank (n, E) : the embeddings of all known answers.
    """

    embeddings: np.ndarray
    right: np.ndarray
    bank: np.ndarray

    def __len__(self):
        return len(self.right)

    @property
    def flat(self):
        """(T, Q E): what a rule looks at."""
        return self.embeddings.reshape(len(self), -1)

    def words(self, embedding):
        """(Q,) the nearest known answers to an embedding (Q E,)."""
        return (embedding.reshape(self.embeddings.shape[1:]) @ self.bank.T).argmax(axis=-1)

    @property
    def changes(self):
        """Frames whose right answer is another than that of the frame before."""
        return (np.flatnonzero((self.right[1:] != self.right[:-1]).any(axis=1)) + 1).tolist()


@dataclass(frozen=True)
class Decoded:
    """One decode: of ``embedding``, known at ``frame``, said about the frames from ``start`` on."""

    frame: int
    start: int
    embedding: np.ndarray


@no_grad()
def watch(model, split, index, seed=0, length=120, noise=4, batch_size=64):
    """[Watched]: one for each of QUESTIONS, then one for all together, of a generated stream."""
    this = stream(split, index, seed, length)
    frames = render_stream(this, noise)
    answers, bank = model.answer_bank()
    place = {text: i for i, text in enumerate(answers)}
    right = np.array([[place[text] for text in right_answers(scene)] for scene in this.scenes])
    predicted = np.empty((length, len(QUESTIONS), bank.shape[1]))
    for start in range(0, length, batch_size):
        visual = model.visual_tokens(np.concatenate([model.pixels(frame) for frame in frames[start:][:batch_size]]))
        for k, question in enumerate(QUESTIONS):
            query = model.query_tokens([question] * len(visual))
            predicted[start : start + len(visual), k] = model.predictor(query, visual).embedding.data
    alone = [Watched(predicted[:, k : k + 1], right[:, k : k + 1], bank) for k in range(len(QUESTIONS))]
    return [*alone, Watched(predicted, right, bank)]


# ---------------------------------------------------------------------- live rules
def uniform(watched, every, pooled=1):
    """Every so many frames; of the mean of the newest ``pooled`` ones."""
    x = watched.flat
    return [Decoded(t, t, x[max(0, t + 1 - pooled) : t + 1].mean(axis=0)) for t in range(0, len(x), every)]


def online(watched, config):
    """SelectiveDecoder with a SelectiveConfig."""
    decoder = SelectiveDecoder(config)
    moments = [decoder.push(x) for x in watched.flat]
    return [Decoded(moment.frame, moment.start, moment.embedding) for moment in moments if moment is not None]


def moved_since(watched, threshold, lag=8, keep=0.7):
    """Where a running mean has moved by more than ``threshold`` (L2) in ``lag`` frames, as the seed of Xura does.

    keep : share of the past in the running mean.  After a decode the rule rests for ``lag`` frames: otherwise one
    change would be decoded over and over.
    """
    x, smooth, last, found = watched.flat, [], 0, []
    for t, frame in enumerate(x):
        smooth.append(frame if t == 0 else keep * smooth[-1] + (1 - keep) * frame)
        moved = t == 0 or t - last >= lag and np.linalg.norm(smooth[t] - smooth[t - lag]) > threshold
        if moved:
            found.append(Decoded(t, t, frame))
            last = t
    return found


# ---------------------------------------------------------------------- offline rules
def windows(watched, size):
    """Stretches of equal length, each decoded of its mean."""
    x = watched.flat
    return [Decoded(len(x) - 1, start, x[start : start + size].mean(axis=0)) for start in range(0, len(x), size)]


def ward(watched, **settings):
    """Ward's segments, each decoded of its mean; settings : ``count`` or ``threshold``."""
    return [Decoded(len(watched) - 1, s.start, s.embedding) for s in ward_segments(watched.flat, **settings)]


# ---------------------------------------------------------------------- what it is worth
@dataclass(frozen=True)
class Worth:
    """Sums over streams: of frames, decodes, right frames, and what boundaries and delays need."""

    frames: int = 0
    decodes: int = 0
    right: int = 0
    streams: int = 0
    f1: float = 0.0
    changes: int = 0
    delay: int = 0

    def __add__(self, other):
        return Worth(*(getattr(self, name) + getattr(other, name) for name in Worth.__dataclass_fields__))

    @property
    def rate(self):
        """Decodes per 100 frames."""
        return 100 * self.decodes / self.frames

    @property
    def accuracy(self):
        """Share of the frames whose standing answers are all right."""
        return self.right / self.frames

    @property
    def boundary_f1(self):
        """Mean over the streams of the F1 of the decodes' starts against the true changes."""
        return self.f1 / self.streams

    @property
    def latency(self):
        """Mean frames from a change until the standing answer is right, at most until the next change."""
        return self.delay / max(self.changes, 1)


def worth(watched, decoded, offline=False):
    """What the moments of a rule are worth, as Worth; ConfigError if the first frame has no answer."""
    begins = [moment.start if offline else moment.frame for moment in decoded]
    if not begins or begins[0] != 0:
        raise ConfigError("a rule decodes the first frame: until then there is no answer")
    said = np.stack([watched.words(moment.embedding) for moment in decoded])
    standing = said[np.searchsorted(begins, np.arange(len(watched)), side="right") - 1]
    right = (standing == watched.right).all(axis=1)
    changes, delay = watched.changes, 0
    for change, until in zip(changes, [*changes[1:], len(watched)]):
        delay += int(np.argmax(np.append(right[change:until], True)))
    f1 = boundary_f1([moment.start for moment in decoded[1:]], changes, TOLERANCE)
    return Worth(len(watched), len(decoded), int(right.sum()), 1, f1, len(changes), delay)


def total(watched, rule, offline=False):
    """Worth of ``rule(watched) → [Decoded]`` over many Watched."""
    return sum((worth(one, rule(one), offline) for one in watched), start=Worth())


def saved(selective, uniform_curve):
    """How many times fewer decodes than uniform sampling needs for the same accuracy.

    selective : Worth.   uniform_curve : [Worth], of any uniform rules.  Between two neighbours of their upper
    envelope the logarithm of the rate is interpolated.  Returns (factor, reached): where uniform sampling is
    less accurate at every rate, the factor is that of its highest rate, a lower bound, and ``reached`` False.
    """
    best = []
    for point in sorted(uniform_curve, key=lambda point: (point.rate, -point.accuracy)):
        if not best or point.accuracy > best[-1].accuracy:
            best.append(point)
    if selective.accuracy > best[-1].accuracy:
        return max(point.rate for point in uniform_curve) / selective.rate, False
    after = next(i for i, point in enumerate(best) if point.accuracy >= selective.accuracy)
    if after == 0:
        return best[0].rate / selective.rate, True
    low, high = best[after - 1], best[after]
    share = (selective.accuracy - low.accuracy) / (high.accuracy - low.accuracy)
    needed = np.exp((1 - share) * np.log(low.rate) + share * np.log(high.rate))
    return float(needed / selective.rate), True
