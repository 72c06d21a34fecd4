"""The linear probe: how far a straight line through given numbers gets, to read other accuracies beside.

Softmax regression with an L2 penalty, minimised by L-BFGS (Nocedal & Wright 2006, algorithms 7.4 and 7.5): convex, so
nothing depends on a seed.
"""

from dataclasses import dataclass

import numpy as np

from xuracore.errors import ConfigError, ShapeError

PENALTIES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1)
_MEMORY = 10  # pairs of steps and changes of the gradient


@dataclass(frozen=True)
class LinearProbe:
    """A fitted probe: ``probe.classes(x)`` (n,) for inputs (n, d); weight (d, k), bias (k,) of standardised inputs."""

    mean: np.ndarray
    scale: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    labels: np.ndarray
    penalty: float

    def classes(self, x):
        """The likeliest label of each row of x (n, d)."""
        return self.labels[(((x - self.mean) / self.scale) @ self.weight + self.bias).argmax(axis=1)]

    def accuracy(self, x, labels):
        """Share of the rows of x (n, d) whose label is right."""
        return float(np.mean(self.classes(x) == np.asarray(labels)))


def fit(x, labels, penalty=1e-3, steps=500, tolerance=1e-5):
    """The LinearProbe of inputs x (n, d), float64, and their labels (n,).

    Minimises the mean cross-entropy plus penalty / 2 times the squared weights of the standardised inputs.
    """
    x, labels = np.asarray(x, np.float64), np.asarray(labels)
    if x.ndim != 2 or len(x) != len(labels) or not len(x):
        raise ShapeError(f"inputs are {x.shape} and labels {labels.shape}; expected (n, d) and (n,)")
    known, target = np.unique(labels, return_inverse=True)
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale[scale < 1e-12] = 1.0  # an input that is always the same says nothing
    x = np.hstack([(x - mean) / scale, np.ones((len(x), 1))])
    decay = np.full((x.shape[1], 1), penalty)
    decay[-1] = 0.0
    rows = np.arange(len(x))

    def objective(flat):
        weight = flat.reshape(x.shape[1], len(known))
        logits = x @ weight
        logits -= logits.max(axis=1, keepdims=True)
        p = np.exp(logits)
        total = p.sum(axis=1, keepdims=True)
        loss = np.mean(np.log(total[:, 0]) - logits[rows, target]) + 0.5 * np.sum(decay * weight**2)
        p /= total
        p[rows, target] -= 1
        return loss, (x.T @ p / len(x) + decay * weight).ravel()

    weight = minimise(objective, np.zeros(x.shape[1] * len(known)), steps, tolerance).reshape(x.shape[1], -1)
    return LinearProbe(mean, scale, weight[:-1], weight[-1], known, penalty)


def fit_best(x, labels, penalties=PENALTIES, folds=5):
    """The probe of the penalty that is best in cross-validation; row i belongs to fold i mod ``folds``."""
    x, labels = np.asarray(x, np.float64), np.asarray(labels)
    if folds < 2 or len(x) < folds:
        raise ConfigError(f"{len(x)} rows cannot be parted into {folds} folds")
    fold = np.arange(len(x)) % folds

    def score(penalty):
        return np.mean([fit(x[fold != i], labels[fold != i], penalty).accuracy(x[fold == i], labels[fold == i])
                        for i in range(folds)])

    return fit(x, labels, max(penalties, key=score))


def minimise(objective, start, steps=500, tolerance=1e-5):
    """Where ``objective(x) → (value, gradient)`` is least, from ``start`` (n,), by L-BFGS with backtracking.

    Ends when no entry of the gradient exceeds ``tolerance``, or after ``steps``.
    """
    x, (value, gradient) = start, objective(start)
    pairs = []
    for _ in range(steps):
        if np.abs(gradient).max() <= tolerance:
            break
        direction = -_inverse_hessian(pairs, gradient)
        slope = gradient @ direction
        if slope >= 0:  # rounding has spoilt the memory
            pairs, direction, slope = [], -gradient, -(gradient @ gradient)
        length = 1.0
        while (found := objective(x + length * direction))[0] > value + 1e-4 * length * slope:
            length /= 2
            if length < 1e-12:
                return x
        step, change = length * direction, found[1] - gradient
        if step @ change > 1e-12 * (change @ change):
            pairs = [*pairs[1 - _MEMORY :], (step, change)]
        x, (value, gradient) = x + step, found
    return x


def _inverse_hessian(pairs, gradient):
    """The two loops of L-BFGS: an approximate inverse Hessian times the gradient."""
    q, shares = gradient.copy(), []
    for step, change in reversed(pairs):
        shares.append((step @ q) / (step @ change))
        q -= shares[-1] * change
    if pairs:
        step, change = pairs[-1]
        q *= (step @ change) / (change @ change)
    for (step, change), share in zip(pairs, reversed(shares)):
        q += (share - (change @ q) / (step @ change)) * step
    return q
