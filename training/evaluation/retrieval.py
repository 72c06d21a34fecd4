"""Retrieval both ways: which caption fits this picture, which picture fits this caption.

A picture's embedding is the answer predicted to one question (``CAPTION_QUERY``), a caption's is the Y-Encoder's.
Equal captions are one text, and a picture may have several: any of them counts as found.
"""

import math

import numpy as np

from training import metrics
from training.evaluation.answering import ask_each, encode_texts, plain, read
from training.phases.common import image_key
from xuracore.errors import ShapeError
from xuravljepa.model import CAPTION_QUERY

DEPTHS = (1, 5, 10)
ROWS = 256


def measure(model, rows, features, intervals, query=CAPTION_QUERY, report=None):
    """{"to_caption": …, "to_picture": …, "pictures", "captions"}, or {"skipped": why}.

    Each way: recall at 1, 5 and 10 (cells), "median" and "mean" rank with intervals, "chance" of each recall.
    """
    rows, long = readable(model, rows)
    texts = list(dict.fromkeys(plain(row.caption) for row in rows))
    shown = ask_each(rows, query)
    if long > len(rows):
        return {"skipped": f"{long} of {long + len(rows)} captions are longer than the Y-Encoder of this model reads"}
    if len(texts) < 2 or len(shown) < 2:
        return {"skipped": "needs two pictures with different captions"}
    pictures = read(model, shown, features, report=report).embedding
    captions = encode_texts(model, texts)
    row_of, column_of = ({key: i for i, key in enumerate(keys)} for keys in (map(image_key, shown), texts))
    pairs = np.array(sorted({(row_of[image_key(row)], column_of[plain(row.caption)]) for row in rows}))
    return {"query": query, "pictures": len(shown), "captions": len(texts), "too_long": long,
            "to_caption": _one_way("to_caption", pictures, captions, pairs, intervals),
            "to_picture": _one_way("to_picture", captions, pictures, pairs[:, ::-1], intervals)}


def readable(model, rows):
    """(rows whose caption the Y-Encoder can read, number of the others)."""
    def fits(text):
        try:
            model.y_encoder.tokens([text])
        except ShapeError:
            return False
        return True

    kept = [row for row in rows if fits(plain(row.caption))]
    return kept, len(rows) - len(kept)


def _one_way(name, asked, gallery, pairs, intervals):
    """asked (n, E), gallery (m, E), pairs (k, 2): which entry of the gallery fits which of those asked."""
    ranks, each = [], np.arange(len(asked))
    for start in range(0, len(asked), ROWS):  # a part at a time: n · m may be large
        similarity = asked[start : start + ROWS].astype(np.float64) @ gallery.T.astype(np.float64)
        fits = np.zeros(similarity.shape, bool)
        here = pairs[(pairs[:, 0] >= start) & (pairs[:, 0] < start + len(fits))]
        fits[here[:, 0] - start, here[:, 1]] = True
        ranks.append(metrics.retrieval_ranks(similarity, fits))
    ranks = np.concatenate(ranks)
    fitting = np.bincount(pairs[:, 0], minlength=len(asked))
    result = {"chance": {str(k): chance(fitting, len(gallery), k) for k in DEPTHS}}
    for k in DEPTHS:
        result[f"recall_at_{k}"] = intervals.cell(f"retrieval/{name}/{k}", ranks <= k, each)
    for kind, statistic in (("median", np.median), ("mean", np.mean)):
        low, high = metrics.bootstrap_interval(statistic, ranks, rng=intervals.rng(f"retrieval/{name}/{kind}"),
                                               resamples=intervals.resamples)
        result[f"{kind}_rank"] = {"value": float(statistic(ranks)), "low": low, "high": high, "count": len(ranks),
                                  "pictures": len(ranks)}
    return result


def chance(fitting, total, k):
    """Expected recall at k of a random order of ``total``: 1 - C(n - f, k) / C(n, k), over the numbers that fit."""
    k = min(k, total)
    kinds, counts = np.unique(fitting, return_counts=True)
    missed = [math.comb(total - int(found), k) / math.comb(total, k) for found in kinds]
    return 1 - float(np.average(missed, weights=counts))
