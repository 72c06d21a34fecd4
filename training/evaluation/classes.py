"""Open-vocabulary classification: the class is named by text alone, in any words, and the nearest name wins.

A class is the mean of the normalised embeddings of its name in several sentences, normalised again (the prompt
ensembles of CLIP, Radford et al. 2021).
"""

from collections import Counter

import numpy as np

from training.evaluation.answering import ask_each, encode_texts, picture_numbers, read
from xuracore.errors import ConfigError, ShapeError

TEMPLATES = ("{}", "a {}", "the {}", "a picture of a {}")


def class_embeddings(model, names, templates=TEMPLATES):
    """(classes, E) of unit length: the re-normalised mean over the templates.

    templates : sentences with one {} where the name goes.  Raises ConfigError for one without it, ShapeError where
    a sentence is too long for the Y-Encoder.
    """
    for template in templates:
        if template.count("{}") != 1:
            raise ConfigError(f"the template {template!r} needs the place of the name, {{}}, once")
    if not names or not templates:
        raise ConfigError("classification needs at least one class name and one template")
    sentences = [template.replace("{}", name) for name in names for template in templates]
    encoded = encode_texts(model, sentences)  # of unit length already
    mean = encoded.reshape(len(names), len(templates), -1).mean(axis=1, dtype=np.float64)
    return (mean / np.linalg.norm(mean, axis=1, keepdims=True)).astype(encoded.dtype)


def measure(model, rows, features, intervals, names=None, templates=TEMPLATES, query=None, report=None):
    """{"names", "top1", "top5", "plain", "majority", "chance", "unseen", …}, or {"skipped": why}.

    names : class names; by default the distinct answers of the rows.  Rows whose answer is no class are left out.
    query : one question for every picture, which then counts once; by default each row's own.
    """
    names = sorted({row.answer for row in rows}) if names is None else list(dict.fromkeys(names))
    place = {name: i for i, name in enumerate(names)}
    rows = [row for row in rows if row.answer in place]
    if query is not None:
        rows = ask_each(rows, query)
    if len(names) < 2 or not rows:
        return {"skipped": "needs two classes and a picture whose answer is one of them"}
    try:
        classes, plain = class_embeddings(model, names, templates), class_embeddings(model, names, ("{}",))
    except ShapeError as error:
        return {"skipped": f"a class name is too long for the Y-Encoder: {error}"}
    said = read(model, rows, features, candidates=names, report=report)
    truth, pictures = np.array([place[row.answer] for row in rows]), picture_numbers(rows)
    cosines = said.embedding.astype(np.float64) @ classes.T.astype(np.float64)
    ahead = (cosines > np.take_along_axis(cosines, truth[:, None], axis=1)).sum(axis=1)
    first = cosines.argmax(axis=1)
    known = set(model.config.answers)
    unseen = np.array([name not in known for name in names])
    result = {
        "names": names, "templates": list(templates), "query": query, "questions": len(rows),
        "top1": intervals.cell("classes/top1", first == truth, pictures),
        "top5": intervals.cell("classes/top5", ahead < 5, pictures) if len(names) > 5 else None,
        "plain": intervals.cell("classes/plain", (said.embedding @ plain.T).argmax(axis=1) == truth, pictures),
        "majority": max(Counter(truth.tolist()).values()) / len(rows),
        "chance": 1 / len(names),
        "recall": {name: float((first == i)[truth == i].mean()) for name, i in place.items() if (truth == i).any()},
        "unseen": [name for name, new in zip(names, unseen) if new],
    }
    if unseen[truth].any():
        found = unseen[truth]
        result["unseen_top1"] = intervals.cell("classes/unseen", (first == truth)[found], pictures[found])
    return result
