"""Rotary position embedding (Su et al. 2021): pairs of features turn by an angle proportional to the position."""

import numpy as np

from xuracore.errors import ConfigError, ShapeError
from xuracore.ops.registry import primitive


def _turned(x, cos, sin, interleaved):
    """Each pair (a, b) of the last axis as (a cos - b sin, b cos + a sin)."""
    y = np.empty_like(x)
    half = x.shape[-1] // 2
    first, second = (np.s_[..., 0::2], np.s_[..., 1::2]) if interleaved else (np.s_[..., :half], np.s_[..., half:])
    a, b = x[first], x[second]
    y[first] = a * cos - b * sin
    y[second] = b * cos + a * sin
    return y


def _rope_forward(x, positions, base=10000.0, interleaved=False):
    """x (…, L, D) turned by angles positions[l] · base^(-2i/D), i < D/2.

    positions (L,), or broadcastable to x's axes but the last; numbers, of which no gradient is taken.
    interleaved : pairs are neighbours (2i, 2i + 1); else (i, i + D/2), as Llama and Hugging Face have them.
    Raises ShapeError, ConfigError.
    """
    positions = np.asarray(positions)
    if not base > 0:
        raise ConfigError(f"rope: base={base!r}; expected a number above 0")
    if x.ndim < 2 or x.shape[-1] % 2 or not positions.ndim or positions.shape[-1] not in (1, x.shape[-2]):
        raise ShapeError(f"rope: x {x.shape}, positions {positions.shape}; expected (…, L, D) with D even, and (L,)")
    rates = float(base) ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
    angles = positions[..., None].astype(np.float64) * rates
    cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
    return _turned(x, cos, sin, interleaved), (cos, sin, interleaved)


def _rope_vjp(grad, saved, needs):
    cos, sin, interleaved = saved
    return _turned(grad, cos, -sin, interleaved), None  # a rotation's transpose is the rotation back


def _rope_reference(x, positions, base=10000.0, interleaved=False):
    half = x.shape[-1] // 2
    angles = np.asarray(positions)[..., None] * base ** (-np.arange(half) / half)
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    z = (a + 1j * b) * np.exp(1j * angles)
    return np.stack([z.real, z.imag], axis=-1).reshape(x.shape) if interleaved else np.concatenate(
        [z.real, z.imag], axis=-1)


def _rope_samples(rng):
    for interleaved in (False, True):
        yield (rng.standard_normal((2, 3, 4)), np.array([0, 1, 7])), {"interleaved": interleaved}
    yield (rng.standard_normal((4, 3, 1, 2)).T, np.array([[[5]], [[2]]])), {"base": 50.0}


rope = primitive("rope", _rope_forward, _rope_vjp, reference=_rope_reference, samples=_rope_samples)
