"""What keeps embeddings from collapsing onto one point or one line: terms beside a loss between pairs.

x (N, D) holds one embedding per row.  Sums are float64.
"""

import numpy as np

from xuracore.errors import ConfigError, ShapeError
from xuracore.ops.arrays import floating
from xuracore.ops.elementwise import add, multiply
from xuracore.ops.losses import mse_loss
from xuracore.ops.registry import primitive


def _rows(name, x, least):
    x = floating(x)
    if x.ndim != 2 or len(x) < least or not x.shape[1]:
        raise ShapeError(f"{name}: x {x.shape} must be (N, D) with N ≥ {least} and D ≥ 1")
    return x


# ---------------------------------------------------------------------- uniformity
def _uniformity_loss_forward(x, labels=None, temperature=2.0):
    """log mean_{i≠j} exp(-t |x_i - x_j|²) over the rows of x (N, D), usually of unit length (Wang & Isola 2020).

    The lower, the more evenly the rows lie on the sphere.  labels (N,): rows with equal labels are meant to
    lie together, so their pairs do not count.  0 where there is no pair.  temperature : t > 0.
    """
    x = _rows("uniformity_loss", x, 1)
    if not temperature > 0:
        raise ConfigError(f"uniformity_loss: temperature is {temperature}; expected a positive number")
    apart = ~np.eye(len(x), dtype=bool)
    if labels is not None:
        labels = np.asarray(labels)
        if labels.shape != (len(x),):
            raise ShapeError(f"uniformity_loss: labels have shape {labels.shape}; expected ({len(x)},)")
        apart = labels[:, None] != labels[None, :]
    pairs = np.count_nonzero(apart)
    if not pairs:
        return np.zeros((), x.dtype), (x, np.zeros(apart.shape), temperature)
    wide = x.astype(np.float64)
    square = np.sum(wide * wide, axis=1)
    exponent = -temperature * np.maximum(square[:, None] + square[None, :] - 2 * wide @ wide.T, 0)
    exponent[~apart] = -np.inf
    top = exponent.max()
    share = np.exp(exponent - top)
    total = share.sum()
    return np.asarray(top + np.log(total / pairs), x.dtype), (x, share / total, temperature)


def _uniformity_loss_vjp(grad, saved, needs):
    x, share, temperature = saved
    factor = -4 * temperature * float(grad)
    return (factor * (x * share.sum(axis=1, keepdims=True) - share @ x)).astype(x.dtype), None


def _uniformity_loss_reference(x, labels=None, temperature=2.0):
    terms = [np.exp(-temperature * np.sum((a - b) ** 2)) for i, a in enumerate(x) for j, b in enumerate(x)
             if (i != j if labels is None else labels[i] != labels[j])]
    return np.log(np.mean(terms)) if terms else np.zeros(())


def _uniformity_loss_samples(rng):
    x = rng.standard_normal((5, 3))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    yield (x,), {}
    yield (x, np.array([0, 1, 0, 2, 2])), {}
    yield (x,), {"temperature": 0.5}
    yield (x, np.zeros(5, int)), {}
    yield (x[:1],), {}


uniformity_loss = primitive("uniformity_loss", _uniformity_loss_forward, _uniformity_loss_vjp,
                            reference=_uniformity_loss_reference, samples=_uniformity_loss_samples)


# ---------------------------------------------------------------------- variance and covariance
def _variance_hinge_forward(x, target=1.0, eps=1e-4):
    """mean_j max(0, target - √(var_j + eps)) over the columns of x (N, D), var_j with N - 1 (VICReg, eq. 1)."""
    x = _rows("variance_hinge", x, 2)
    centred = x.astype(np.float64) - x.mean(axis=0, dtype=np.float64)
    spread = np.sqrt(np.sum(centred * centred, axis=0) / (len(x) - 1) + eps)
    loss = np.mean(np.maximum(target - spread, 0))
    slope = np.where(spread < target, -centred / (spread * (len(x) - 1) * x.shape[1]), 0)
    return np.asarray(loss, x.dtype), slope.astype(x.dtype)


def _variance_hinge_vjp(grad, saved, needs):
    return (grad * saved,)


def _variance_hinge_samples(rng):
    yield (0.3 * rng.standard_normal((6, 4)),), {}
    yield (2 * rng.standard_normal((5, 3)),), {"target": 1.5, "eps": 0.01}
    yield (rng.standard_normal((2, 1)),), {"target": 9.0}


variance_hinge = primitive(
    "variance_hinge", _variance_hinge_forward, _variance_hinge_vjp, samples=_variance_hinge_samples,
    reference=lambda x, target=1.0, eps=1e-4: np.maximum(target - np.sqrt(x.var(axis=0, ddof=1) + eps), 0).mean(),
)  # fmt: skip


def _covariance_penalty_forward(x):
    """Σ_{i≠j} C_ij² / D with C the (D, D) covariance of the columns of x (N, D), with N - 1 (VICReg, eq. 4)."""
    x = _rows("covariance_penalty", x, 2)
    centred = x.astype(np.float64) - x.mean(axis=0, dtype=np.float64)
    covariance = centred.T @ centred / (len(x) - 1)
    np.fill_diagonal(covariance, 0)
    loss = np.sum(covariance * covariance) / x.shape[1]
    return np.asarray(loss, x.dtype), (4 * centred @ covariance / ((len(x) - 1) * x.shape[1])).astype(x.dtype)


def _covariance_penalty_reference(x):
    total = 0.0
    for i in range(x.shape[1]):
        for j in range(x.shape[1]):
            if i != j:
                a, b = x[:, i] - x[:, i].mean(), x[:, j] - x[:, j].mean()
                total += (a @ b / (len(x) - 1)) ** 2
    return np.asarray(total / x.shape[1])


def _covariance_penalty_samples(rng):
    yield (rng.standard_normal((6, 4)),), {}
    yield (rng.standard_normal((2, 3)),), {}
    yield (rng.standard_normal((4, 1)),), {}


covariance_penalty = primitive("covariance_penalty", _covariance_penalty_forward, _variance_hinge_vjp,
                               reference=_covariance_penalty_reference, samples=_covariance_penalty_samples)


def vicreg_loss(a, b, invariance=25.0, variance=25.0, covariance=1.0):
    """Variance, invariance and covariance (VICReg, Bardes et al. 2022) of pairs a, b (N, D); no negatives.

    invariance · mean (a - b)²  +  variance · ½ (hinge a + hinge b)  +  covariance · (penalty a + penalty b).
    The hinge asks for a standard deviation of 1 in every column: give rows of length √D, not 1.
    """
    hinge = multiply(add(variance_hinge(a), variance_hinge(b)), 0.5 * variance)
    apart = multiply(add(covariance_penalty(a), covariance_penalty(b)), covariance)
    return add(add(multiply(mse_loss(a, b), invariance), hinge), apart)
