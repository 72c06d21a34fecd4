"""What the Y-Decoder writes: answers, captions, and other texts where it was taught any; it may look at the picture.

A model does not record whether its decoder saw captions, so that is judged by what it writes: texts that fit
their own picture no better than another one's are no captions.
"""

import numpy as np

from training import caption_metrics
from training.evaluation.answering import ask_each, other_pictures, picture_numbers, plain, read, score
from training.phases import decoder
from training.phases.common import image_key
from xuravljepa.model import CAPTION_QUERY

MOST_WRITTEN = 500  # answers, and as many other texts: the decoder writes byte by byte
LEAST_OF_A_TYPE = 20
NOT_TAUGHT = ("what the decoder writes to a picture fits it no better, beyond the intervals, than another one: it was "
              "not taught such texts, or has not learned them.")


def measure(model, answers, material, features, intervals, query=CAPTION_QUERY, most=MOST_WRITTEN, report=None):
    """{"answers": {"exact", "nearest"}, "texts": {type: {…}} or {"skipped": why}}.

    exact: the text is a right answer.   nearest: it is the one that ``answers`` says (None: there are none).
    Each type of text has "own" and "other" (held against another picture's texts), both with cells "exact", "bleu4"
    and "cider"; captions of generated scenes also "objects" (all of them named, in any order), "precision" and
    "recall" of the objects.
    """
    kinds = _kinds(material, query, most)
    chosen = np.sort(intervals.rng("words").permutation(0 if answers is None else len(answers.rows))[:most])
    total = len(chosen) + sum(map(len, kinds.values()))
    writer, result = _Writer(model, report, total), {}
    if len(chosen):
        rows, pictures = [answers.rows[i] for i in chosen], answers.pictures[chosen]
        said = writer.write(rows, answers.embedding[chosen], features)
        exact = np.array([score(text, row) for text, row in zip(said, rows)])
        nearest = [plain(a) == plain(b) for a, b in zip(said, answers.said[chosen])]
        result["answers"] = {"exact": intervals.cell("words/exact", exact, pictures),
                             "nearest": intervals.cell("words/nearest", nearest, pictures)}
    references = {}
    for row in (*material.captions, *material.texts):
        references.setdefault((_kind(row), image_key(row)), []).append(row.caption)
    texts = {}
    for kind, rows in kinds.items():
        written = writer.write(rows, read(model, rows, features).embedding, features)
        texts[kind] = _compare(kind, rows, written, references, intervals, material.generated)
    result["texts"] = texts or {"skipped": "needs two pictures with captions"}
    return result


def _kind(row):
    return row.type or "caption"


def _kinds(material, query, most):
    """{type: rows to write a text to}: one per picture, ``most`` in all but some of each."""
    rows = {}
    for row in (*material.captions, *material.texts):
        rows.setdefault(_kind(row), []).append(row)
    each = max(LEAST_OF_A_TYPE, most // max(len(rows), 1))
    return {kind: ask_each(found, query, keep=True)[:each] for kind, found in rows.items()
            if len({image_key(row) for row in found}) > 1}


class _Writer:
    """The decoder, greedy, with one progress for all it writes."""

    def __init__(self, model, report, total):
        self.model, self.report, self.total, self.done = model, report, total, 0

    def write(self, rows, embeddings, features):
        texts = []
        for start in range(0, len(rows), 64):
            part = slice(start, start + 64)
            texts += decoder.write(self.model, rows[part], embeddings[part], features)
            if self.report is not None:
                self.report(self.done + len(texts), self.total)
        self.done += len(texts)
        return texts


def _compare(kind, rows, written, references, intervals, generated):
    result, pictures = {"query": rows[0].query, "pictures": len(rows)}, picture_numbers(rows)
    split, both = [caption_metrics.words(text) for text in written], []
    for name, shown in (("own", rows), ("other", other_pictures(rows, intervals.seed))):
        fitting = [references[kind, image_key(row)] for row in shown]
        known = [[caption_metrics.words(text) for text in texts] for texts in fitting]
        both.append(known)
        exact = [plain(text) in map(plain, texts) for text, texts in zip(written, fitting)]
        cells = {"exact": intervals.cell(f"words/{kind}/{name}/exact", exact, pictures)}
        for measure in (caption_metrics.bleu4, caption_metrics.cider):
            cells[measure.__name__] = intervals.jackknife(_over(measure, split, known), len(rows), pictures)
        if generated and kind.startswith("caption"):
            first = [texts[0] for texts in fitting]
            for measure in ("objects_exact", "precision", "recall"):
                cells[measure.partition("_")[0]] = intervals.jackknife(
                    _over(caption_metrics.object_scores, written, first, measure), len(rows), pictures)
        result[name] = cells
    result["examples"] = [{"id": row.id, "written": text, "caption": row.caption}
                          for row, text in list(zip(rows, written))[:3]]
    better = intervals.jackknife(_over(_advantage, split, list(zip(*both))), len(rows), pictures)
    if better.get("low", better["value"]) <= 0:
        result["note"] = NOT_TAUGHT
    return result


def _advantage(said, known):
    """CIDEr held against the own picture's texts, less that against another one's."""
    own, other = zip(*known)
    return caption_metrics.cider(said, own) - caption_metrics.cider(said, other)


def _over(measure, said, known, part=None):
    """The measure as a function of rows."""
    def statistic(rows):
        found = measure([said[i] for i in rows], [known[i] for i in rows])
        return found if part is None else found[part]

    return statistic
