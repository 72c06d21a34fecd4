"""What is measured on held-out data: accuracy, ranking, calibration, selective answering, embeddings.

Pure NumPy, float64, no randomness but that of a given generator.  ``confidence`` is high where an answer
is trusted; ``score`` is high where the event ``label`` = 1 is expected.  Equal scores are treated as
equal: no result depends on the order in which samples come.
"""

import numpy as np

from xuracore.errors import ConfigError, ShapeError


def _vectors(*given):
    arrays = [np.asarray(a, dtype=np.float64).reshape(-1) for a in given]
    if len({len(a) for a in arrays}) > 1:
        raise ShapeError(f"expected vectors of one length; got lengths {[len(a) for a in arrays]}")
    if not len(arrays[0]):
        raise ShapeError("expected at least one sample; got none")
    return arrays


# ---------------------------------------------------------------------- right and wrong
def accuracy(prediction, target):
    """Share of equal entries; any dtype, strings included."""
    prediction, target = np.asarray(prediction), np.asarray(target)
    if prediction.shape != target.shape or not prediction.size:
        raise ShapeError(f"shapes {prediction.shape} and {target.shape} must be equal and not empty")
    return float(np.mean(prediction == target))


def accuracy_by(group, correct):
    """{group: (accuracy, count)} in the order of first appearance, such as per question type."""
    (correct,) = _vectors(correct)
    group = list(group)
    if len(group) != len(correct):
        raise ShapeError(f"{len(group)} groups for {len(correct)} samples")
    members = {}
    for i, name in enumerate(group):
        members.setdefault(name, []).append(i)
    return {name: (float(correct[rows].mean()), len(rows)) for name, rows in members.items()}


def wilson_interval(successes, total, z=1.959963984540054):
    """Interval for a proportion (Wilson 1927); sensible also at 0 and at 1."""
    if not 0 <= successes <= total or total < 1:
        raise ConfigError(f"{successes} successes of {total} is no proportion")
    share, z2 = successes / total, z * z
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = z / (1 + z2 / total) * np.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    low = 0.0 if successes == 0 else max(0.0, float(centre - half))
    return low, 1.0 if successes == total else min(1.0, float(centre + half))


# ---------------------------------------------------------------------- ranking
def _ranks(score):
    """Ranks from 1, equal scores sharing their mean rank."""
    _, inverse, count = np.unique(score, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[inverse]


def auroc(score, label):
    """Probability that a random positive scores above a random negative; ties count half.

    NaN where one of the classes is empty: there is nothing to compare.
    """
    score, label = _vectors(score, label)
    positive = label > 0.5
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return float("nan")
    return float((_ranks(score)[positive].sum() - n * (n + 1) / 2) / (n * m))


def average_precision(score, label):
    """Area under precision over recall, Σ (R_k - R_{k-1}) P_k over the distinct scores from the top.

    NaN without a positive.  A score that knows nothing gets the share of positives.
    """
    score, label = _vectors(score, label)
    total = label.sum()
    if not total:
        return float("nan")
    values, inverse = np.unique(-score, return_inverse=True)
    hits = np.cumsum(np.bincount(inverse, label, len(values)))
    taken = np.cumsum(np.bincount(inverse, minlength=len(values)))
    recall = np.concatenate([[0], hits / total])
    return float(np.sum(np.diff(recall) * hits / taken))


def retrieval_ranks(similarity, positive):
    """Rank, from 1, of the best positive of each row among the columns; inf for a row without one.

    similarity (N, M).  positive : (N,) column of each row's positive, or (N, M) booleans.  A negative
    as similar as the best positive counts as before it, so that collapsed embeddings score nothing.
    """
    similarity = np.asarray(similarity, dtype=np.float64)
    positive = np.asarray(positive)
    if positive.ndim == 1:
        positive = positive[:, None] == np.arange(similarity.shape[1])
    if positive.shape != similarity.shape:
        raise ShapeError(f"similarity {similarity.shape} and positives {positive.shape} must be equal")
    best = np.max(np.where(positive, similarity, -np.inf), axis=1, keepdims=True)
    ahead = np.sum(~positive & (similarity >= best), axis=1)
    return np.where(positive.any(axis=1), 1.0 + ahead, np.inf)


def recall_at_k(similarity, positive, k):
    """Share of rows with a positive among the k most similar columns; arguments of retrieval_ranks."""
    return float(np.mean(retrieval_ranks(similarity, positive) <= k))


# ---------------------------------------------------------------------- calibration
def calibration_bins(confidence, correct, bins=15, equal_mass=False):
    """[(count, mean confidence, accuracy)] of the bins that are not empty.

    Bins have equal width on [0, 1] (a value on a border belongs below it), or, with ``equal_mass``, equal
    counts as far as equal confidences can be kept together.
    """
    confidence, correct = _vectors(confidence, correct)
    if confidence.min() < 0 or confidence.max() > 1:
        raise ConfigError(f"confidences lie in [0, 1]; got {confidence.min():g} to {confidence.max():g}")
    if equal_mass:
        edges = np.quantile(confidence, np.arange(1, bins) / bins)
        index = np.searchsorted(edges, confidence, side="right")
    else:
        index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    found = [index == b for b in range(bins)]
    return [
        (int(rows.sum()), float(confidence[rows].mean()), float(correct[rows].mean()))
        for rows in found
        if rows.any()
    ]


def expected_calibration_error(confidence, correct, bins=15, equal_mass=False):
    """Σ_b n_b/n |accuracy_b - confidence_b| (Naeini et al. 2015)."""
    found = calibration_bins(confidence, correct, bins, equal_mass)
    total = sum(count for count, _, _ in found)
    return float(sum(count * abs(right - sure) for count, sure, right in found) / total)


def brier_score(probability, label):
    """Mean squared error of probabilities: (N,) of the event, or (N, C) of classes with label (N,)."""
    probability = np.asarray(probability, dtype=np.float64)
    if probability.ndim == 2:
        onehot = np.asarray(label).reshape(-1, 1) == np.arange(probability.shape[1])
        return float(np.mean(np.sum((probability - onehot) ** 2, axis=1)))
    probability, label = _vectors(probability, label)
    return float(np.mean((probability - label) ** 2))


def negative_log_likelihood(probability, label, floor=1e-12):
    """Mean -log p of what happened; probability as in :func:`brier_score`, cut at ``floor``."""
    probability = np.asarray(probability, dtype=np.float64)
    if probability.ndim == 2:
        happened = np.take_along_axis(probability, np.asarray(label).reshape(-1, 1), axis=1)[:, 0]
    else:
        probability, label = _vectors(probability, label)
        happened = np.where(label > 0.5, probability, 1 - probability)
    return float(-np.mean(np.log(np.maximum(happened, floor))))


# ---------------------------------------------------------------------- answering only when sure
def risk_coverage(confidence, correct):
    """(coverage (n,), risk (n,)): the error among the c/n most confident answers, for c = 1 … n.

    Among equal confidences the expected error of taking some of them at random is used.
    """
    confidence, correct = _vectors(confidence, correct)
    values, inverse = np.unique(-confidence, return_inverse=True)
    error = np.bincount(inverse, 1 - correct) / np.bincount(inverse, minlength=len(values))
    ordered = error[np.sort(inverse)]
    taken = np.arange(1, len(ordered) + 1)
    return taken / len(ordered), np.cumsum(ordered) / taken


def aurc(confidence, correct):
    """Area under the risk–coverage curve: the mean risk over all coverages (Geifman & El-Yaniv 2017)."""
    return float(np.mean(risk_coverage(confidence, correct)[1]))


def excess_aurc(confidence, correct):
    """AURC above that of a perfect ranking of the same answers, e + (1-e) ln(1-e) (Geifman et al. 2019)."""
    (correct,) = _vectors(correct)
    wrong = 1 - correct.mean()
    best = wrong + (1 - wrong) * np.log1p(-wrong) if wrong < 1 else 1.0
    return aurc(confidence, correct) - float(best)


def augrc(confidence, correct):
    """Mean over coverages of the share of all samples that are answered and wrong (Traub et al. 2024)."""
    coverage, risk = risk_coverage(confidence, correct)
    return float(np.mean(coverage * risk))


def coverage_at_risk(confidence, correct, risk):
    """Largest share of answers that can be given with at most this error; 0 if none."""
    coverage, found = risk_coverage(confidence, correct)
    confidence = np.sort(np.asarray(confidence, dtype=np.float64).reshape(-1))[::-1]
    complete = np.append(confidence[:-1] != confidence[1:], True)  # a threshold takes all equals or none
    allowed = coverage[complete & (found <= risk)]
    return float(allowed.max()) if len(allowed) else 0.0


def effective_reliability(correct, answered, penalty=1.0):
    """Φ_c: +1 for a right answer, 0 for none, -c for a wrong one, on average (Whitehead et al. 2022)."""
    correct, answered = _vectors(correct, answered)
    return float(np.mean(answered * (correct - penalty * (1 - correct))))


def tool_outcomes(right_alone, right_with_tool, called):
    """What calling a tool did, from both branches of every question; a dict of shares.

    A call is needed where the answer alone is wrong and the one with the tool right.  ``help_rate`` and
    ``harm_rate`` are shares of all questions: wrong made right, right made wrong, by the calls made.
    """
    alone, tool, called = (a > 0.5 for a in _vectors(right_alone, right_with_tool, called))
    needed = ~alone & tool
    gated = np.where(called, tool, alone)
    return {
        "accuracy_alone": float(alone.mean()),
        "accuracy_gated": float(gated.mean()),
        "accuracy_always": float(tool.mean()),
        "accuracy_oracle": float((alone | tool).mean()),
        "call_rate": float(called.mean()),
        "precision": float(needed[called].mean()) if called.any() else float("nan"),
        "recall": float(called[needed].mean()) if needed.any() else float("nan"),
        "help_rate": float((called & needed).mean()),
        "harm_rate": float((called & alone & ~tool).mean()),
    }


# ---------------------------------------------------------------------- embeddings
def effective_rank(x):
    """exp of the entropy of the normalised singular values of x (N, D) (Roy & Vetterli 2007).

    Between 1 (all rows on one line through the origin) and min(N, D).
    """
    x = np.asarray(x, dtype=np.float64)
    if len(x) > 4 * x.shape[1]:
        x = np.linalg.qr(x, mode="r")  # has the same singular values, in few rows
    sigma = np.linalg.svd(x, compute_uv=False)
    total = sigma.sum()
    if not total:
        return 1.0
    share = sigma / total
    share = share[share > 0]
    return float(np.exp(-np.sum(share * np.log(share))))


def mean_cosine(x):
    """Mean cosine between different rows of x (N, D): near 1 means collapse."""
    x = np.asarray(x, dtype=np.float64)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    n = len(x)
    total = np.sum(x.sum(axis=0) ** 2) - np.sum(x * x)
    return float(total / (n * (n - 1))) if n > 1 else float("nan")


def alignment(p, q):
    """Mean squared distance of paired unit vectors (Wang & Isola 2020); 0 is perfect."""
    p, q = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    return float(np.mean(np.sum((p - q) ** 2, axis=1)))


def uniformity(x, t=2.0):
    """log of the mean of exp(-t |x_i - x_j|²) over pairs of different rows (Wang & Isola 2020)."""
    x = np.asarray(x, dtype=np.float64)
    square = np.sum(x * x, axis=1)
    rows, columns = np.triu_indices(len(x), 1)
    distance = np.maximum(square[rows] + square[columns] - 2 * (x @ x.T)[rows, columns], 0)
    return float(np.log(np.mean(np.exp(-t * distance))))


# ---------------------------------------------------------------------- how sure the measurement is
def bootstrap_interval(statistic, *arrays, rng, resamples=1000, level=0.95, groups=None):
    """Percentile interval of ``statistic(*arrays)`` under resampling of the samples (Efron 1979).

    groups : (n,) labels; whole groups are drawn, as befits questions that share an image.  Resamples in
        which the statistic is not a number (an empty class, say) are left out.
    """
    arrays = [np.asarray(a) for a in arrays]
    count = len(arrays[0])
    if count < 1 or any(len(a) != count for a in arrays) or not 0 < level < 1:
        raise ConfigError(f"needs arrays of one length of at least 1 and a level in (0, 1); got {level}")
    if groups is not None:
        _, inverse = np.unique(np.asarray(groups), return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        members = np.split(order, np.cumsum(np.bincount(inverse))[:-1])
    values = []
    for _ in range(resamples):
        if groups is None:
            rows = rng.integers(0, count, count)
        else:
            rows = np.concatenate([members[g] for g in rng.integers(0, len(members), len(members))])
        values.append(statistic(*(a[rows] for a in arrays)))
    finite = np.asarray(values, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return float("nan"), float("nan")
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_interval(value, rng, groups=None, resamples=1000, level=0.95):
    """``bootstrap_interval`` of a mean, for many intervals at once: the sums of whole groups are resampled.

    Where the groups' means are all the same, as where everything is right, resampling shows no spread; for values
    in [0, 1] the interval is then Wilson's (1927), with as many trials as there are groups.
    """
    (value,) = _vectors(value)
    if groups is None:
        sums, counts = value, np.ones(len(value))
    else:
        if len(groups) != len(value):
            raise ShapeError(f"{len(groups)} groups for {len(value)} samples")
        _, inverse = np.unique(np.asarray(groups), return_inverse=True)
        sums, counts = np.bincount(inverse, value), np.bincount(inverse)
    total, mean = len(sums), float(value.mean())
    if np.ptp(sums / counts) <= 1e-12:
        return wilson_interval(mean * total, total) if 0 <= mean <= 1 else (mean, mean)
    found = []
    for start in range(0, resamples, 100):  # a hundred at a time: a million groups must not fill the memory
        drawn = rng.integers(0, total, (min(100, resamples - start), total))
        found.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def jackknife_interval(statistic, parts, whole, t=2.2621571627409915):
    """Interval for what a bootstrap distorts, such as a rank, which repeated rows lower (Tukey 1958).

    statistic(part) is taken once without each of the ``parts``: a list of index arrays, ten of them for the default
    ``t`` (the 97.5 % point of Student's t with 9 degrees of freedom).   whole : (n,) all indices.
    """
    every = float(statistic(whole))
    left = [float(statistic(np.setdiff1d(whole, part, assume_unique=True))) for part in parts]
    pseudo = len(parts) * every - (len(parts) - 1) * np.array(left)
    half = t * pseudo.std(ddof=1) / np.sqrt(len(parts))
    return every - float(half), every + float(half)
