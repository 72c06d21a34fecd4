"""ConfusionMonitor: the probability that the present answer is wrong.

An answer that changes when the picture is moved by a few pixels cannot be trusted.  So the question is read
for moved views of the picture as well, and the monitor starts from their agreement p̄, the probability of the
answer averaged over the views:

    z = a · log((1 - p̄) / p̄) + b + network(features)

The network sees the pooled READ features, a few numbers that say how sure the reading is, and how familiar
the picture: distance of the visual tokens from those of the training pictures.  With no more than a and b it
ranks answers as the averaged softmax does; it learns what that does not know.  It is trained on answers to
questions the model has not seen, and calibrated on a second such set: p(wrong) = σ(z / T + c).
"""

import re
from dataclasses import dataclass

import numpy as np

from xuracore import nn, no_grad, ops
from xuracore.config import Config, require, require_positive
from xuracore.errors import ShapeError
from xuracore.tensor import Tensor

NUMBERS = ("agreement", "top probability", "top cosine", "margin", "entropy", "entropy over views",
           "spread of views", "gate", "strangeness of [CLS]", "mean strangeness of patches",
           "greatest strangeness of a patch", "depth", "state change")
UNCHARTED = 0.9  # least p(wrong) for a picture unlike all that the monitor was calibrated on
FOREIGN = 0.5  # the same for a question in words that no training had: it may ask for what the model never learned
LEAST = 1e-7  # probability, and its distance from 1, beyond which log odds do not grow


@dataclass(frozen=True)
class MonitorConfig(Config):
    """``read_dim``: width of the pooled READ features; ``vision_dim``: of the visual tokens; ``shift``: pixels by
    which the picture is moved to see whether the answer stays, 0 for no views beside the picture itself."""

    read_dim: int = 96
    vision_dim: int = 96
    hidden: int = 128
    shift: int = 2

    def __post_init__(self):
        require_positive(self, "read_dim", "vision_dim", "hidden")
        require(self.shift >= 0, f"shift is {self.shift}; expected 0 or more pixels")


def words_of(texts):
    """The different words of ``texts``, in alphabetical order; numbers are no words."""
    return tuple(sorted({word for text in texts for word in re.findall(r"[^\W\d_]+", text.lower())}))


def foreign_words(question, known):
    """The words of ``question`` that are not among ``known``; none where nothing is known."""
    return [word for word in words_of([question]) if word not in known] if known else []


def views(pixels, shift):
    """pixels (B, …, H, W) → (B, views, …, H, W): the picture, and moved along its diagonal, edges repeated."""
    if not shift:
        return pixels[:, None]
    wide = np.pad(pixels, [(0, 0)] * (pixels.ndim - 2) + [(shift, shift)] * 2, mode="edge")
    moved = wide[..., 2 * shift :, 2 * shift :], wide[..., : -2 * shift, : -2 * shift]
    return np.stack([pixels, *moved], axis=1)


class Familiarity(nn.Module):
    """Mean and spread of visual tokens over the training pictures, [CLS] and patches apart."""

    def __init__(self, dim):
        for name in ("cls", "patch"):
            self.register_buffer(f"{name}_mean", np.zeros(dim, np.float32))
            self.register_buffer(f"{name}_std", np.ones(dim, np.float32))

    def fit(self, visual):
        """Remember the visual tokens (n, 1 + patches, d) of n pictures."""
        for name, tokens in (("cls", visual[:, 0]), ("patch", visual[:, 1:].reshape(-1, visual.shape[2]))):
            getattr(self, f"{name}_mean")[:] = tokens.mean(axis=0, dtype=np.float64)
            getattr(self, f"{name}_std")[:] = tokens.std(axis=0, dtype=np.float64) + 1e-6

    def forward(self, visual):
        """(B, 1 + patches, d) → (B, 3): log mean squared z-score of [CLS], of all patches, of the worst."""
        visual = visual.astype(np.float64)  # the square of a far-off float32 would be infinite
        cls = np.square((visual[:, 0] - self.cls_mean) / self.cls_std).mean(axis=-1)
        patches = np.square((visual[:, 1:] - self.patch_mean) / self.patch_std).mean(axis=-1)
        return np.log(np.stack([cls, patches.mean(axis=1), patches.max(axis=1)], axis=1) + 1e-6)


class ConfusionMonitor(nn.Module):
    """features (B, read_dim + len(NUMBERS)) → logit of "wrong" (B,)."""

    def __init__(self, config, *, rng=None):
        rng = np.random.default_rng(0) if rng is None else rng
        self.config = config
        width = config.read_dim + len(NUMBERS)
        self.familiarity = Familiarity(config.vision_dim)
        self.register_buffer("feature_mean", np.zeros(width, np.float32))
        self.register_buffer("feature_std", np.ones(width, np.float32))
        self.register_buffer("temperature", np.ones((), np.float32))
        self.register_buffer("offset", np.zeros((), np.float32))
        # finite, because files and reports want numbers; far above what any picture reaches
        self.register_buffer("strangest_known", np.full((), 1e6, np.float32))
        self.hidden = nn.Linear(width, config.hidden, rng=rng)
        self.output = nn.Linear(config.hidden, 1, rng=rng)
        self.output.weight.data[:] = 0  # at first nothing but the agreement counts
        self.trust = nn.Parameter(np.ones(1, np.float32))

    def fit_scale(self, features):
        """Remember mean and spread of the features, so that the network sees unit scales."""
        self.feature_mean[:] = features.mean(axis=0, dtype=np.float64)
        self.feature_std[:] = features.std(axis=0, dtype=np.float64) + 1e-3

    def forward(self, features, keep=None):
        """keep : (B, hidden) factors of the hidden units, with which training leaves some out."""
        scaled = np.clip((features - self.feature_mean) / self.feature_std, -8, 8).astype(np.float32)
        h = ops.silu(self.hidden(Tensor(scaled)))
        if keep is not None:
            h = h * keep
        agreement = np.clip(features[:, self.config.read_dim], -20, 20).astype(np.float32)
        return self.output(h).reshape(-1) + self.trust * agreement

    def calibrate(self, logits, wrong):
        """Choose temperature and offset that minimise the negative log-likelihood on a second set (Platt scaling).

        logits (n,), wrong (n,) in {0, 1}.  Golden-section search over log T in ±3, and for each T bisection
        over the offset in ±20, at which the mean probability is the share of wrong answers.
        ShapeError if the two differ in length, or there are none.
        """
        logits, wrong = np.asarray(logits, np.float64), np.asarray(wrong)
        if logits.ndim != 1 or logits.shape != wrong.shape or not len(logits):
            raise ShapeError(f"calibration needs a label for each logit: {wrong.shape} for {logits.shape}")

        def offset(z):
            low, high = -20.0, 20.0
            while high - low > 1e-5:
                middle = (low + high) / 2
                low, high = (middle, high) if _logistic(z + middle).mean() < wrong.mean() else (low, middle)
            return (low + high) / 2

        def loss(log_t):
            z = logits / np.exp(log_t)
            z = z + offset(z)
            return np.mean(np.logaddexp(0, z) - wrong * z)

        low, high, ratio = -3.0, 3.0, (5**0.5 - 1) / 2
        while high - low > 1e-3:
            a, b = high - ratio * (high - low), low + ratio * (high - low)
            low, high = (low, b) if loss(a) < loss(b) else (a, high)
        self.temperature[...] = np.exp((low + high) / 2)
        self.offset[...] = offset(logits / float(self.temperature))

    def fit_limit(self, features):
        """Remember the strangest picture of ``features`` (n, f): beyond it nothing was calibrated."""
        self.strangest_known[...] = features[:, self._strangeness].max()

    @property
    def _strangeness(self):
        return self.config.read_dim + NUMBERS.index("mean strangeness of patches")

    @no_grad()
    def p_wrong(self, features):
        """Calibrated probability (B,) that the answer is wrong; 1 for features that are not numbers.

        For a picture stranger than any that the calibration saw it is at least ``UNCHARTED``: the network
        was never asked to extrapolate, and must not sound sure where it does.
        """
        p = _logistic(self(features).data.astype(np.float64) / float(self.temperature) + float(self.offset))
        beyond = features[:, self._strangeness] > float(self.strangest_known)
        return np.where(np.isnan(p), 1.0, np.where(beyond, at_least(UNCHARTED, p), p))


def at_least(least, p):
    """Probabilities p raised above ``least``, in the same order as before."""
    return least + (1 - least) * p


def _logistic(z):
    return 0.5 + 0.5 * np.tanh(0.5 * z)  # without overflow


def _softmax(cosines, scale):
    logits = cosines.astype(np.float64) * scale
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def _entropy(p):
    return -(p * np.log(p + 1e-12)).sum(axis=-1)


def _log_odds_against(p):
    p = np.clip(p, LEAST, 1 - LEAST)
    return np.log1p(-p) - np.log(p)


def monitor_features(pooled, cosines, scale, gate, strangeness, depth=0, change=0.0, moved=()):
    """What the monitor looks at, (B, read_dim + len(NUMBERS)) float32.

    pooled (B, d), cosines (B, answers), scale: inverse temperature of the answers' softmax, gate (B,) mean
    gate, strangeness (B, 3) of :class:`Familiarity`, depth: tool calls so far, change: of the state, by them,
    moved: (B, answers) cosines for each moved view of the picture.
    The numbers are cut at ± a million, so that no division by almost nothing makes them infinite.
    """
    if not cosines.shape[1]:
        raise ShapeError("there are no known answers to compare with")
    batch = len(pooled)
    ranked = np.sort(cosines, axis=1)
    second = ranked[:, -2] if ranked.shape[1] > 1 else np.full(batch, -1.0)
    each = np.stack([_softmax(one, scale) for one in (cosines, *moved)])
    mean, said = each.mean(axis=0), (np.arange(batch), cosines.argmax(axis=1))
    apart = _entropy(mean) - _entropy(each).mean(axis=0)  # mutual information of view and answer
    columns = [_log_odds_against(mean[said]), _log_odds_against(each[0][said]), ranked[:, -1],
               ranked[:, -1] - second, np.log(_entropy(each[0]) + 1e-6), np.log(_entropy(mean) + 1e-6),
               np.log(np.maximum(apart, 0) + 1e-6), gate, *strangeness.T, np.full(batch, depth),
               np.broadcast_to(change, batch)]
    numbers = np.clip(np.stack(columns, axis=1), -1e6, 1e6)
    return np.concatenate([pooled, numbers], axis=1).astype(np.float32)
