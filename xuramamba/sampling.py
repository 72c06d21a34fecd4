"""Choosing the next token from its logits.

The order of the steps, and what each keeps, are those of transformers' logits processors: repetition
penalty, forbidden tokens, temperature, top-k, top-p.
"""

import numpy as np

from xuracore.errors import ConfigError


def choose(logits, temperature=0.0, top_k=None, top_p=None, rng=None):
    """Token ids (B,) for ``logits`` (B, V).

    temperature 0 takes the best; above 0 draws from softmax(logits / temperature), after
    keeping only the ``top_k`` best, and only the smallest set that has ``top_p`` of the probability
    (nucleus sampling, arXiv 1904.09751).
    rng : a numpy.random.Generator for all rows, or a list with one a row: a row then draws what it would
        draw alone.
    Raises ConfigError for values out of range, and for logits that are all forbidden or not numbers.
    """
    check_options(temperature, top_k, top_p)
    if temperature == 0:
        best = logits.argmax(axis=-1)
        _refuse_hopeless(np.take_along_axis(logits, best[:, None], axis=-1))
        return best
    if rng is None:
        raise ConfigError("temperature above 0 needs rng, a numpy.random.Generator")
    each = rng if isinstance(rng, (list, tuple)) else [rng] * len(logits)
    return np.array([_draw(row, temperature, top_k, top_p, g) for row, g in zip(logits, each, strict=True)], np.int64)


def check_options(temperature=0.0, top_k=None, top_p=None, repetition_penalty=1.0):
    """ConfigError for options that make no sense."""
    if not (isinstance(temperature, (int, float)) and temperature >= 0 and np.isfinite(temperature)):
        raise ConfigError(f"temperature={temperature}; expected 0 or more")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k={top_k}; expected at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p={top_p}; expected above 0, at most 1")
    if not (repetition_penalty > 0 and np.isfinite(repetition_penalty)):
        raise ConfigError(f"repetition_penalty={repetition_penalty}; expected above 0 (1 changes nothing)")


def _refuse_hopeless(best):
    if not np.isfinite(best).all():
        raise ConfigError("no token can be chosen: the logits are NaN, infinite, or all forbidden")


def _draw(logits, temperature, top_k, top_p, rng):
    """One id from one row (V,)."""
    candidates, probability = _candidates(logits, temperature, top_k, top_p)
    share = probability.cumsum()
    place = np.searchsorted(share, rng.random() * share[-1], side="right")
    return candidates[min(place, len(candidates) - 1)]


def _candidates(logits, temperature, top_k, top_p):
    """(ids, unnormalised float64 probabilities) of what is left to choose from, in order of ids.

    Only as many are sorted as it takes: sorting a vocabulary of 50 000 costs more than the matrix
    product of a small model.
    """
    _refuse_hopeless(logits.max())
    scaled = logits.astype(np.float64) / temperature
    probability = np.exp(scaled - scaled.max())
    ids = np.arange(len(logits))
    if top_k is not None and top_k < len(logits):
        ids = np.flatnonzero(scaled >= np.partition(scaled, -top_k)[-top_k])  # equals of the last stay
        probability = probability[ids]
    if top_p is not None and top_p < 1:
        kept = _nucleus(probability, top_p)
        ids, probability = ids[kept], probability[kept]
    return ids, probability


def _nucleus(probability, top_p):
    """Sorted places of the fewest, most probable ones that together have ``top_p`` of the sum."""
    wanted, count = top_p * probability.sum(), 256
    while True:
        count = min(count, len(probability))
        places = np.argpartition(-probability, count - 1)[:count]
        places = places[np.lexsort((places, -probability[places]))]
        share = probability[places].cumsum()
        if share[-1] >= wanted or count == len(probability):
            return np.sort(places[: 1 + np.count_nonzero(share[:-1] < wanted)])
        count *= 8


def filtered_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    """Probabilities (B, V) in float64 after temperature, top-k and top-p; they sum to 1."""
    check_options(temperature, top_k, top_p)
    result = np.zeros(logits.shape)
    for row, out in zip(logits, result):
        ids, probability = _candidates(row, temperature, top_k, top_p)
        out[ids] = probability / probability.sum()
    return result


def penalize_repetition(logits, seen, penalty):
    """Logits (V,) where ids in ``seen`` are less likely: divided by ``penalty`` above 0, multiplied below.

    Keskar et al. 2019 (arXiv 1909.05858), section 4.1.  Changes ``logits`` in place.
    """
    values = logits[seen]
    logits[seen] = np.where(values > 0, values / penalty, values * penalty)
