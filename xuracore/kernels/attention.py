"""What stands between the matrix products of attention, on one tile of scores.

A tile holds the scores of a block of queries with a block of keys, for a few heads: ``(rows, keys)``, where ``rows``
is heads × queries and row i belongs to query ``i % queries`` of the block.  With online softmax (Milakov & Gimelshein
2018; Dao et al. 2022) the tiles of one block of queries are visited one after the other:

    m' = max(m, max_j s_j),   p_j = e^(s_j - m'),   l' = l e^(m - m') + Σ_j p_j

and what was summed so far shrinks by the same e^(m - m').  The backward pass has the logarithm z of the whole sum
from the forward pass:   p = e^(s - z),   ds = p (dp - δ).

Row i sees the keys before ``visible + i % queries``, at most all of the tile; the others get weight zero.
Scores of -inf have weight exactly zero, and so has everything in a row that sees nothing.
"""

import numpy as np

from xuracore.jit import REDUCE, kernel
from xuracore.kernels.fastmath import exp, order, unorder
from xuracore.kernels.softmax import LOWEST


def _hidden(scores, queries, visible):
    """(rows, keys) bool: the keys a row does not see."""
    rows, keys = scores.shape
    return np.arange(keys) >= visible + np.arange(rows)[:, None] % queries


def attention_weights_numpy(scores, queries, visible, top, total, shrink):
    """scores (rows, keys) become weights; top and total (rows,) are carried on, shrink (rows,) is e^(m - m').

    Before the first tile top is -inf and total 0.
    """
    scores[_hidden(scores, queries, visible)] = -np.inf
    new = np.maximum(top, scores.max(axis=1, initial=-np.inf))
    base = np.where(new == -np.inf, 0, new).astype(top.dtype)
    shrink[...] = np.exp(top - base)
    np.exp(scores - base[:, None], out=scores)
    total *= shrink
    total += scores.sum(axis=1)
    top[...] = new


@kernel(twin=attention_weights_numpy, fastmath=REDUCE)
def attention_weights(scores, queries, visible, top, total, shrink):
    rows, keys = scores.shape
    number = scores.dtype.type
    zero, lowest, nothing = number(0), number(LOWEST), number(-np.inf)
    for i in range(rows):
        seen = max(0, min(keys, visible + i % queries))
        before = top[i]
        best = order(before)
        for j in range(seen):
            place = order(scores[i, j])
            best = place if place > best else best
        new = unorder(before, best)
        base = zero if new == nothing else new
        for j in range(seen):
            shifted = scores[i, j] - base
            e = exp(shifted)
            scores[i, j] = zero if shifted < lowest else e
        for j in range(keys - seen):
            scores[i, seen + j] = zero
        added = zero
        for j in range(keys):
            added += scores[i, j]
        less = zero if before - base < lowest else exp(before - base)
        top[i] = new
        total[i] = total[i] * less + added
        shrink[i] = less


def attention_gradient_numpy(scores, slope, queries, visible, log_sum, delta):
    """scores become weights, slope (rows, keys) from dp to ds; log_sum, delta (rows,)."""
    scores[_hidden(scores, queries, visible)] = -np.inf
    np.exp(scores - log_sum[:, None], out=scores)
    slope -= delta[:, None]
    slope *= scores


@kernel(twin=attention_gradient_numpy)
def attention_gradient(scores, slope, queries, visible, log_sum, delta):
    rows, keys = scores.shape
    number = scores.dtype.type
    zero, lowest = number(0), number(LOWEST)
    for i in range(rows):
        seen = max(0, min(keys, visible + i % queries))
        base, mean = log_sum[i], delta[i]
        for j in range(seen):
            shifted = scores[i, j] - base
            e = exp(shifted)
            p = zero if shifted < lowest else e
            scores[i, j] = p
            slope[i, j] = p * (slope[i, j] - mean)
        for j in range(keys - seen):
            scores[i, seen + j] = zero
            slope[i, seen + j] = zero
