"""What the Y-Decoder writes: answers, and captions where it was taught any.

A model does not record whether its decoder saw captions, so that is judged by what it writes: captions that fit
their own picture no better than another one's are no captions.
"""

import numpy as np

from training.evaluation.answering import ask_each, other_pictures, picture_numbers, plain, read, score
from training.phases.common import image_key
from xuravljepa.model import CAPTION_QUERY

MOST_WRITTEN = 200  # texts: the decoder writes byte by byte
NOT_TAUGHT = ("what the decoder writes to a picture fits it no better than another one: it was not taught captions, "
              "or has not learned them.")


def measure(model, answers, caption_rows, features, intervals, query=CAPTION_QUERY, most=MOST_WRITTEN, report=None):
    """{"answers": {"exact", "nearest", …}, "captions": {…} or {"skipped": why}}.

    exact: the text is a right answer.   nearest: it is the one that ``answers`` says.
    """
    captioned = ask_each([row for row in caption_rows if row.caption], query)[:most]
    chosen = np.sort(intervals.rng("words").permutation(0 if answers is None else len(answers.rows))[:most])
    total, result = len(chosen) + len(captioned), {}
    if len(chosen):
        rows, pictures = [answers.rows[i] for i in chosen], answers.pictures[chosen]
        said = _write(model, answers.embedding[chosen], report, 0, total)
        exact = np.array([score(text, row) for text, row in zip(said, rows)])
        nearest = [plain(a) == plain(b) for a, b in zip(said, answers.said[chosen])]
        result["answers"] = {"exact": intervals.cell("words/exact", exact, pictures),
                             "nearest": intervals.cell("words/nearest", nearest, pictures)}
    result["captions"] = _captions(model, captioned, caption_rows, features, intervals, query, report, len(chosen),
                                   total)
    return result


def _write(model, embeddings, report, done, total):
    texts = []
    for embedding in embeddings:
        texts.append(model.y_decoder.generate(embedding)[0])
        if report is not None:
            report(done + len(texts), total)
    return texts


def _captions(model, rows, every, features, intervals, query, report, done, total):
    if len(rows) < 2:
        return {"skipped": "needs two pictures with captions"}
    references = {}
    for row in every:
        references.setdefault(image_key(row), []).append(row.caption)
    written = _write(model, read(model, rows, features).embedding, report, done, total)
    pictures, result = picture_numbers(rows), {"query": query, "pictures": len(rows)}
    for name, shown in (("own", rows), ("other", other_pictures(rows, intervals.seed))):
        fitting = [references[image_key(row)] for row in shown]
        exact = [plain(text) in map(plain, texts) for text, texts in zip(written, fitting)]
        result[name] = {"exact": intervals.cell(f"captions/{name}/exact", exact, pictures)}
    result["examples"] = [{"id": row.id, "written": text, "caption": row.caption}
                          for row, text in list(zip(rows, written))[:4]]
    if result["own"]["exact"]["value"] <= result["other"]["exact"]["value"]:
        result["note"] = NOT_TAUGHT
    return result
