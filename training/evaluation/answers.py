"""Discriminative question answering: the nearest known answer, per type of question, beside what fools could do.

Controls, all on the same questions:

- prior: the best guess from the question's words alone, learned by counting;
- shuffled: the model is shown another picture; it must fall to the prior.  gain is what its own picture adds;
- permuted: its answers are held against those of other questions of the type; agreement by chance;
- reordered: the candidates are encoded and listed in another order; no answer may change.
"""

import numpy as np

from training import metrics
from training.data.dataset import Dataset
from training.data.priors import QuestionOnlyPrior
from training.evaluation.answering import encode_texts, groups_of, other_pictures, picture_numbers, read, score
from training.phases.common import generator

# What the Relation Network's Sort-of-CLEVR asks (Santoro et al. 2017), and our types that ask it.
SORT_OF_CLEVR = {
    "non-relational": {"shape": "shape of a colour", "horizontal": "left or right", "vertical": "top or bottom"},
    "relational": {"closest_shape": "shape of the closest", "furthest_shape": "shape of the furthest",
                   "same_shape_count": "how many others of its shape"},
}
NOT_COMPARABLE = (
    "Questions whose answer hangs on less than 3 pixels are rejected by the generator, so these numbers cannot be "
    "compared with those on the popular generator's file, where an object may be its own neighbour and near ties "
    "are asked.")


FEW = 20  # questions of a type, below which nothing is said against it


def measure(model, material, features, intervals, report=None):
    """(report, Answers to the test rows).

    The report: {"types": {group: {column: cell}}, "controls": {…}, "confidence": {…}, "sort_of_clevr": …,
    "confusion": …, "unknown": n, "blind": [groups that are no better on their own picture than on another]}.
    """
    seed, rows = intervals.seed, material.rows
    test = read(model, rows, features, report=report)
    columns = {"accuracy": (rows, test.right)}
    prior = QuestionOnlyPrior(Dataset("prior", material.prior_rows()))
    guessed = [prior.answer(row.query, row.type) or "" for row in rows]
    columns["prior"] = rows, [score(text, row) for text, row in zip(guessed, rows)]
    if len(np.unique(test.pictures)) > 1:
        columns["shuffled"] = rows, read(model, rows, features, other_pictures(rows, seed)).right
        columns["gain"] = rows, test.right - columns["shuffled"][1]
    columns["permuted"] = rows, _permuted(test, seed)
    for name, others in material.splits.items():
        columns[name] = others, read(model, others, features).right
    cells = {name: intervals.by_type(f"answers/{name}", asked, value, picture_numbers(asked))
             for name, (asked, value) in columns.items()}
    names = [name for name in ("all", "non-relational", "relational") if name in cells["accuracy"]]
    names += [name for name in cells["accuracy"] if name not in names]
    known = set(model.config.answers)
    result = {
        "types": {name: {column: found[name] for column, found in cells.items() if name in found} for name in names},
        "controls": {"reordered": _reordered(model, test, seed)},
        "confidence": confidence(test),
        "unknown": sum(not known.intersection(row.answers) and not row.choices for row in rows),
        "confusion": confusion(test),
        "blind": [name for name in names if "gain" in cells and cells["gain"][name]["low"] <= 0
                  and cells["gain"][name]["count"] >= FEW],
    }
    if material.generated:
        result["sort_of_clevr"] = sort_of_clevr(test, columns, intervals)
    return result, test


def confidence(answers):
    """{"mean", "auroc", "ece"}: how well the confidence tells right from wrong; auroc None without both."""
    wrong = answers.right < 0.5
    sure = np.clip(answers.confidence, 0, 1)
    auroc = metrics.auroc(1 - sure, wrong) if 0 < wrong.sum() < len(wrong) else None
    return {"mean": float(sure.mean()), "auroc": auroc, "ece": metrics.expected_calibration_error(sure, 1 - wrong)}


def _permuted(answers, seed):
    """(n,) scores of the answers against the truth of another question of the type, drawn at random."""
    kinds = np.array([groups_of(row)[-1] for row in answers.rows])
    result = np.empty(len(kinds))
    for number, kind in enumerate(sorted(set(kinds))):
        found = np.flatnonzero(kinds == kind)
        order = generator(seed, 23, number).permutation(len(found))
        for i, j in zip(found[order], found[np.roll(order, -1)]):
            result[i] = score(answers.said[i], answers.rows[j])
    return result


def _reordered(model, answers, seed):
    """Share of the answers that another order of the candidates changes."""
    asked = np.array([not row.choices for row in answers.rows])
    if not asked.any() or not model.config.answers:
        return 0.0
    order = generator(seed, 24).permutation(len(model.config.answers))
    names = [model.config.answers[i] for i in order]
    said = np.array(names)[(answers.embedding @ encode_texts(model, names).T).argmax(axis=1)]
    return float(np.mean(said[asked] != answers.said[asked]))


def sort_of_clevr(test, columns, intervals):
    """Per subtype of the benchmark, and over each half of it: accuracy, controls, held-out combinations."""
    result = {"note": NOT_COMPARABLE}
    for half, types in SORT_OF_CLEVR.items():
        wanted = {**{kind: (kind,) for kind in types}, half: tuple(types)}
        for name, kinds in wanted.items():
            cells = {}
            for column in ("accuracy", "prior", "shuffled", "ood"):
                rows, value = columns.get(column, ((), ()))
                found = [i for i, row in enumerate(rows) if row.type in kinds]
                if found:
                    cells[column] = intervals.cell(f"sort/{column}/{name}", np.asarray(value)[found],
                                                   picture_numbers(rows)[found])
            if cells:
                result[name] = {"asks": types.get(name, f"all {half}"), **cells}
    return result


def confusion(answers, most=12):
    """{"answers": the commonest right answers, "said": these and "other", "counts": rows of numbers}."""
    truth = [row.answer for row in answers.rows]
    names, counts = np.unique(truth, return_counts=True)
    common = [str(name) for name in names[np.argsort(-counts, kind="stable")][:most]]
    common.sort(key=lambda name: (name.isdigit(), int(name) if name.isdigit() else 0, name))
    place = {name: i for i, name in enumerate(common)}
    table = np.zeros((len(common), len(common) + 1), int)
    for name, said in zip(truth, answers.said):
        if name in place:
            table[place[name], place.get(str(said), len(common))] += 1
    return {"answers": common, "said": [*common, "other"], "counts": table.tolist()}
