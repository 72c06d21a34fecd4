"""Selective decoding: turn a stream of embeddings into words only where its meaning changes.

Online.  A segment is a stretch of frames with one meaning.  With each frame the newest k frames, for
every k up to a window, are compared with the segment before them (mean s of k frames, mean a of n):

    surprise  Z = (F − 1) √(D/2),   F = (n k / (n + k)) ‖s − a‖² / σ²
    drift     1 − s·a / √((‖s‖² − σ²/k)(‖a‖² − σ²/n))

F is Ward's cost of splitting there in units of noise, a generalised likelihood ratio.  Where nothing changed
its mean is 1 and its standard deviation √(2/D), whatever n and k, so Z counts standard deviations.  The
drift is the cosine distance of the two means once the noise is taken off their lengths.  A split is made
where Z says that there is a change and the drift that it matters; the k with the largest Z says which frames
are new, and their mean is what is decoded.  So without noise a change is seen in its first frame, and with
noise as soon as enough frames speak for it.

The noise is estimated from differences δ_t = x_t − x_{t−1} as the stream runs, with its covariance Σ:
σ² = tr Σ = ½ E‖δ_t‖², and its number of dimensions D = (tr Σ)² / tr Σ², tr Σ² = ¼ E(δ_t·δ_{t−2})².

Offline (VL-JEPA §selective decoding): agglomerative clustering of adjacent segments by Ward's criterion.
"""

import dataclasses
import heapq
import math

import numpy as np

from xuracore.errors import ConfigError, FormatError, ShapeError

_SHRINK = 0.1  # a mean's squared length keeps at least this share when its noise is taken off
_TINY = 1e-12
_FEW = 10  # frames before the noise's number of dimensions is trusted
_SCALES = (0.1, 10.0)  # how far the controller may move the thresholds


@dataclasses.dataclass(frozen=True)
class SelectiveConfig:
    """When to decode."""

    drift: float = 0.1  # above which a change matters
    surprise: float = 5.0  # standard deviations above which it is no noise
    window: int = 16  # newest frames among which the change is looked for
    min_gap: int = 1  # frames between two decodes, at least
    target_rate: float | None = None  # decodes a frame: both thresholds are then moved to meet it
    gain: float = 0.5  # how fast they move
    memory: float = 0.02  # share of the newest frame in the estimate of the noise

    def __post_init__(self):
        if not 0 < self.drift < 2 or not self.surprise > 0:
            raise ConfigError(f"SelectiveConfig needs 0 < drift < 2 and surprise > 0, got {self.drift} and "
                              f"{self.surprise}")
        if self.window < 1 or self.min_gap < 1:
            raise ConfigError("SelectiveConfig needs window ≥ 1 and min_gap ≥ 1")
        if self.target_rate is not None and not 0 < self.target_rate <= 1:
            raise ConfigError(f"target_rate is decodes a frame, in (0, 1], not {self.target_rate}")
        if not 0 < self.gain <= 10 or not 0 < self.memory <= 1:
            raise ConfigError("SelectiveConfig needs 0 < gain ≤ 10 and 0 < memory ≤ 1")


@dataclasses.dataclass(frozen=True)
class Decode:
    """A moment at which the stream should be put into words."""

    frame: int  # index of the newest frame
    start: int  # index of the first frame of the new segment
    embedding: np.ndarray  # (d,) unit length: the mean of the new segment's frames
    drift: float  # of the split; 0 for the first frame
    surprise: float  # of the split; 0 for the first frame


class SelectiveDecoder:
    """Watches a stream frame by frame.

    Args:
        config: ``SelectiveConfig``.
    """

    def __init__(self, config=SelectiveConfig()):
        self.config = config
        self.reset()

    def reset(self):
        """Forget the stream: the next frame is a first one."""
        self.frames = self.decodes = 0  # seen, and decoded
        self.scale = 1.0  # of the thresholds, moved by the controller
        self._noise, self._spread, self._since = 0.0, 0.0, 0  # tr Σ, tr Σ²; frames since the last decode
        self._recent, self._sum, self._count = None, None, 0  # newest frames; the segment's sum and length

    @property
    def rate(self):
        """Decodes a frame so far."""
        return self.decodes / max(self.frames, 1)

    def push(self, embedding):
        """Look at the next frame.

        Args:
            embedding: (d,), any length but zero.

        Returns:
            ``Decode`` if the stream should be decoded now, else None.  The first frame always is.

        Raises:
            ShapeError: not a vector, or of another width than the frames before.
            FormatError: zero, NaN or Inf.
        """
        x = self._unit(embedding)
        first = self._recent is None
        if first:
            self._recent, self._sum = x[None, :], np.zeros_like(x)
        else:
            self._recent = np.concatenate([self._recent[-self._kept:], x[None, :]])
            self._measure_noise()
        self._sum = self._sum + x
        self._count += 1
        self._since += 1
        self.frames += 1
        decode = self._begin(1, 0.0, 0.0) if first else self._split()
        if self.config.target_rate is not None and not first:
            step = self.config.gain * ((decode is not None) - self.config.target_rate)
            self.scale = min(max(self.scale * math.exp(step), _SCALES[0]), _SCALES[1])
        return decode

    @property
    def _kept(self):
        return max(self.config.window - 1, 3)  # frames before the newest; the noise needs three

    def _measure_noise(self):
        # Running means that start as plain ones, so that the first value is not taken for zero.
        differences = np.diff(self._recent[-4:], axis=0)
        share = max(self.config.memory, 1.0 / self.frames)
        self._noise += share * (0.5 * float(differences[-1] @ differences[-1]) - self._noise)
        if len(differences) == 3:
            share = max(self.config.memory, 1.0 / (self.frames - 2))
            self._spread += share * (0.25 * float(differences[2] @ differences[0]) ** 2 - self._spread)

    def _split(self):
        longest = min(self.config.window, len(self._recent), self._count - 1)
        if longest < 1 or self._since < self.config.min_gap:
            return None
        k = np.arange(1, longest + 1)
        n = self._count - k
        newest = np.cumsum(self._recent[::-1][:longest], axis=0)  # (longest, d), sums of the newest k
        s, a = newest / k[:, None], (self._sum - newest) / n[:, None]
        ratio = k * n / (k + n) * np.sum((s - a) ** 2, axis=1) / max(self._noise, _TINY)
        best = int(np.argmax(ratio))
        drift = _drift(s[best], a[best], self._noise / k[best], self._noise / n[best])
        # Before there are differences enough, few dimensions are assumed: a high threshold.
        few = self.frames < _FEW
        dimensions = 1.0 if few else min(max(self._noise**2 / max(self._spread, _TINY), 1.0), s.shape[1])
        surprise = (float(ratio[best]) - 1.0) * math.sqrt(dimensions / 2)
        if drift <= self.config.drift * self.scale or surprise <= self.config.surprise * self.scale:
            return None
        return self._begin(best + 1, drift, surprise)

    def _begin(self, k, drift, surprise):
        """A new segment that consists of the newest k frames."""
        self._sum, self._count, self._since = self._recent[-k:].sum(axis=0), k, 0
        self.decodes += 1
        newest = self.frames - 1
        mean = self._sum / max(float(np.linalg.norm(self._sum)), _TINY)
        return Decode(newest, newest - k + 1, mean, drift, surprise)

    def _unit(self, embedding):
        x = np.asarray(embedding, dtype=np.float64)
        if x.ndim != 1 or x.size == 0:
            raise ShapeError(f"a frame's embedding has shape (d,), got {x.shape}")
        if self._recent is not None and x.size != self._recent.shape[1]:
            raise ShapeError(f"frame {self.frames} has width {x.size}; those before have "
                             f"{self._recent.shape[1]}")
        length = float(np.linalg.norm(x))
        if not math.isfinite(length) or length == 0.0:
            raise FormatError(f"the embedding of frame {self.frames} is zero or not finite")
        return x / length

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self):
        """Everything needed to go on later, as arrays: ``{name: ndarray}``."""
        state = {"counters": np.array([self.frames, self.decodes, self._since, self._count], np.int64),
                 "levels": np.array([self.scale, self._noise, self._spread], np.float64)}
        if self._recent is not None:
            state |= {"recent": self._recent.copy(), "sum": self._sum.copy()}
        return state

    def load_state_dict(self, state):
        """Go on from ``state_dict()``; raises FormatError where it makes no sense."""
        try:
            frames, decodes, since, count = (int(value) for value in state["counters"])
            scale, noise, spread = (float(value) for value in state["levels"])
            recent, total = state.get("recent"), state.get("sum")
            empty = recent is None and total is None and frames == 0
            full = (not empty and recent.ndim == 2 and total.shape == recent.shape[1:]
                    and 1 <= len(recent) <= self._kept + 1 and np.isfinite(recent).all()
                    and np.isfinite(total).all())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"the state of a selective decoder is damaged: {error}") from None
        sound = (math.isfinite(scale) and noise >= 0 and spread >= 0
                 and min(frames, decodes, since, count) >= 0)
        if not (empty or full) or not sound:
            raise FormatError("the state of a selective decoder does not fit together")
        self.reset()
        self.frames, self.decodes, self._since, self._count = frames, decodes, since, count
        self.scale, self._noise, self._spread = scale, noise, spread
        if full:
            self._recent, self._sum = recent.astype(np.float64), total.astype(np.float64)


def _drift(s, a, noise_s, noise_a):
    """Cosine distance of two means, whose squared lengths hold so much noise."""
    ss, aa = float(s @ s), float(a @ a)
    length = math.sqrt(max(ss - noise_s, _SHRINK * ss) * max(aa - noise_a, _SHRINK * aa))
    return 1.0 - float(s @ a) / max(length, _TINY)


# ---------------------------------------------------------------------------------------------
# Offline
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Segment:
    """Frames ``start`` to ``stop`` (exclusive) with one meaning."""

    start: int
    stop: int
    embedding: np.ndarray  # (d,) mean of the frames

    @property
    def middle(self):
        """The frame at which the segment is best decoded."""
        return (self.start + self.stop - 1) // 2


def ward_segments(embeddings, count=None, threshold=None):
    """Cut a whole stream into segments (greedy, exact): merge the cheapest neighbours until done.

    The cost of merging neighbours with n_a and n_b frames is Ward's
    ``n_a n_b / (n_a + n_b) · ‖μ_a − μ_b‖²``; a heap makes it O(T log T).

    Args:
        embeddings: (T, d).
        count: stop at this many segments.
        threshold: stop when the cheapest merge costs more.  Exactly one of the two is given.

    Returns:
        ``[Segment]`` in order, covering all frames.

    Raises:
        ShapeError: not (T, d) with T ≥ 1.
        FormatError: NaN or Inf.
        ConfigError: not exactly one of count and threshold, or out of range.
    """
    x = np.asarray(embeddings, dtype=np.float64)
    if x.ndim != 2 or 0 in x.shape:
        raise ShapeError(f"embeddings have shape (frames, width), got {x.shape}")
    if not np.isfinite(x).all():
        raise FormatError("the embeddings hold NaN or Inf")
    if (count is None) == (threshold is None):
        raise ConfigError("give exactly one of count and threshold")
    if count is not None and not 1 <= count <= len(x) or threshold is not None and not threshold >= 0:
        raise ConfigError(f"count must be in 1..{len(x)} and threshold ≥ 0, got {count} and {threshold}")

    frames, sums = len(x), x.copy()
    stop = list(range(1, frames + 1))  # of the segment that starts here
    left = list(range(-1, frames - 1))  # start of the segment before
    version = [0] * frames  # changes when a segment does: older entries of the heap are void

    def cost(a, b):
        na, nb = b - a, stop[b] - b
        difference = sums[a] / na - sums[b] / nb
        return na * nb / (na + nb) * float(difference @ difference)

    heap = [(cost(a, a + 1), a, a + 1, 0, 0) for a in range(frames - 1)]
    heapq.heapify(heap)
    remaining, most = frames, 1 if count is None else count
    while remaining > most:
        price, a, b, version_a, version_b = heapq.heappop(heap)
        if version[a] != version_a or version[b] != version_b:
            continue
        if threshold is not None and price > threshold:
            break
        sums[a] += sums[b]
        stop[a], version[b] = stop[b], -1
        version[a] += 1
        remaining -= 1
        after, before = stop[a], left[a]
        if after < frames:
            left[after] = a
            heapq.heappush(heap, (cost(a, after), a, after, version[a], version[after]))
        if before >= 0:
            heapq.heappush(heap, (cost(before, a), before, a, version[before], version[a]))

    segments, start = [], 0
    while start < frames:
        segments.append(Segment(start, stop[start], sums[start] / (stop[start] - start)))
        start = stop[start]
    return segments


def boundary_f1(found, true, tolerance):
    """F1 of found boundaries: each matches at most one true boundary within ``tolerance`` frames.

    Args:
        found, true: frame indices.
        tolerance: frames.

    Returns:
        2 TP / (found + true); 1 where there is nothing to find and nothing was found.
    """
    found, true = sorted(found), sorted(true)
    if not found and not true:
        return 1.0
    hits = i = j = 0
    while i < len(found) and j < len(true):
        if abs(found[i] - true[j]) <= tolerance:
            hits, i, j = hits + 1, i + 1, j + 1
        elif found[i] < true[j]:
            i += 1
        else:
            j += 1
    return 2 * hits / (len(found) + len(true))
