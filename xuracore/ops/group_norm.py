"""Normalisation over groups of channels of (B, C, …): group norm, instance norm, batch norm.

    y = (x - mean) / sqrt(var + eps) · weight + bias,
    dx = rstd (g - mean(g) - x̂ mean(g ∘ x̂)),   g = dy ∘ weight,   x̂ = (x - mean) rstd

with weight and bias per channel.  They differ in what mean and variance are taken over.
"""

import numpy as np

from xuracore.errors import ShapeError
from xuracore.ops.arrays import floating, vector
from xuracore.ops.registry import primitive


def _per_channel(x, weight, bias):
    """weight and bias (C,) as (C, 1, …), so that they broadcast to x (B, C, …)."""
    shape = (x.shape[1],) + (1,) * (x.ndim - 2)
    scale = vector(weight, x.shape[1], x.dtype, 1, "weight").reshape(shape)
    return scale, vector(bias, x.shape[1], x.dtype, 0, "bias").reshape(shape)


def _normalized(parts, axes, eps):
    """x̂ of ``parts`` over ``axes``, and 1 / sqrt(var + eps)."""
    centred = parts - parts.mean(axis=axes, keepdims=True)
    rstd = 1 / np.sqrt((centred * centred).mean(axis=axes, keepdims=True) + parts.dtype.type(eps))
    centred *= rstd
    return centred, rstd


def _forward(name, x, weight, bias, eps, groups, batch):
    """Statistics over ``groups`` runs of channels and all that follows; with ``batch``, over the batch too."""
    x = floating(x)
    if x.ndim < 2 or groups < 1 or x.shape[1] % groups:
        raise ShapeError(f"{name}: x {x.shape} has not (B, C, …) with C divisible by {groups} groups")
    scale, shift = _per_channel(x, weight, bias)
    parts = x.reshape(len(x), groups, x.shape[1] // groups, *x.shape[2:])
    axes = (0,) * batch + tuple(range(2, parts.ndim))
    unit, rstd = _normalized(parts, axes, eps) if x.size else (parts, parts)
    return unit.reshape(x.shape) * scale + shift, (unit, rstd, axes, scale)


def _vjp(grad, saved, needs):
    unit, rstd, axes, scale = saved
    seen, others = unit.reshape(grad.shape), (0, *range(2, grad.ndim))
    to_x = None
    if needs[0]:
        g = (grad * scale).reshape(unit.shape)
        if g.size:
            g = rstd * (g - g.mean(axis=axes, keepdims=True) - unit * (g * unit).mean(axis=axes, keepdims=True))
        to_x = g.reshape(grad.shape)
    return to_x, (grad * seen).sum(axis=others), grad.sum(axis=others)


def _reference(x, weight, bias, eps, groups, batch):
    parts = x.reshape(len(x), groups, -1)
    axes = (0, 2) if batch else 2
    mean, var = parts.mean(axis=axes, keepdims=True), parts.var(axis=axes, keepdims=True)
    y = ((parts - mean) / np.sqrt(var + eps)).reshape(x.shape)
    weight, bias = (None if v is None else v.reshape(-1, *[1] * (x.ndim - 2)) for v in (weight, bias))
    return y * (1 if weight is None else weight) + (0 if bias is None else bias)


def _samples(rng, **attributes):
    def draw(*shape):
        return rng.standard_normal(shape), rng.standard_normal(shape[1]), rng.standard_normal(shape[1])

    yield draw(2, 4, 3, 2), {**attributes, "eps": 1e-3}
    x, weight, bias = draw(3, 4, 2)
    yield (x.transpose(2, 1, 0), weight, None), {**attributes, "eps": 1e-2}
    yield (x, None, None), attributes


# ---------------------------------------------------------------------- group norm
def _group_norm_forward(x, weight=None, bias=None, groups=1, eps=1e-5):
    """Mean and variance over each of ``groups`` runs of channels of one example (Wu & He 2018).

    x (B, C, …), weight and bias (C,) or None.  Raises ShapeError.
    """
    return _forward("group_norm", x, weight, bias, eps, groups, batch=False)


def _group_norm_samples(rng):
    yield from _samples(rng, groups=2)
    yield (rng.standard_normal((0, 2, 3)), rng.standard_normal(2), None), {}


group_norm = primitive(
    "group_norm", _group_norm_forward, _vjp, samples=_group_norm_samples,
    reference=lambda x, weight=None, bias=None, groups=1, eps=1e-5: _reference(
        x, weight, bias, eps, groups, False) if x.size else x)  # fmt: skip


# ---------------------------------------------------------------------- instance norm
def _instance_norm_forward(x, weight=None, bias=None, eps=1e-5):
    """Mean and variance over each channel of one example (Ulyanov et al. 2016).

    x (B, C, …), weight and bias (C,) or None.  Raises ShapeError.
    """
    return _forward("instance_norm", x, weight, bias, eps, x.shape[1] if x.ndim > 1 else 1, batch=False)


instance_norm = primitive(
    "instance_norm", _instance_norm_forward, _vjp, samples=_samples,
    reference=lambda x, weight=None, bias=None, eps=1e-5: _reference(
        x, weight, bias, eps, x.shape[1], False))  # fmt: skip


# ---------------------------------------------------------------------- batch norm
def _batch_norm_forward(x, weight=None, bias=None, eps=1e-5):
    """Mean and variance over each channel of the whole batch (Ioffe & Szegedy 2015).

    x (B, C, …), weight and bias (C,) or None.  With running statistics it is a layer,
    :class:`xuracore.nn.BatchNorm2d`.  Raises ShapeError.
    """
    return _forward("batch_norm", x, weight, bias, eps, x.shape[1] if x.ndim > 1 else 1, batch=True)


batch_norm = primitive(
    "batch_norm", _batch_norm_forward, _vjp, samples=_samples,
    reference=lambda x, weight=None, bias=None, eps=1e-5: _reference(
        x, weight, bias, eps, x.shape[1], True))  # fmt: skip
