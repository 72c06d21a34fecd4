"""From continuous time to steps: the rules that the mixers use, for a diagonal system h' = A h + B x.

Each rule returns the weights of one step of length ``dt`` as arrays in float64 (complex128 for a
complex A), for any shapes of A and dt that broadcast.  "Order p" means that halving dt divides the
error after a fixed time by 2**p, for inputs that change smoothly.
"""

import numpy as np

SERIES_BELOW = 1e-4  # (e**z - 1) / z loses its digits there, and the series has them all


def _wide(x):
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def phi1(z):
    """(e**z - 1) / z, equal to 1 at z = 0."""
    z = _wide(z)
    small = np.abs(z) < SERIES_BELOW
    safe = np.where(small, 1, z)
    return np.where(small, 1 + z / 2 + z * z / 6, np.expm1(safe) / safe)


def zero_order_hold(a, dt):
    """``h_t = keep h_{t-1} + enter B x_t``: exact where x stays x_t during the step (S4D).  Order 1."""
    z = _wide(a) * _wide(dt)
    return np.exp(z), phi1(z) * _wide(dt)


def euler_input(a, dt):
    """Exact decay, ``enter = dt``: the rule of Mamba-1 and Mamba-2.  Order 1."""
    z = _wide(a) * _wide(dt)
    return np.exp(z), np.broadcast_to(_wide(dt), z.shape).copy()


def bilinear(a, dt):
    """(1 + z/2) / (1 - z/2) and dt / (1 - z/2), Tustin's rule (S4).

    Order 2 where x is the mean of the step's two ends; never unstable where Re A < 0.
    """
    half = _wide(a) * _wide(dt) / 2
    return (1 + half) / (1 - half), _wide(dt) / (1 - half)


def exponential_trapezoidal(a, dt, mix):
    """``h_t = alpha h_{t-1} + beta B x_{t-1} + gamma B x_t`` (Mamba-3, arXiv 2603.15569).

    The step's integral of e**(A (t - s)) B x(s) as a weighted mean of its two ends.  mix = 1/2 is the
    trapezoidal rule, order 2; mix = 1 is :func:`euler_input`, order 1.  Returns (alpha, beta, gamma).
    """
    dt, mix = _wide(dt), _wide(mix)
    alpha = np.exp(_wide(a) * dt)
    return alpha, (1 - mix) * dt * alpha, mix * dt * np.ones_like(alpha)
