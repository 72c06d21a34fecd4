"""Whether the embeddings use their space, or have collapsed onto a few directions.

The predictor's embeddings of the measured questions, the Y-Encoder's of their distinct answers, and the X-Encoder's
mean token per picture.  Intervals come from a jackknife over tenths of the pictures: a bootstrap repeats rows, and
repeated rows have a lower rank.
"""

import numpy as np

from training import metrics
from training.evaluation.answering import encode_texts

LEAST_RANK = 0.05  # share of the dimensions
GREATEST_COSINE = 0.95
MOST_ROWS = 4000  # that are looked at, drawn at random
MOST_PAIRED = 1000  # of them whose pairs are compared


def measure(model, answers, features, intervals):
    """{"predictor", "y_encoder", "x_encoder": {…}, "alignment", "alarms": [texts]}."""
    texts = sorted({row.answer for row in answers.rows})
    place = {text: i for i, text in enumerate(texts)}
    targets = encode_texts(model, texts)
    spread = intervals.rng("health").permutation(len(answers.rows))[:MOST_ROWS]
    predicted, pictures = answers.embedding[spread], answers.pictures[spread]
    wanted = targets[[place[answers.rows[i].answer] for i in spread]]
    seen = features.tokens[:MOST_ROWS].astype(np.float32).mean(axis=1)
    result = {
        "predictor": describe(predicted, pictures, intervals),
        "y_encoder": describe(targets[intervals.rng("texts").permutation(len(texts))[:MOST_ROWS]], None, intervals),
        "x_encoder": describe(seen, np.arange(len(seen)), intervals),
        "alignment": intervals.jackknife(
            lambda rows: metrics.alignment(predicted[rows], wanted[rows]), len(predicted), pictures),
    }
    result["alarms"] = [
        text for name, kind in (("predictor", "predicted embeddings"), ("y_encoder", "embeddings of the answers"))
        for text in alarms(result[name], kind, len(texts))]
    return result


def describe(x, pictures, intervals):
    """{"rank", "cosine", "uniformity" (values with intervals), "deviation", "dead", "dimensions", "rows"}.

    x (n, D).  deviation: smallest, median and greatest standard deviation of a dimension, times √D (unit vectors
    spread evenly have 1).   dead: dimensions below a tenth of that.   pictures None: no intervals.
    """
    x = np.asarray(x, dtype=np.float64)
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    deviation = np.sort(unit.std(axis=0)) * np.sqrt(x.shape[1])
    paired = unit[:MOST_PAIRED]
    return {
        "dimensions": x.shape[1], "rows": len(x),
        "rank": intervals.jackknife(lambda rows: metrics.effective_rank(unit[rows]), len(x), pictures),
        "cosine": intervals.jackknife(lambda rows: metrics.mean_cosine(unit[rows]), len(x), pictures),
        "uniformity": intervals.jackknife(lambda rows: metrics.uniformity(paired[rows]), len(paired),
                                          None if pictures is None else pictures[: len(paired)]),
        "deviation": [float(deviation[0]), float(np.median(deviation)), float(deviation[-1])],
        "dead": int((deviation < 0.1).sum()),
    }


def alarms(described, kind, distinct):
    """Texts: what in ``describe``'s result speaks of collapse, where ``distinct`` different answers are expected.

    The least rank is 5 % of the dimensions, or (distinct - 1) / 2 where that is less: two answers need but a line.
    """
    found = []
    least = min(LEAST_RANK * described["dimensions"], (distinct - 1) / 2)
    rank, cosine = described["rank"]["value"], described["cosine"]["value"]
    if rank < least:
        found.append(f"the {kind} have an effective rank of {rank:.1f} of {described['dimensions']} dimensions, "
                     f"below {least:.1f}: they have collapsed onto a few directions")
    if distinct > 1 and cosine > GREATEST_COSINE:
        found.append(f"the {kind} have a mean cosine of {cosine:.3f}, above {GREATEST_COSINE}: they nearly all point "
                     f"the same way")
    return found
