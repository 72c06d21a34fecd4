"""Contrastive losses between predicted and target embeddings.

p (B, D) are predictions, q (K, D) targets, both of unit length (see ``l2_normalize``); the
temperature enters as t = ``log_scale``, with logits L = e^t p qᵀ.  Gradients flow to p, q and t.
Sums are float64.
"""

import numpy as np

from xuracore.errors import DTypeError, ShapeError
from xuracore.ops.arrays import floating
from xuracore.ops.registry import primitive


def _embeddings(name, p, q):
    p, q = floating(p), np.asarray(q)
    if p.ndim != 2 or q.ndim != 2 or p.shape[1] != q.shape[1] or not len(p) or not len(q):
        raise ShapeError(f"{name}: p {p.shape} and q {q.shape} must be (B, D) and (K, D), not empty")
    return p, q.astype(p.dtype, copy=False)


def _positions(name, p, q, target_index):
    index = np.asarray(target_index)
    if index.dtype.kind not in "iu":
        raise DTypeError(f"{name}: target_index is {index.dtype}; expected integers")
    if index.shape != (len(p),):
        raise ShapeError(f"{name}: target_index has shape {index.shape}; expected one for each of {len(p)} p")
    if index.min() < 0 or index.max() >= len(q):
        raise IndexError(f"{name}: target_index {index.min()}..{index.max()}, but there are {len(q)} targets")
    return index


def _logits(p, q, log_scale):
    """Cosines S = p qᵀ and e^t S, in float64."""
    cosines = (p @ q.T).astype(np.float64)
    scale = float(np.exp(np.asarray(log_scale, dtype=np.float64).item()))
    return cosines, scale, scale * cosines


def _spread(grad, saved, shape):
    """Gradients of p, q and t from those of the logits: dp = s G q, dq = s Gᵀ p, dt = s Σ G∘S."""
    p, q, cosines, scale, slope = saved
    scaled = (float(grad) * scale * slope).astype(p.dtype)
    to_scale = np.asarray(float(grad) * scale * np.sum(slope * cosines), dtype=p.dtype).reshape(shape)
    return scaled @ q, scaled.T @ p, to_scale


def _log_softmax(x, axis):
    shifted = x - x.max(axis=axis, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))


def _multi_positive(p, q, index, log_scale, log_prior=0.0):
    """Loss and its slope with respect to the logits; see :func:`_multi_positive_info_nce_forward`."""
    cosines, scale, logits = _logits(p, q, log_scale)
    hit = np.zeros_like(logits)
    hit[np.arange(len(p)), index] = 1
    count = hit.sum(axis=0)
    present = np.count_nonzero(count)
    share = hit / np.maximum(count, 1)
    by_row, by_column = _log_softmax(logits + log_prior, 1), _log_softmax(logits, 0)
    loss = -0.5 * (by_row[hit > 0].sum() / len(p) + np.sum(share * by_column) / present)
    slope = 0.5 * ((np.exp(by_row) - hit) / len(p) + (np.exp(by_column) * (count > 0) - share) / present)
    return loss, (p, q, cosines, scale, slope)


# ---------------------------------------------------------------------- InfoNCE
def _info_nce_forward(p, q, log_scale):
    """Paired, symmetric InfoNCE (CLIP, Radford et al. 2021): p[i] belongs to q[i], all others are negatives.

    p, q (B, D) of unit length; log_scale : one number t.  Mean of the row-wise and the column-wise
    cross-entropy of e^t p qᵀ.
    """
    p, q = _embeddings("info_nce", p, q)
    if len(p) != len(q):
        raise ShapeError(f"info_nce: {len(p)} predictions, {len(q)} targets; they are pairs")
    loss, saved = _multi_positive(p, q, np.arange(len(p)), log_scale)
    return np.asarray(loss, dtype=p.dtype), (saved, np.shape(log_scale))


def _info_nce_vjp(grad, saved, needs):
    return _spread(grad, *saved)


def _info_nce_reference(p, q, log_scale):
    logits = np.exp(log_scale) * p @ q.T
    n = np.arange(len(p))
    rows = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    columns = logits - np.log(np.exp(logits).sum(0, keepdims=True))
    return -0.5 * (rows[n, n].mean() + columns[n, n].mean())


def _unit(rng, *shape):
    x = rng.standard_normal(shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _info_nce_samples(rng):
    yield (_unit(rng, 4, 5), _unit(rng, 4, 5), np.array(1.0)), {}
    yield (_unit(rng, 6, 2), _unit(rng, 6, 2), np.array(2.6)), {}
    yield (_unit(rng, 1, 3), _unit(rng, 1, 3), np.array(0.5)), {}


info_nce = primitive("info_nce", _info_nce_forward, _info_nce_vjp, reference=_info_nce_reference,
                     samples=_info_nce_samples)


def _multi_positive_info_nce_forward(p, q, target_index, log_scale, log_prior=None):
    """InfoNCE with K distinct targets, each the positive of any number of predictions.

    p (B, D), q (K, D) of unit length; target_index (B,) says which q each p belongs to.  With M the
    0/1 matrix of that, c_k = Σ_i M_ik and L = e^t p qᵀ:

        rows     -(1/B) Σ_i log softmax_k(L_i·)[target_i]
        columns  -(1/K) Σ_k Σ_i (M_ik / c_k) log softmax_i(L_·k)[i]          loss = ½ (rows + columns)

    Targets that no p belongs to (extra negatives) count in the rows only.  With a distinct target
    for every p this is ``info_nce``.  The column term cannot fall below mean_k log c_k.

    log_prior (K,), not differentiated, is added to the logits of the rows: how frequent each target is.  What
    p and q then learn is how much more likely than usual a target is (Menon et al. 2021).  With log c_k the
    rows are those of ``info_nce`` on repeated targets.
    """
    name = "multi_positive_info_nce"
    p, q = _embeddings(name, p, q)
    if log_prior is not None and np.shape(log_prior) != (len(q),):
        raise ShapeError(f"{name}: log_prior has shape {np.shape(log_prior)}; expected one for each of {len(q)} q")
    prior = 0.0 if log_prior is None else np.asarray(log_prior, np.float64)
    loss, saved = _multi_positive(p, q, _positions(name, p, q, target_index), log_scale, prior)
    return np.asarray(loss, dtype=p.dtype), (saved, np.shape(log_scale))


def _multi_positive_info_nce_vjp(grad, saved, needs):
    to_p, to_q, to_scale = _spread(grad, *saved)
    return to_p, to_q, None, to_scale, None


def _multi_positive_info_nce_reference(p, q, target_index, log_scale, log_prior=None):
    logits = np.exp(log_scale) * p @ q.T
    weight = np.ones(len(q)) if log_prior is None else np.exp(log_prior)
    rows = columns = 0.0
    for i, k in enumerate(target_index):
        rows -= np.log(weight[k] * np.exp(logits[i, k]) / (weight * np.exp(logits[i])).sum()) / len(p)
    present = np.unique(target_index)
    for k in present:
        members = np.flatnonzero(target_index == k)
        for i in members:
            columns -= np.log(np.exp(logits[i, k]) / np.exp(logits[:, k]).sum()) / len(members) / len(present)
    return 0.5 * (rows + columns)


def _targets(rng):
    yield (_unit(rng, 5, 4), _unit(rng, 3, 4), np.array([0, 2, 0, 1, 0]), np.array(1.5)), {}
    yield (_unit(rng, 4, 3), _unit(rng, 6, 3), np.array([5, 5, 1, 0]), np.array(2.0)), {}
    yield (_unit(rng, 2, 3), _unit(rng, 1, 3), np.array([0, 0]), np.array(1.0)), {}


def _multi_positive_info_nce_samples(rng):
    yield from _targets(rng)
    prior = (0.1, -0.5, 0.7)
    yield (_unit(rng, 4, 3), _unit(rng, 3, 3), np.array([0, 1, 0, 2]), np.array(1.2)), {"log_prior": prior}


multi_positive_info_nce = primitive(
    "multi_positive_info_nce", _multi_positive_info_nce_forward, _multi_positive_info_nce_vjp,
    reference=_multi_positive_info_nce_reference, samples=_multi_positive_info_nce_samples)


# ---------------------------------------------------------------------- sigmoid
def _sigmoid_contrastive_loss_forward(p, q, target_index, log_scale, bias):
    """Every pair judged alone (SigLIP, Zhai et al. 2023): (1/B) Σ_ij softplus(-z_ij (e^t p_i·q_j + bias)).

    p (B, D), q (K, D) of unit length; z_ij is +1 where target_index[i] = j, else -1.  Usual start:
    t = log 10, bias = -10.
    """
    name = "sigmoid_contrastive_loss"
    p, q = _embeddings(name, p, q)
    index = _positions(name, p, q, target_index)
    cosines, scale, logits = _logits(p, q, log_scale)
    sign = -np.ones_like(logits)
    sign[np.arange(len(p)), index] = 1
    margin = -sign * (logits + np.asarray(bias, dtype=np.float64).item())
    loss = np.sum(np.logaddexp(0, margin)) / len(p)
    slope = -sign * 0.5 * (1 + np.tanh(0.5 * margin)) / len(p)
    saved = (p, q, cosines, scale, slope), np.shape(log_scale), np.shape(bias)
    return np.asarray(loss, dtype=p.dtype), saved


def _sigmoid_contrastive_loss_vjp(grad, saved, needs):
    inner, shape, bias_shape = saved
    to_p, to_q, to_scale = _spread(grad, inner, shape)
    to_bias = np.asarray(float(grad) * np.sum(inner[-1]), dtype=to_p.dtype).reshape(bias_shape)
    return to_p, to_q, None, to_scale, to_bias


def _sigmoid_contrastive_loss_reference(p, q, target_index, log_scale, bias):
    total = 0.0
    for i, k in enumerate(target_index):
        for j in range(len(q)):
            logit = np.exp(log_scale) * p[i] @ q[j] + bias
            total += np.log1p(np.exp(-logit if j == k else logit))
    return total / len(p)


def _sigmoid_contrastive_loss_samples(rng):
    for inputs, _ in _targets(rng):
        yield (*inputs, np.array(-1.0)), {}


sigmoid_contrastive_loss = primitive(
    "sigmoid_contrastive_loss", _sigmoid_contrastive_loss_forward, _sigmoid_contrastive_loss_vjp,
    reference=_sigmoid_contrastive_loss_reference, samples=_sigmoid_contrastive_loss_samples)
