"""Retrieval both ways: which caption fits this picture, which picture fits this caption.

A picture's embedding is the answer predicted to one question (``CAPTION_QUERY``), a caption's is the Y-Encoder's.
Equal captions are one text, and a picture may have several: any of them counts as found.
"""

import math

import numpy as np

from training import metrics
from training.evaluation.answering import ask_each, plain, read
from training.phases.common import image_key
from xuracore.errors import ShapeError
from xuravljepa.model import CAPTION_QUERY

DEPTHS = (1, 5, 10)


def measure(model, rows, features, intervals, query=CAPTION_QUERY, report=None):
    """{"to_caption": …, "to_picture": …, "pictures", "captions"}, or {"skipped": why}.

    Each way: recall at 1, 5 and 10 (cells), "median" and "mean" rank with intervals, "chance" of each recall.
    """
    rows, long = readable(model, rows)
    texts = list(dict.fromkeys(plain(row.caption) for row in rows))
    shown = ask_each(rows, query)
    if len(texts) < 2 or len(shown) < 2:
        why = f"; {long} are longer than the Y-Encoder of this model reads" if long else ""
        return {"skipped": f"needs two pictures with different captions that the model can read{why}"}
    pictures = read(model, shown, features, report=report).embedding
    captions = np.concatenate([model.encode_answers(texts[i : i + 64]).data for i in range(0, len(texts), 64)])
    row_of, column_of = ({key: i for i, key in enumerate(keys)} for keys in (map(image_key, shown), texts))
    fits = np.zeros((len(shown), len(texts)), bool)
    for row in rows:
        fits[row_of[image_key(row)], column_of[plain(row.caption)]] = True
    similarity = pictures.astype(np.float64) @ captions.T.astype(np.float64)
    return {"query": query, "pictures": len(shown), "captions": len(texts), "too_long": long,
            "to_caption": _one_way("to_caption", similarity, fits, intervals),
            "to_picture": _one_way("to_picture", similarity.T, fits.T, intervals)}


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


def _one_way(name, similarity, fits, intervals):
    ranks, each = metrics.retrieval_ranks(similarity, fits), np.arange(len(fits))
    result = {"chance": {str(k): _chance(fits, k) for k in DEPTHS}}
    for k in DEPTHS:
        result[f"recall_at_{k}"] = intervals.cell(f"retrieval/{name}/{k}", ranks <= k, each)
    for kind, statistic in (("median", np.median), ("mean", np.mean)):
        low, high = metrics.bootstrap_interval(statistic, ranks, rng=intervals.rng(f"retrieval/{name}/{kind}"),
                                               resamples=intervals.resamples)
        result[f"{kind}_rank"] = {"value": float(statistic(ranks)), "low": low, "high": high, "count": len(ranks),
                                  "pictures": len(ranks)}
    return result


def _chance(fits, k):
    """Expected recall at k of a random order: 1 - C(n - positives, k) / C(n, k), over the rows."""
    total = fits.shape[1]
    missed = [math.comb(total - int(found), min(k, total)) / math.comb(total, min(k, total))
              for found in fits.sum(axis=1)]
    return 1 - float(np.mean(missed))
