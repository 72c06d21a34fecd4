"""Scaled dot-product attention (Vaswani et al. 2017, §3.2.1), forward and gradient.

    S = Q Kᵀ / √d,   P = softmax(S),   O = P V
    dV = Pᵀ dO,   dP = dO Vᵀ,   dS = P ∘ (dP - rowsum(dO ∘ O)),   dQ = dS K / √d,   dK = dSᵀ Q / √d

Grouped queries: with fewer key heads than query heads, each key head serves a run of query heads.
"""

import numpy as np

from xuracore.errors import DTypeError, ShapeError
from xuracore.ops.registry import primitive


def _grouped(q, keys):
    """q (B, H, L, D) as (B, G, H/G * L, D), so that one product serves a key head's whole group."""
    batch, heads, length, width = q.shape
    return q.reshape(batch, keys, heads // keys * length, width)


def _bias(mask, causal, rows, columns, dtype):
    """What is added to the scores: 0 where allowed, -inf where not; None if all is allowed."""
    allowed = None
    if causal:
        allowed = np.tri(rows, columns, columns - rows, dtype=bool)
    if mask is not None:
        mask = np.asarray(mask)
        if mask.dtype != bool:
            raise DTypeError(f"attention: mask is {mask.dtype}; expected bool, True where a key may be seen")
        allowed = mask if allowed is None else mask & allowed
    return None if allowed is None else np.where(allowed, dtype.type(0), dtype.type(-np.inf))


def _attention_forward(q, k, v, mask=None, causal=False, scale=None):
    """softmax(q kᵀ · scale) v.

    q (B, H, L, D), k (B, G, M, D), v (B, G, M, E) with H a multiple of G → (B, H, L, E).
    mask : boolean, broadcastable to (B, H, L, M), True where a key may be seen.
    causal : position i of L sees keys up to i + M - L.   scale : default 1/√D.
    A row that may see nothing gives zeros.  Raises ShapeError, DTypeError for a mask that is not boolean.
    """
    if min(q.ndim, k.ndim, v.ndim) != 4 or max(q.ndim, k.ndim, v.ndim) != 4 or not k.shape[1]:
        raise ShapeError(f"attention: q {q.shape}, k {k.shape}, v {v.shape}: each has four axes, k a head")
    if q.shape[-1] != k.shape[-1] or k.shape[:-1] != v.shape[:-1] or q.shape[1] % k.shape[1]:
        raise ShapeError(f"attention: q {q.shape}, k {k.shape}, v {v.shape} do not fit together")
    batch, heads, length, width = q.shape
    scale = q.dtype.type(width**-0.5 if scale is None else scale)
    scores = _grouped(q, k.shape[1]) @ k.swapaxes(-1, -2)
    scores *= scale
    scores = scores.reshape(batch, heads, length, k.shape[2])
    bias = _bias(mask, causal, length, k.shape[2], q.dtype)
    if bias is not None:
        scores += bias
    top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    if bias is not None:
        top[~np.isfinite(top)] = 0
    scores -= top
    p = np.exp(scores, out=scores)
    total = p.sum(axis=-1, keepdims=True)
    if bias is not None:
        total[total == 0] = 1
    p /= total
    out = (_grouped(p, k.shape[1]) @ v).reshape(batch, heads, length, v.shape[-1])
    return out, (q, k, v, p, out, scale)


def _attention_vjp(grad, saved, needs):
    q, k, v, p, out, scale = saved
    groups = k.shape[1]
    g = _grouped(grad, groups)
    to_v = _grouped(p, groups).swapaxes(-1, -2) @ g if needs[2] else None
    ds = (g @ v.swapaxes(-1, -2)).reshape(p.shape)
    ds -= (grad * out).sum(axis=-1, keepdims=True)
    ds *= p
    ds *= scale
    ds = _grouped(ds, groups)
    to_q = (ds @ k).reshape(q.shape) if needs[0] else None
    to_k = ds.swapaxes(-1, -2) @ _grouped(q, groups) if needs[1] else None
    return to_q, to_k, to_v


def _attention_reference(q, k, v, mask=None, causal=False, scale=None):
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    s = np.einsum("bhld,bhmd->bhlm", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    allowed = np.ones(s.shape, bool) if mask is None else np.broadcast_to(mask, s.shape)
    if causal:
        length, keys = s.shape[-2:]
        allowed = allowed & (np.arange(keys)[None, :] <= np.arange(length)[:, None] + keys - length)
    e = np.where(allowed, np.exp(s), 0)
    total = e.sum(-1, keepdims=True)
    return np.einsum("bhlm,bhme->bhle", e / np.where(total == 0, 1, total), v)


def _attention_samples(rng):
    def draw(*shapes):
        return tuple(rng.standard_normal(shape) for shape in shapes)

    yield draw((2, 3, 4, 5), (2, 3, 6, 5), (2, 3, 6, 4)), {}
    yield draw((1, 4, 3, 2), (1, 2, 3, 2), (1, 2, 3, 2)), {"causal": True}
    mask = rng.random((2, 1, 1, 4)) < 0.6
    yield draw((2, 1, 3, 2), (2, 1, 4, 2), (2, 1, 4, 2)), {"mask": mask, "scale": 0.3}
    yield draw((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1)), {}
    yield draw((1, 1, 3, 2), (1, 1, 2, 2), (1, 1, 2, 2)), {"causal": True}  # the first row may see nothing


attention = primitive("attention", _attention_forward, _attention_vjp, reference=_attention_reference,
                      samples=_attention_samples, weak=True)
