"""Consolidation: what a level holds is condensed into the next slower one, and the result is checked.

Slots of a level are clustered by the direction of their keys; each cluster's centroid, weighted by usage, is
written one level up, over a slot with nearly the same key or else the least used one.  Levels have different
widths, so a content moves by what the model would read of it: v' = U'⁺ U v, with the read projections U.
"""

from typing import NamedTuple

import numpy as np

from xuracore.config import require
from xuramamba.wavecore.memory import in_use
from xuramamba.wavecore.model import CoreState


class Report(NamedTuple):
    """Recall at the level before and after, and one level up once the level is wiped; shares of the items."""

    items: int
    recall_before: float
    recall_after: float
    recall_above: float

    @property
    def validated(self):
        """Recall fell by 2 % at most, and 90 % can be recalled one level up."""
        return self.items > 0 and self.recall_before - self.recall_after <= 0.02 and self.recall_above >= 0.9


def clusters(keys, similarity):
    """Group unit keys (n, d_k) greedily: a list of index arrays, each around its first member."""
    rest, groups = list(range(len(keys))), []
    while rest:
        near = keys[rest] @ keys[rest[0]] > similarity
        near[0] = True
        groups.append(np.array([i for i, close in zip(rest, near) if close]))
        rest = [i for i, close in zip(rest, near) if not close]
    return groups


def consolidate(model, params, state, level):
    """The CoreState after level ``level`` was condensed into ``level + 1``; the level itself stays.

    ConfigError for the slowest level.
    """
    c = model.config
    require(0 <= level < c.num_levels - 1, f"level={level}; expected 0 … {c.num_levels - 2}: the slowest has no next")
    memories, keys, usage = ([np.array(x) for x in part] for part in state[3:])
    below, above = (_kernel(params, i) for i in (level, level + 1))
    carry = np.linalg.pinv(above.T.astype(np.float64)) @ below.T  # (d_above, d_below)
    for b in range(len(keys[level])):
        used = np.flatnonzero(in_use(keys[level][b : b + 1])[0])
        for group in clusters(keys[level][b, used], c.cms_merge_similarity):
            members = used[group]
            weight = usage[level][b, members] + 1e-6
            weight = weight / weight.sum()
            key = weight @ keys[level][b, members]
            key /= np.linalg.norm(key)
            value = carry @ (weight @ memories[level][b, members])
            near = np.where(in_use(keys[level + 1][b : b + 1])[0], keys[level + 1][b] @ key, -np.inf)
            j = near.argmax() if near.max() > c.cms_merge_similarity else usage[level + 1][b].argmin()
            memories[level + 1][b, j], keys[level + 1][b, j] = value, key
            usage[level + 1][b, j] = max(usage[level + 1][b, j], usage[level][b, members].max(), 1e-3)
    return CoreState(*state[:3], memories, keys, usage)


def _kernel(params, level):
    leaf = params["cms"]["levels"][str(level)]["kernel"]
    return np.asarray(getattr(leaf, "data", leaf))


def wipe(state, level):
    """The CoreState with one level emptied."""
    parts = [[np.zeros_like(x) if i == level else x for i, x in enumerate(part)] for part in state[3:]]
    return CoreState(*state[:3], *parts)


def recall(model, params, state, level, items, sharpness=40.0):
    """Share of items (row, key, projected content) that a sharp query for the key brings back at ``level``.

    Brought back is what has a cosine of 0.9 with the content, both as the model sees them.
    """
    hits = 0
    for row, key, content in items:
        used = in_use(state.keys[level][row : row + 1])[0]
        if not used.any():
            continue
        logits = np.where(used, sharpness * (state.keys[level][row] @ key), -np.inf)
        weights = np.exp(logits - logits.max())
        found = (weights / weights.sum()) @ state.memories[level][row] @ _kernel(params, level)
        size = np.linalg.norm(found) * np.linalg.norm(content)
        hits += bool(size > 0 and found @ content / size >= 0.9)
    return hits / len(items) if items else 0.0


def validate(model, params, state, level, important=0.5):
    """Consolidate ``level`` and measure: (the new CoreState, Report).

    important : share of the slots in use, by usage, that have to be found again.
    """
    state = CoreState(*([np.asarray(x) for x in part] if isinstance(part, list) else part for part in state.detach()))
    items = []
    for row in range(len(state.keys[level])):
        used = np.flatnonzero(in_use(state.keys[level][row : row + 1])[0])
        ranked = used[np.argsort(-state.usage[level][row, used], kind="stable")]
        for slot in ranked[: int(np.ceil(important * len(ranked)))]:
            content = state.memories[level][row, slot] @ _kernel(params, level)
            items.append((row, state.keys[level][row, slot], content))
    after = consolidate(model, params, state, level)
    return after, Report(
        len(items), recall(model, params, state, level, items), recall(model, params, after, level, items),
        recall(model, params, wipe(after, level), level + 1, items))
