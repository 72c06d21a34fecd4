"""Does the agent know when it is wrong?  Its monitor beside simpler judges, in domain and under shifts.

Each judge gives a confidence in [0, 1] that the answer is right:

    monitor        1 - p(wrong) of the ConfusionMonitor
    agent          the same, but small where the question has words that no training had
    agreement      the answer's probability, averaged over the picture and its moved views
    max-softmax    the answer's probability
    margin         that, less the next answer's
    entropy        1 - H(p) / log(answers)

All are measured on the same answers, and with the same bootstrap resamples of pictures, so that the difference of
two judges has an interval of its own.
"""

from dataclasses import dataclass

import numpy as np

from training import metrics
from training.data.dataset import Dataset
from training.data.scenes import CORRUPTIONS
from training.data.strange import UNTAUGHT, untaught
from training.phases import monitor as judging
from training.phases.common import generator
from xuravljepa.agent.confusion import FOREIGN, at_least, foreign_words

JUDGES = ("monitor", "agent", "agreement", "max-softmax", "margin", "entropy")
RISKS = (0.01, 0.05, 0.10)
MEASURES = {
    "auroc": "AUROC", "aupr": "AUPR (wrong)", "ece": "ECE", "ece_mass": "ECE, equal mass", "brier": "Brier",
    "nll": "NLL", "aurc": "AURC", "e_aurc": "E-AURC",
    **{f"coverage_{risk:g}": f"coverage at {risk:.0%} risk" for risk in RISKS},
}
HIGH_IS_GOOD = ("auroc", "aupr", *(f"coverage_{risk:g}" for risk in RISKS))
CURVE_POINTS = 120
IN_DOMAIN = ("pictures", "tool questions")


@dataclass(frozen=True)
class Judged:
    """Answers to one set of questions: wrong (n,) 0/1, {judge: confidence (n,)}, picture (n,) numbers."""

    wrong: np.ndarray
    confidence: dict
    picture: np.ndarray


def measure(confidence, right):
    """{measure: value} of one judge."""
    wrong = 1 - right
    return {
        "auroc": metrics.auroc(-confidence, wrong), "aupr": metrics.average_precision(-confidence, wrong),
        "ece": metrics.expected_calibration_error(confidence, right),
        "ece_mass": metrics.expected_calibration_error(confidence, right, equal_mass=True),
        "brier": metrics.brier_score(confidence, right), "nll": metrics.negative_log_likelihood(confidence, right),
        "aurc": metrics.aurc(confidence, right), "e_aurc": metrics.excess_aurc(confidence, right),
        **{f"coverage_{risk:g}": metrics.coverage_at_risk(confidence, right, risk) for risk in RISKS},
    }


def question_sets(scenes, seed=0):
    """{name: (rows, change of their pictures or None)}: what the judges are measured on.

    In domain: test scenes, half of them asked in wide wordings, and tool keys of the pool ``test``.  Shifted:
    the corruptions, held-out colour × shape pairs, unseen wordings, and changes of the picture that no monitor was
    trained on.
    """
    def rows(split, count, **more):
        return Dataset.scenes(split, count, seed, **more).rows

    corrupted = rows("corrupt", scenes)
    plain, wide = rows("test", scenes), rows("test", scenes, start=scenes, templates="wide")
    sets = {"pictures": ([*plain, *wide], None),
            "tool questions": (Dataset.tools("test", 2 * scenes, seed, pools=("known", "test")).rows, None)}
    for kind in CORRUPTIONS:
        sets[kind] = [row for row in corrupted if row.image.corruption == kind], None
    sets["held-out pairs"] = rows("ood", max(scenes // 2, 1)), None
    sets["unseen wording"] = rows("test", max(scenes // 2, 1), templates="paraphrase"), None
    for kind in UNTAUGHT:
        sets[kind] = rows("test", max(scenes // 2, 1)), kind
    return sets


def judge(model, heads, rows, change=None, report=None):
    """What each judge says of the model's answers to rows: :class:`Judged`."""
    store = judging.ViewStore(model, heads.monitor.config.shift, rows,
                              change=None if change is None else lambda pixels: untaught(pixels, change))
    found = judging.gather_readings(model, heads, rows, store, inject=False, report=report)
    agreement = 1 / (1 + np.exp(judging.column(found["features"], "agreement").astype(np.float64)))
    p = heads.monitor.p_wrong(found["features"])
    foreign = np.array([bool(foreign_words(row.query, heads.config.words)) for row in rows])
    confidence = {"monitor": 1 - p, "agent": 1 - np.where(foreign, at_least(FOREIGN, p), p),
                  "agreement": agreement, "max-softmax": found["top"], "margin": found["margin"],
                  "entropy": 1 - found["entropy"]}
    picture = np.array([row.image.index for row in rows])
    return Judged(found["wrong"], {name: np.clip(confidence[name], 0, 1) for name in JUDGES}, picture)


def risk_of(judged, seed=0, resamples=200):
    """{"questions", "wrong", "judges": {judge: {measure: {"value", "low", "high"}}}, "gain", "curves"} of one set.

    gain : {measure: …} of the monitor less max-softmax.   curves : risk–coverage and reliability of each judge.
    """
    right = 1 - judged.wrong
    numbers, places = np.unique(judged.picture, return_inverse=True)
    members = np.split(np.argsort(places, kind="stable"), np.cumsum(np.bincount(places))[:-1])
    rng, drawn = generator(seed, 31), {name: [] for name in JUDGES}
    for _ in range(resamples):
        rows = np.concatenate([members[i] for i in rng.integers(0, len(numbers), len(numbers))])
        for name in JUDGES:
            drawn[name].append(list(measure(judged.confidence[name][rows], right[rows]).values()))
    drawn = {name: np.array(values, np.float64).reshape(resamples, len(MEASURES)) for name, values in drawn.items()}
    value = {name: list(measure(judged.confidence[name], right).values()) for name in JUDGES}
    gain = np.subtract(value["monitor"], value["max-softmax"])
    return {
        "questions": len(right), "pictures": len(numbers), "wrong": float(judged.wrong.mean()),
        "judges": {name: _cells(value[name], drawn[name]) for name in JUDGES},
        "gain": _cells(gain, drawn["monitor"] - drawn["max-softmax"]),
        "curves": {name: _curves(judged.confidence[name], right) for name in JUDGES},
    }


def _cells(values, drawn):
    """{measure: {"value", "low", "high"}}; NaN, as where nothing is wrong, is None in JSON."""
    cells = {}
    for number, (name, value) in enumerate(zip(MEASURES, values)):
        finite = drawn[:, number][np.isfinite(drawn[:, number])]
        low, high = np.quantile(finite, [0.025, 0.975]) if len(finite) else (np.nan, np.nan)
        cells[name] = {part: float(x) if np.isfinite(x) else None
                       for part, x in (("value", value), ("low", low), ("high", high))}
    return cells


def _curves(confidence, right):
    coverage, risk = metrics.risk_coverage(confidence, right)
    kept = np.unique(np.linspace(len(coverage) // 50, len(coverage) - 1, CURVE_POINTS).astype(int))
    bins = metrics.calibration_bins(confidence, right, 15)
    return {"coverage": coverage[kept].tolist(), "risk": risk[kept].tolist(),
            "bins": [list(map(float, found)) for found in bins]}


def risk_report(model, heads, scenes=300, seed=0, resamples=200, report=None):
    """{set: what ``risk_of`` gives}, and "shifted": all shifted sets in one."""
    sets = {name: judge(model, heads, rows, change, None if report is None else report(name))
            for name, (rows, change) in question_sets(scenes, seed).items()}
    shifted = [judged for name, judged in sets.items() if name not in IN_DOMAIN]
    apart = np.cumsum([0] + [1 + int(judged.picture.max()) for judged in shifted])
    sets["all shifts"] = Judged(
        np.concatenate([judged.wrong for judged in shifted]),
        {name: np.concatenate([judged.confidence[name] for judged in shifted]) for name in JUDGES},
        np.concatenate([judged.picture + start for judged, start in zip(shifted, apart)]))
    return {name: risk_of(judged, seed, resamples) for name, judged in sets.items()}


def table(report):
    """Lines of text: for each set a row per judge, with intervals for AUROC and what the monitor gains."""
    lines = []
    for name, found in report.items():
        lines.append(f"{name}: {found['questions']:,} questions, {found['wrong']:.1%} wrong")
        lines.append("  judge         AUROC              AUPR    ECE  ECEmass  Brier    NLL   AURC  E-AURC   at 1 %"
                     "   at 5 %  at 10 % risk")
        for judge_name, cells in found["judges"].items():
            auroc = cells["auroc"]
            numbers = [_number(cells[measure]["value"]) for measure in list(MEASURES)[1:]]
            lines.append(f"  {judge_name:12s} {_number(auroc['value'])} {_range(auroc):15s}  "
                         + "   ".join(numbers))
        gain = found["gain"]["auroc"]
        lines.append(f"  monitor less max-softmax, AUROC: {_number(gain['value'])} {_range(gain)}")
    return "\n".join(lines)


def _number(value):
    return "    –" if value is None else f"{value:.3f}".rjust(5)


def _range(cell):
    return "" if cell["low"] is None else f"({cell['low']:.3f}–{cell['high']:.3f})"
