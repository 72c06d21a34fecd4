"""Rotation of coordinate pairs: the two pairings in use, the way from one to the other, the complex form.

'pair' rotates coordinates (2i, 2i + 1) together, 'half' (i, i + N/2), for i < S; what is left over
stays as it is.  A model with one pairing is the same model with the other after its state coordinates
have been reordered, so weights can be carried over exactly.
"""

import numpy as np

from xuracore.errors import ConfigError
from xuracore.kernels.complex_state import complex_state_scan
from xuracore.kernels.trapezoid_numpy import rotate as rotate_by
from xuramamba.mamba3 import Mamba3


def rotate(x, theta, rotary="pair"):
    """Rotate pairs of the last axis of ``x`` (…, N) by ``theta`` (…, S), arrays; S at most N / 2.

    (a, b) becomes (a cos - b sin, a sin + b cos).
    """
    return rotate_by(x, np.cos(theta), np.sin(theta), _is_half(rotary))


def cumulative_angles(angles, dt, theta=0.0):
    """Angle after each token: theta + the running sum of pi tanh(angles) dt, modulo 2 pi (Mamba-3).

    angles (…, L, S), dt (…, L) → (…, L, S).  The sum is in float64, wrapped at the end.
    """
    steps = np.pi * np.tanh(np.asarray(angles, np.float64)) * np.asarray(dt, np.float64)[..., None]
    return np.mod(np.expand_dims(np.asarray(theta), -2) + steps.cumsum(axis=-2), 2 * np.pi)


def complex_scan(q, k, v, dt, a, trap, angles, q_bias, k_bias, skip=None):
    """The scan of Mamba-3 as what it means: a complex state that decays and turns, token by token.

    One complex number for each pair (2i, 2i + 1) of real coordinates, no rotation of keys or queries::

        c_t = alpha_t e^{-i phi_t} (c_{t-1} + beta'_t v_{t-1} k_{t-1}^T) + gamma_t v_t k_t^T
        y_t = Re c_t conj(q_t) + D v_t

    Arrays as in :func:`xuracore.ops.trapezoidal_scan` with one rank, rotary='pair' and a fresh start; N even.
    Returns (y (B, L, H, P), c (B, H, P, N / 2) complex).  To be read and compared with: it is slow.
    """
    batch, _, heads, width = v.shape
    half, turning = q.shape[-1] // 2, angles.shape[-1]
    angles = np.broadcast_to(angles[:, :, None] if angles.ndim == 3 else angles, (*v.shape[:3], turning))
    phi = np.zeros((*v.shape[:3], half))
    phi[..., :turning] = np.pi * np.tanh(angles) * dt[..., None]
    mix = 1 / (1 + np.exp(-trap))
    y, last = np.empty(v.shape), np.empty((batch, heads, width, half), complex)
    for b, j in np.ndindex(batch, heads):
        g = j * q.shape[3] // heads
        query, key = (x[b, :, 0, g] + bias[j, 0] for x, bias in ((q, q_bias), (k, k_bias)))
        query, key = (x[:, ::2] + 1j * x[:, 1::2] for x in (query, key))
        step, share = dt[b, :, j], mix[b, :, j]
        y[b, :, j], last[b, j] = complex_state_scan(
            query, key, v[b, :, j], np.exp(a[b, :, j] * step), phi[b, :, j], share * step, (1 - share) * step
        )
    return (y if skip is None else y + skip[:, None] * v), last


def half_order(size):
    """Reordering of ``size`` coordinates that turns 'pair' into 'half': even ones first, then odd."""
    if size % 2:
        raise ConfigError(f"{size} coordinates cannot be paired as halves; expected an even number")
    return np.concatenate([np.arange(0, size, 2), np.arange(1, size, 2)])


def with_rotary(mixer, rotary):
    """A new Mamba3 that computes the same outputs as ``mixer`` with the other pairing.

    States are not interchangeable: their N axis is reordered like the weights.
    """
    c = mixer.config
    if _is_half(rotary) == _is_half(c.rotary):
        return mixer
    order = half_order(c.d_state)
    order = order if _is_half(rotary) else np.argsort(order)
    state = {name: value.copy() for name, value in mixer.state_dict().items()}
    keys = slice(2 * c.d_inner, 2 * c.d_inner + 2 * c.rank * c.ngroups * c.d_state)
    rows = state["in_proj.weight"]
    blocks = rows[keys].reshape(-1, c.d_state, c.d_model)
    rows[keys] = blocks[:, order].reshape(-1, c.d_model)
    for name in ("B_bias", "C_bias", "B_norm.weight", "C_norm.weight"):
        if name in state:
            state[name] = state[name][..., order]
    if c.d_conv:  # its rows are [x | B | C], without z
        for name in ("conv1d.weight", "conv1d.bias"):
            part = state[name][c.d_inner :]
            part[...] = part.reshape(-1, c.d_state, part[0].size)[:, order].reshape(part.shape)
    fields = {**c.to_dict(), "rotary": rotary}
    other = Mamba3(**fields).to_dtype(mixer.D.dtype)
    other.load_state_dict(state)
    return other


def _is_half(rotary):
    if rotary not in ("pair", "half"):
        raise ConfigError(f"rotary={rotary!r}; expected 'pair' or 'half'")
    return rotary == "half"
