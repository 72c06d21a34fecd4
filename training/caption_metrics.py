"""How near a written caption is to those that people gave: BLEU-4, CIDEr-D, and whether it names the right objects.

Captions are lists of words, here always lower case and without marks (``words``).
"""
import math
import re
from collections import Counter

import numpy as np

from xuracore.errors import ShapeError

MAX_N = 4
CIDER_SIGMA = 6.0  # words: how much of a difference in length is forgiven


def words(text):
    """The words of a text, in lower case and without marks."""
    return re.findall(r"\w+", text.lower())


def bleu4(candidates, references):
    """Corpus BLEU-4 in [0, 1] (Papineni et al. 2002), without smoothing.

    candidates : n lists of words.   references : for each a list of lists of words.

    The geometric mean of the clipped precisions of 1- to 4-grams over the whole corpus, times the brevity penalty
    exp(1 − r/c) where the candidates' words c are fewer than r, those of the references nearest in length.
    Raises ShapeError for none, for different numbers, and for a candidate without reference.
    """
    _check(candidates, references)
    right, given = np.zeros(MAX_N), np.zeros(MAX_N)
    length, wanted = 0, 0
    for candidate, known in zip(candidates, references):
        length += len(candidate)
        wanted += min((abs(len(text) - len(candidate)), len(text)) for text in known)[1]
        for n in range(1, MAX_N + 1):
            counts, most = _ngrams(candidate, n), Counter()
            for text in known:
                most |= _ngrams(text, n)
            right[n - 1] += (counts & most).total()
            given[n - 1] += counts.total()
    if not right.all():
        return 0.0
    return float(np.exp(np.log(right / given).mean() + min(0.0, 1.0 - wanted / length)))


def cider(candidates, references):
    """Corpus CIDEr-D in [0, 10] (Vedantam et al. 2015, section 6): the mean over candidates of

        10 / 4 Σ_n mean_ref exp(−(l_c − l_r)² / 2σ²) · min(g_c, g_r) · g_r / (|g_c| |g_r|),    σ = 6,

    where g holds the counts of n-grams times log(pictures / pictures whose references have it).  What every
    picture's references say weighs nothing, so a single picture scores 0.  Arguments and errors as ``bleu4``.
    """
    _check(candidates, references)
    seen = Counter()
    for known in references:
        seen.update({gram for text in known for n in range(1, MAX_N + 1) for gram in _ngrams(text, n)})
    total = math.log(len(references))

    def vector(text, n):
        weights = {gram: count * (total - math.log(max(seen[gram], 1))) for gram, count in _ngrams(text, n).items()}
        return weights, math.sqrt(sum(weight * weight for weight in weights.values()))

    score = 0.0
    for candidate, known in zip(candidates, references):
        for n in range(1, MAX_N + 1):
            said, size = vector(candidate, n)
            for text in known:
                meant, other = vector(text, n)
                if size and other:
                    alike = sum(min(said[gram], weight) * weight for gram, weight in meant.items() if gram in said)
                    longer = (len(candidate) - len(text)) ** 2 / (2 * CIDER_SIGMA ** 2)
                    score += alike / (size * other) * math.exp(-longer) / len(known)
    return 10.0 * score / (MAX_N * len(candidates))


def objects(text):
    """The objects that a caption of a generated scene names, a Counter of its phrases in any order."""
    phrases = re.split(r",| and ", text.lower())
    return Counter(" ".join(words(phrase)) for phrase in phrases if words(phrase))


def object_scores(candidates, references):
    """{"exact", "objects_exact", "precision", "recall"} of captions (texts) of generated scenes, each in [0, 1].

    exact : the same text.   objects_exact : the same objects, in any order.   precision, recall : share of the
    named objects that are there, and of those there that are named, over all pictures.
    """
    if not len(candidates) or len(candidates) != len(references):
        raise ShapeError(f"{len(candidates)} captions for {len(references)} pictures; expected as many, and some")
    said, there = [objects(text) for text in candidates], [objects(text) for text in references]
    shared = sum((a & b).total() for a, b in zip(said, there))
    return {"exact": float(np.mean([a == b for a, b in zip(candidates, references)])),
            "objects_exact": float(np.mean([a == b for a, b in zip(said, there)])),
            "precision": shared / max(sum(a.total() for a in said), 1),
            "recall": shared / max(sum(b.total() for b in there), 1)}


def _ngrams(text, n):
    return Counter(tuple(text[i:i + n]) for i in range(len(text) - n + 1))


def _check(candidates, references):
    if not len(candidates) or len(candidates) != len(references):
        raise ShapeError(f"{len(candidates)} candidates for {len(references)} lists of references; expected as many, "
                         "and at least one")
    for i, known in enumerate(references):
        if not known or isinstance(known[0], str):
            raise ShapeError(f"references[{i}] must be a non-empty list of lists of words, got {known!r:.60}")
    for i, candidate in enumerate(candidates):
        if isinstance(candidate, str):
            raise ShapeError(f"candidates[{i}] must be a list of words, got the text {candidate!r:.60}")
