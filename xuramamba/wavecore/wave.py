"""The wave: a selective state space of diagonal A, discretised exactly, its carry apart from what it emits.

With x = [z; c] (or e), per channel i and mode n::

    u = W x      Δ = softplus(W u) · dt_scale + dt_min      b = W u      k = W u      A = -softplus(a_raw)
    h ← exp(ΔA) h + Δ φ₁(ΔA) b B u,   φ₁(z) = expm1(z) / z         (zero-order hold; Euler has φ₁ = 1)
    y_i = Σ_n (k C) h + D u,          emitted: W (y σ(W x))

The carry is h alone (d_w numbers), so A governs how long it lasts, and the step size how much of it.
"""

import numpy as np

from xuracore import ops
from xuracore.errors import ShapeError
from xuracore.nn import Parameter, init
from xuramamba.wavecore.parameters import dense, new_dense


def new_wave(rng, config, inputs):
    """Parameters of :func:`wave_step`."""
    size, modes = config.d_w // config.mamba_state_dim, config.mamba_state_dim
    return {
        "in": new_dense(rng, inputs, size),
        "dt": new_dense(rng, size, size),
        "b": new_dense(rng, size, size),
        "k": new_dense(rng, size, size),
        "gate": new_dense(rng, inputs, size),
        "out": new_dense(rng, size, config.d_w),
        "a_raw": Parameter(init.normal((size, modes), rng, 0.02)),
        # the product of b_base and c_base scales the output: at 0.02 each the wave would be mute for long
        "b_base": Parameter(init.normal((size, modes), rng, 0.5)),
        "c_base": Parameter(init.normal((size, modes), rng, 0.5)),
        "d": Parameter(init.zeros(size)),
    }


def phi1(z):
    """expm1(z) / z for z ≤ 0 as ops; 1 where A has underflown to 0."""
    z = ops.minimum(z, -1e-20)
    return ops.expm1(z) / z


def _inputs(params, config, x):
    """(u, A (1, size·modes), Δ and the input of each mode (…, size·modes), read-out k C)."""
    modes = config.mamba_state_dim
    u = dense(params["in"], x)
    delta = ops.softplus(dense(params["dt"], u)) * config.mamba_dt_scale + config.mamba_dt_min
    a = -ops.softplus(params["a_raw"])
    flat = (*x.shape[:-1], config.d_w)

    def per_mode(value, table):
        return ops.reshape(ops.expand_dims(value, -1) * table, flat)

    ones = np.ones((1, modes), u.dtype)
    step = per_mode(delta, ones)
    entering = per_mode(dense(params["b"], u) * u, params["b_base"])
    a = ops.reshape(a, (1, config.d_w))
    if config.wave_mode == "zoh":
        entering = entering * phi1(step * a)
    read = per_mode(dense(params["k"], u), params["c_base"])
    return u, a, step, entering, read


def _emit(params, config, x, u, read, h):
    modes = config.mamba_state_dim
    y = ops.sum(ops.reshape(read * h, (*x.shape[:-1], config.d_w // modes, modes)), axis=-1)
    y = y + params["d"] * u
    return dense(params["out"], y * ops.sigmoid(dense(params["gate"], x)))


def wave_step(params, config, carry, x):
    """One step: (emitted (B, d_w), carry (B, d_w)) for x (B, inputs) and the carry before."""
    u, a, step, entering, read = _inputs(params, config, x)
    carry = ops.exp(step * a) * carry + step * entering
    return _emit(params, config, x, u, read, carry), carry


def wave_scan(params, config, carry, x):
    """A whole sequence at once: (emitted (B, L, d_w), last carry (B, d_w)) for x (B, L, inputs).

    The same numbers as L calls of :func:`wave_step`.  Runs the selective scan of Mamba-1, each mode being a
    channel of its own whose input already has the factor φ₁.
    """
    if x.ndim != 3:
        raise ShapeError(f"wave_scan: x has shape {x.shape}; expected (B, L, inputs)")
    u, a, step, entering, read = _inputs(params, config, x)
    ones = np.ones((*x.shape[:2], 1), u.dtype)
    h, last = ops.selective_scan(
        entering, step, ops.reshape(a, (config.d_w, 1)), ones, ones, None, None, None, ops.expand_dims(carry, -1)
    )
    return _emit(params, config, x, u, read, h), ops.reshape(last, (x.shape[0], config.d_w))
