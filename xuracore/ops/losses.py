"""Losses: classification, regression, and the contrastive ones of the joint embedding.

``reduction`` is "mean", "sum" or "none".  Sums are taken in float64, whatever the inputs are; the
result has the dtype of the first input.
"""

import numpy as np

from xuracore.errors import ConfigError, DTypeError, ShapeError
from xuracore.kernels import activation
from xuracore.kernels import cross_entropy as kernels
from xuracore.ops.activation import relu
from xuracore.ops.arrays import flat, floating, rows, vector
from xuracore.ops.elementwise import add, subtract, where
from xuracore.ops.reduce import mean, norm
from xuracore.ops.reduce import sum as sum_of
from xuracore.ops.registry import primitive

INT64 = np.dtype(np.int64)


def _reduce(loss, reduction, dtype, count=None):
    """The reduced loss, and what each element's gradient is multiplied by."""
    if reduction == "none":
        return loss.astype(dtype), 1.0
    if reduction not in ("mean", "sum"):
        raise ConfigError(f"reduction={reduction!r}; expected 'mean', 'sum' or 'none'")
    share = 1.0 / max(loss.size if count is None else count, 1) if reduction == "mean" else 1.0
    return np.asarray(np.add.reduce(loss, axis=None, dtype=np.float64) * share, dtype=dtype), share


# ---------------------------------------------------------------------- cross-entropy
def _cross_entropy_forward(logits, target, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    """-log softmax(logits)[target], with label smoothing (Szegedy et al. 2016).

    logits (..., V); target (...) integers in [0, V), or ``ignore_index`` for positions that do not
    count.  The mean is over the positions that count; if none does, the loss is 0.
    label_smoothing ε : the target distribution is 1-ε on the target plus ε/V everywhere.
    """
    logits = floating(logits)
    target = np.asarray(target)
    shape = logits.shape
    if target.dtype.kind not in "iu":
        raise DTypeError(f"cross_entropy: target is {target.dtype}; expected integer class indices")
    if target.shape != shape[:-1]:
        raise ShapeError(f"cross_entropy: target has shape {target.shape}; logits {shape} need {shape[:-1]}")
    if not 0 <= label_smoothing <= 1:
        raise ConfigError(f"label_smoothing={label_smoothing}; expected a number in [0, 1]")
    classes, count = shape[-1], target.size
    seen = logits if len(shape) == 2 and logits.flags.carray else rows(logits)
    index = flat(target)
    if index.dtype is not INT64:
        index = index.astype(np.int64)
    loss, log_sum, top, sums = np.empty(count), np.empty(count), np.empty(count, seen.dtype), np.empty(3)
    settings = int(ignore_index), float(label_smoothing)
    if seen.size:
        kernels.cross_entropy_forward.sized(10 * seen.size)(seen, index, top, *settings, loss, log_sum)
    else:
        loss[...] = 0  # without classes every target is ignored
    kernels.total_loss(loss, index, settings[0], classes, sums)
    total, ignored, wrong = sums.tolist()
    if wrong:
        first = index[(index != ignore_index) & ((index < 0) | (index >= classes))][0]
        raise IndexError(f"cross_entropy: target {first} is outside the {classes} classes "
                         f"(and is not ignore_index={ignore_index})")
    share = 1.0
    if reduction == "mean":
        share /= max(count - ignored, 1)
    elif reduction == "none":
        return loss.reshape(target.shape).astype(seen.dtype), (seen, index, top, log_sum, settings, 1.0, shape)
    elif reduction != "sum":
        raise ConfigError(f"reduction={reduction!r}; expected 'mean', 'sum' or 'none'")
    return np.array(total * share, seen.dtype), (seen, index, top, log_sum, settings, share, shape)


def _cross_entropy_vjp(grad, saved, needs):
    seen, index, top, log_sum, settings, share, shape = saved
    weight = np.empty(len(seen))
    weight[...] = flat(grad) * share
    dx = np.empty_like(seen)
    kernels.cross_entropy_backward.sized(10 * seen.size)(weight, seen, index, top, log_sum, *settings, dx)
    return dx.reshape(shape), None


def _cross_entropy_reference(logits, target, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    keep = target != ignore_index
    hit = np.take_along_axis(log_p, np.where(keep, target, 0)[..., None], axis=-1)[..., 0]
    loss = -np.where(keep, (1 - label_smoothing) * hit + label_smoothing * log_p.mean(-1), 0)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / max(keep.sum(), 1)}[reduction]


def _cross_entropy_samples(rng):
    logits, target = 2 * rng.standard_normal((5, 4)), np.array([0, 3, -100, 2, 2])
    for reduction in ("mean", "sum", "none"):
        yield (logits, target), {"reduction": reduction, "label_smoothing": 0.1}
    yield (rng.standard_normal((2, 3, 4)), rng.integers(0, 4, (2, 3))), {}
    yield (logits, np.full(5, -100)), {}
    yield (rng.standard_normal((2, 1)), np.zeros(2, int)), {"ignore_index": -1}
    yield (rng.standard_normal(3), np.array(1)), {}


cross_entropy = primitive("cross_entropy", _cross_entropy_forward, _cross_entropy_vjp,
                          reference=_cross_entropy_reference, samples=_cross_entropy_samples)


def _nll_loss_forward(log_p, target, weight=None, ignore_index=-100, reduction="mean"):
    """-weight[target] log_p[target]: :func:`cross_entropy` for logarithms of probabilities.

    log_p (..., V); target (...) integers in [0, V) or ``ignore_index``; weight (V,) or None, not
    differentiated.  The mean is divided by the sum of the weights of the positions that count.
    """
    log_p, target = floating(log_p), np.asarray(target)
    classes = log_p.shape[-1]
    if target.dtype.kind not in "iu":
        raise DTypeError(f"nll_loss: target is {target.dtype}; expected integer class indices")
    if target.shape != log_p.shape[:-1]:
        raise ShapeError(f"nll_loss: target has shape {target.shape}; log_p {log_p.shape} need {log_p.shape[:-1]}")
    keep = target != ignore_index
    index = np.where(keep, target, 0)
    if index.size and (index.min() < 0 or index.max() >= classes):
        raise IndexError(f"nll_loss: a target is outside the {classes} classes (and is not {ignore_index})")
    each = vector(weight, classes, log_p.dtype, 1, "weight")[index] * keep
    picked = np.take_along_axis(log_p, index[..., None], axis=-1)[..., 0]
    count = np.sum(each, dtype=np.float64)
    value, share = _reduce(np.where(keep, -each * picked, 0), reduction, log_p.dtype, count if count > 0 else 1)
    return value, (index, each, share, log_p.shape)


def _nll_loss_vjp(grad, saved, needs):
    index, each, share, shape = saved
    out = np.zeros(shape, grad.dtype)
    np.put_along_axis(out, index[..., None], (-grad * each * grad.dtype.type(share))[..., None], axis=-1)
    return out, None, None


def _nll_loss_reference(log_p, target, weight=None, ignore_index=-100, reduction="mean"):
    weight = np.ones(log_p.shape[-1]) if weight is None else np.asarray(weight)
    each = np.array([0 if t == ignore_index else weight[t] for t in target.flat]).reshape(target.shape)
    hit = np.array([row[max(t, 0)] for row, t in zip(log_p.reshape(-1, log_p.shape[-1]), target.flat)])
    loss = -each * hit.reshape(target.shape)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / (each.sum() or 1)}[reduction]


def _nll_loss_samples(rng):
    log_p, target = -rng.uniform(0.1, 2, (5, 4)), np.array([0, 3, -100, 2, 2])
    for reduction in ("mean", "sum", "none"):
        yield (log_p, target), {"reduction": reduction}
    yield (log_p, target), {"weight": (1, 2, 3, 4)}
    yield (-rng.random((2, 3, 4)), rng.integers(0, 4, (2, 3))), {"ignore_index": 3}


nll_loss = primitive("nll_loss", _nll_loss_forward, _nll_loss_vjp, reference=_nll_loss_reference,
                     samples=_nll_loss_samples)


# ---------------------------------------------------------------------- elementwise losses
def _same_shape(name, a, b):
    a, b = floating(a), np.asarray(b)
    if a.shape != b.shape:
        raise ShapeError(f"{name}: prediction {a.shape} and target {b.shape} must have one shape")
    return a, b.astype(a.dtype, copy=False)


def _bce_with_logits_forward(logits, target, weight=None, reduction="mean"):
    """softplus(x) - t x: the cross-entropy of sigmoid(x) against probabilities t.

    logits, target : one shape; weight : broadcasts to it, multiplies each element's loss (the mean
    still divides by the number of elements).
    """
    x, t = _same_shape("bce_with_logits", logits, target)
    weight = None if weight is None else np.asarray(weight, dtype=x.dtype)
    seen, positive = flat(x), np.empty(x.size, x.dtype)
    activation.softplus_forward.sized(10 * x.size)(seen, positive)
    loss = positive.reshape(x.shape) - t * x
    value, share = _reduce(loss if weight is None else weight * loss, reduction, x.dtype)
    return value, (seen, t, weight, share)


def _bce_with_logits_vjp(grad, saved, needs):
    seen, t, weight, share = saved
    scaled = np.broadcast_to(grad, t.shape) * t.dtype.type(share) * (1 if weight is None else weight)
    p = np.empty_like(seen)
    activation.sigmoid_forward.sized(10 * seen.size)(seen, p)
    return scaled * (p.reshape(t.shape) - t), -scaled * seen.reshape(t.shape) if needs[1] else None, None


def _bce_with_logits_reference(x, t, weight=None, reduction="mean"):
    loss = (np.logaddexp(0, x) - t * x) * (1 if weight is None else weight)
    return _reduced(loss, reduction)


def _reduced(loss, reduction):
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / max(loss.size, 1)}[reduction]


def _bce_with_logits_samples(rng):
    for reduction in ("mean", "sum", "none"):
        yield (3 * rng.standard_normal((3, 4)), rng.random((3, 4))), {"reduction": reduction}
    yield (rng.standard_normal((3, 2)), rng.random((3, 2)), (1, 2)), {}
    yield (np.array(0.7), np.array(0.2)), {}
    yield (rng.standard_normal((0, 2)), rng.random((0, 2))), {}


bce_with_logits = primitive("bce_with_logits", _bce_with_logits_forward, _bce_with_logits_vjp,
                            reference=_bce_with_logits_reference, samples=_bce_with_logits_samples)


def _binary_cross_entropy_forward(p, target, reduction="mean"):
    """-t log p - (1 - t) log(1 - p) for probabilities p, each logarithm no less than -100.

    From logits, :func:`bce_with_logits` is exact where this one rounds.
    """
    p, t = _same_shape("binary_cross_entropy", p, target)
    if p.size and not (p.min() >= 0 and p.max() <= 1):
        raise ConfigError("binary_cross_entropy: p lies outside [0, 1]; for logits use bce_with_logits")
    tiny = p.dtype.type(np.exp(-87.0))  # the logarithm of 0 is never taken
    yes = np.where(p > 0, np.log(np.maximum(p, tiny)), p.dtype.type(-100))
    no = np.where(p < 1, np.log1p(-np.minimum(p, 1 - np.finfo(p.dtype).epsneg)), p.dtype.type(-100))
    value, share = _reduce(-(t * yes + (1 - t) * no), reduction, p.dtype)
    return value, (p, t, yes, no, share)


def _binary_cross_entropy_vjp(grad, saved, needs):
    p, t, yes, no, share = saved
    scaled = grad * p.dtype.type(share)
    to_p = scaled * (p - t) / np.maximum(p * (1 - p), p.dtype.type(1e-12)) if needs[0] else None
    return to_p, scaled * (no - yes) if needs[1] else None


def _binary_cross_entropy_samples(rng):
    for reduction in ("mean", "sum", "none"):
        yield (rng.uniform(0.05, 0.95, (3, 4)), rng.random((3, 4))), {"reduction": reduction}
    yield (np.array(0.7), np.array(0.2)), {}


binary_cross_entropy = primitive(
    "binary_cross_entropy", _binary_cross_entropy_forward, _binary_cross_entropy_vjp,
    samples=_binary_cross_entropy_samples,
    reference=lambda p, t, reduction="mean": _reduced(-t * np.log(p) - (1 - t) * np.log(1 - p), reduction),
)  # fmt: skip


def _kl_div_forward(log_q, p, log_target=False, reduction="mean"):
    """p (log p - log q), the divergence of ``log_q`` from ``p``, element by element; 0 where p is 0.

    log_target : p is given by its logarithm too.   reduction : also "batchmean", the sum over the first
    size: the divergence itself, where "mean" divides by the number of all elements.
    """
    log_q, p = _same_shape("kl_div", log_q, p)
    log_p = p if log_target else np.log(np.where(p > 0, p, p.dtype.type(1)))
    p = np.exp(p) if log_target else p
    by_batch = reduction == "batchmean"
    loss = p * (log_p - log_q)
    value, share = _reduce(loss, "mean" if by_batch else reduction, p.dtype, len(p) if by_batch else None)
    return value, (loss, p, log_p - log_q, log_target, share)


def _kl_div_vjp(grad, saved, needs):
    loss, p, difference, log_target, share = saved
    scaled = grad * p.dtype.type(share)
    to_p = None
    if needs[1]:
        to_p = scaled * (loss + p) if log_target else scaled * np.where(p > 0, difference + 1, p.dtype.type(0))
    return -scaled * p, to_p


def _kl_div_reference(log_q, p, log_target=False, reduction="mean"):
    loss = np.exp(p) * (p - log_q) if log_target else p * (np.log(p) - log_q)
    return loss.sum() / len(p) if reduction == "batchmean" else _reduced(loss, reduction)


def _kl_div_samples(rng):
    for reduction in ("mean", "sum", "none", "batchmean"):
        yield (-rng.random((3, 4)), rng.uniform(0.1, 1, (3, 4))), {"reduction": reduction}
    yield (-rng.random((3, 4)), -rng.random((3, 4))), {"log_target": True}


kl_div = primitive("kl_div", _kl_div_forward, _kl_div_vjp, reference=_kl_div_reference, samples=_kl_div_samples)


def _difference_loss(name, value_and_slope, reference, explanation, **attributes):
    """An op for a loss that is a function of prediction - target, element by element."""

    def forward(prediction, target, reduction="mean", **settings):
        prediction, target = _same_shape(name, prediction, target)
        loss, slope = value_and_slope(prediction - target, **{**attributes, **settings})
        value, share = _reduce(loss, reduction, prediction.dtype)
        return value, (slope, share)

    def vjp(grad, saved, needs):
        slope, share = saved
        to_prediction = grad * slope.dtype.type(share) * slope
        return to_prediction, -to_prediction if needs[1] else None

    def samples(rng):
        for reduction in ("mean", "sum", "none"):
            yield tuple(3 * rng.standard_normal((2, 4, 3))), {"reduction": reduction, **attributes}
        yield tuple(rng.standard_normal((2, 1))), dict(attributes)
        yield tuple(rng.standard_normal((2, 0, 3))), dict(attributes)

    def of_pair(prediction, target, reduction="mean", **settings):
        return _reduced(reference(prediction - target, **{**attributes, **settings}), reduction)

    forward.__doc__ = explanation
    return primitive(name, forward, vjp, reference=of_pair, samples=samples)


def _smooth(d, beta):
    """d²/2β within β of zero, |d| - β/2 beyond; and its derivative."""
    size, kind = np.abs(d), d.dtype.type
    if beta <= 0:
        return size, np.sign(d)
    near = size < beta
    return (np.where(near, d * d * kind(0.5 / beta), size - kind(0.5 * beta)),
            np.where(near, d * kind(1 / beta), np.sign(d)))


def _huber(d, delta):
    value, slope = _smooth(d, delta)
    return value * d.dtype.type(delta), slope * d.dtype.type(delta)


mse_loss = _difference_loss("mse_loss", lambda d: (d * d, 2 * d), lambda d: d**2,
                            "Squared difference of prediction and target (one shape).")
l1_loss = _difference_loss("l1_loss", lambda d: (np.abs(d), np.sign(d)), np.abs,
                           "Absolute difference of prediction and target (one shape).")
smooth_l1_loss = _difference_loss(
    "smooth_l1_loss", _smooth,
    lambda d, beta: np.where(abs(d) < beta, d**2 / (2 * beta), abs(d) - beta / 2),
    "d²/2β where |d| < β, |d| - β/2 beyond, of d = prediction - target.", beta=1.0)
huber_loss = _difference_loss(
    "huber_loss", _huber,
    lambda d, delta: np.where(abs(d) < delta, d**2 / 2, delta * (abs(d) - delta / 2)),
    "d²/2 where |d| < δ, δ (|d| - δ/2) beyond, of d = prediction - target (Huber 1964).", delta=1.0)


# ---------------------------------------------------------------------- cosine
def _cosine_loss_forward(prediction, target, reduction="mean", eps=1e-8):
    """1 - cos(prediction, target) over the last axis; neither needs unit length."""
    a, b = _same_shape("cosine_loss", prediction, target)
    kind = a.dtype.type
    size_a = np.maximum(np.sqrt(np.sum(a * a, axis=-1, keepdims=True)), kind(eps))
    size_b = np.maximum(np.sqrt(np.sum(b * b, axis=-1, keepdims=True)), kind(eps))
    a, b = a / size_a, b / size_b
    cosine = np.sum(a * b, axis=-1, keepdims=True)
    value, share = _reduce(1 - cosine[..., 0], reduction, a.dtype)
    return value, (a, b, size_a, size_b, cosine, share)


def _cosine_loss_vjp(grad, saved, needs):
    a, b, size_a, size_b, cosine, share = saved
    scaled = -np.broadcast_to(grad, a.shape[:-1])[..., None] * a.dtype.type(share)
    to_a = scaled * (b - a * cosine) / size_a if needs[0] else None
    to_b = scaled * (a - b * cosine) / size_b if needs[1] else None
    return to_a, to_b


def _cosine_loss_reference(a, b, reduction="mean", eps=1e-8):
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return _reduced(1 - np.sum(a * b, axis=-1) / lengths, reduction)


def _cosine_loss_samples(rng):
    for reduction in ("mean", "sum", "none"):
        yield tuple(rng.standard_normal((2, 3, 4))), {"reduction": reduction}
    yield tuple(rng.standard_normal((2, 5))), {}


cosine_loss = primitive("cosine_loss", _cosine_loss_forward, _cosine_loss_vjp,
                        reference=_cosine_loss_reference, samples=_cosine_loss_samples)


def cosine_embedding_loss(a, b, target, margin=0.0, reduction="mean", eps=1e-8):
    """1 - cos(a, b) over the last axis where ``target`` is 1, max(0, cos(a, b) - margin) where it is -1."""
    target = np.asarray(target)
    if not np.isin(target, (1, -1)).all():
        raise ConfigError("cosine_embedding_loss: target holds numbers other than 1 and -1")
    apart = cosine_loss(a, b, reduction="none", eps=eps)
    if target.shape != apart.shape:
        raise ShapeError(f"cosine_embedding_loss: target {target.shape}; expected {tuple(apart.shape)}")
    return _reduced_op(where(target == 1, apart, relu(subtract(1 - margin, apart))), reduction)


def triplet_margin_loss(anchor, positive, negative, margin=1.0, reduction="mean"):
    """max(0, |anchor - positive| - |anchor - negative| + margin), with distances over the last axis."""
    near, far = (norm(subtract(anchor, other), axis=-1) for other in (positive, negative))
    return _reduced_op(relu(add(subtract(near, far), margin)), reduction)


def _reduced_op(loss, reduction):
    if reduction not in ("mean", "sum", "none"):
        raise ConfigError(f"reduction={reduction!r}; expected 'mean', 'sum' or 'none'")
    return loss if reduction == "none" else mean(loss) if reduction == "mean" else sum_of(loss)
