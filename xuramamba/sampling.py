"""Choosing the next token from its logits."""

import numpy as np

from xuracore.errors import ConfigError


def choose(logits, temperature=0.0, top_k=None, top_p=None, rng=None):
    """Token ids (B,) for ``logits`` (B, V).

    temperature 0 takes the best; above 0 draws with ``rng`` from softmax(logits / temperature), after
    keeping only the ``top_k`` best, and only the smallest set that has ``top_p`` of the probability
    (nucleus sampling, arXiv 1904.09751).  Raises ConfigError for values out of range.
    """
    if temperature < 0 or not np.isfinite(temperature):
        raise ConfigError(f"temperature={temperature}; expected 0 or more")
    if temperature == 0:
        return logits.argmax(axis=-1)
    if rng is None:
        raise ConfigError("temperature above 0 needs rng, a numpy.random.Generator")
    probability = filtered_probabilities(logits, temperature, top_k, top_p)
    threshold = rng.random((len(logits), 1)) * probability.sum(axis=-1, keepdims=True)
    return (probability.cumsum(axis=-1) <= threshold).sum(axis=-1).clip(max=logits.shape[-1] - 1)


def filtered_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    """Probabilities (B, V) in float64 after temperature, top-k and top-p; they sum to 1."""
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k={top_k}; expected at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p={top_p}; expected above 0, at most 1")
    scaled = logits.astype(np.float64) / temperature
    probability = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    order = np.argsort(-probability, axis=-1, kind="stable")
    ranked = np.take_along_axis(probability, order, axis=-1)
    keep = np.ones(ranked.shape, bool)
    if top_k is not None:
        keep[:, top_k:] = False
    if top_p is not None:
        ranked = np.where(keep, ranked, 0)
        share = ranked.cumsum(axis=-1) / ranked.sum(axis=-1, keepdims=True)
        keep[:, 1:] &= share[:, :-1] < top_p
    kept = np.zeros_like(keep)
    np.put_along_axis(kept, order, keep, axis=-1)
    probability = np.where(kept, probability, 0)
    return probability / probability.sum(axis=-1, keepdims=True)
