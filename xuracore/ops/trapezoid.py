"""The trapezoidal scan of Mamba-3 as one op, state in and state out."""

import numpy as np

from xuracore.errors import ConfigError, ShapeError
from xuracore.kernels import trapezoid
from xuracore.ops.blocks import block_length, contiguous
from xuracore.ops.registry import primitive


def _trapezoid_shapes(q, v, angles):
    batch, length, rank, groups, size = q.shape
    heads, width = v.shape[2], v.shape[3]
    turns = angles.shape[3]
    return {
        "q": q.shape,
        "k": q.shape,
        "v": (batch, length, heads, width),
        "dt": (batch, length, heads),
        "a": (batch, length, heads),
        "trap": (batch, length, heads),
        "angles": (batch, length, angles.shape[2], turns),
        "q_bias": (heads, rank, size),
        "k_bias": (heads, rank, size),
        "skip": (heads,),
        "psi": (heads, rank, width),
        "theta": (batch, heads, turns),
        "h": (batch, heads, width, size),
        "k_prev": (batch, rank, heads, size),
        "v_prev": (batch, heads, width),
    }


def _trapezoid_inputs(arrays, mask, rotary):
    q, v, angles = arrays[0], arrays[2], arrays[6]
    if q.ndim != 5 or v.ndim != 4 or angles.ndim not in (3, 4):
        raise ShapeError(
            f"trapezoidal_scan: q {q.shape}, v {v.shape}, angles {angles.shape}; expected q (B, L, R, G, N), "
            "v (B, L, H, P), angles (B, L, S) or (B, L, H, S)"
        )
    if rotary not in ("pair", "half"):
        raise ConfigError(f"rotary={rotary!r}; expected 'pair' or 'half'")
    angles = angles[:, :, None, :] if angles.ndim == 3 else angles
    shapes = _trapezoid_shapes(q, v, angles)
    groups, size, heads, turns = q.shape[3], q.shape[4], v.shape[2], angles.shape[3]
    uneven = rotary == "half" and size % 2
    if heads % groups or 2 * turns > size or angles.shape[2] not in (1, heads) or uneven:
        raise ShapeError(
            f"trapezoidal_scan: {heads} heads, {groups} groups, state size {size}, angles {angles.shape}; "
            "the groups must divide the heads, twice the angles must fit the state size (which is even for "
            "rotary='half'), and the angles are shared by all heads or given for each"
        )
    dense = []
    for (name, shape), x in zip(shapes.items(), arrays[:6] + (angles,) + arrays[7:]):
        if x is not None and x.shape != shape:
            raise ShapeError(f"trapezoidal_scan: {name} has shape {x.shape}; expected {shape}")
        dense.append(contiguous(x, shape, q, fill=1 if name == "psi" else 0))
    real = np.ones(q.shape[:2], np.uint8) if mask is None else np.ascontiguousarray(mask, dtype=np.uint8)
    if real.shape != q.shape[:2]:
        raise ShapeError(f"trapezoidal_scan: mask has shape {real.shape}; expected {q.shape[:2]}")
    return dense[:11], real, dense[11:]


def _trapezoidal_scan_forward(
    q, k, v, dt, a, trap, angles, q_bias, k_bias, skip=None, psi=None,
    theta=None, h=None, k_prev=None, v_prev=None, *, rotary="pair", radians=False, mask=None,
):  # fmt: skip
    """The Mamba-3 scan (arXiv 2603.15569): trapezoidal update, cumulative data-dependent rotation.

    q, k (B, L, R, G, N), normalised, before bias and rotation; v (B, L, H, P); dt (B, L, H) > 0;
    a (B, L, H) < 0; trap (B, L, H) before its sigmoid; angles (B, L, S), or one set a head (B, L, H, S),
    before tanh; q_bias, k_bias (H, R, N); skip (H,), the D term; psi (H, R, P) spreads v over ranks.
    The state, all None for a fresh start: theta (B, H, S) modulo 2 pi, h (B, H, P, N),
    k_prev (B, R, H, N) rotated, v_prev (B, H, P).
    rotary : 'pair' rotates coordinates (2i, 2i+1), 'half' (i, i + N/2).
    radians : theta grows by ``angles`` as they are, in radians a token, not by pi tanh(angles) dt.
    mask : (B, L), false where a token is padding: it leaves the state alone and gives y = 0.

    Returns (y (B, L, R, H, P), theta, h, k_last, v_last).  Raises ShapeError, ConfigError.
    """
    given = (q, k, v, dt, a, trap, angles, q_bias, k_bias, skip, psi, theta, h, k_prev, v_prev)
    inputs, real, state = _trapezoid_inputs(given, mask, rotary)
    batch, length, rank, _, size = q.shape
    heads, width = v.shape[2:]
    turns = angles.shape[-1]
    block = block_length(length, size * width * q.itemsize)
    blocks = -(-length // block)
    empty = [
        np.empty(shape, q.dtype)
        for shape in (
            (batch, length, rank, heads, width),
            *(x.shape for x in state),
            (batch, heads, blocks, size, width),
            (batch, heads, blocks, turns),
        )
    ]
    work = 8 * batch * length * heads * rank * width * size
    call = trapezoid.trapezoid_forward.split(batch * heads, work)
    call(*inputs, real, *state, rotary == "half", bool(radians), block, *empty)
    outputs, stored = tuple(empty[:5]), empty[5:]
    return outputs, (inputs, real, state, rotary == "half", bool(radians), block, stored, angles.ndim, work)


def _trapezoidal_scan_vjp(grad, saved, needs):
    inputs, real, state, half, radians, block, stored, angles_ndim, work = saved
    q, v, angles = inputs[0], inputs[2], inputs[6]
    batch, length, rank, groups, size = q.shape
    heads, width = v.shape[2:]
    parts = 1 if batch * groups >= 8 else heads // groups  # enough tasks for the threads, from shapes alone
    runs = groups * parts if angles.shape[2] == 1 else 1
    shapes = [(batch, length, rank, heads, width)] + [x.shape for x in state]
    cotangents = [contiguous(g, shape, q) for g, shape in zip(grad, shapes)]
    partials = {0: (parts, *q.shape), 1: (parts, *q.shape), 6: (runs, *angles.shape)}
    partials.update({i: (batch, *inputs[i].shape) for i in (7, 8, 9, 10)})
    out = [np.empty(partials.get(i, x.shape), q.dtype) for i, x in enumerate(inputs + state)]
    trapezoid.trapezoid_backward.split(batch * groups * parts, 4 * work)(
        *inputs, real, state[2], state[3], half, radians, block, *stored, *cotangents, *out
    )
    for i in partials:
        out[i] = out[i][0] if len(out[i]) == 1 else out[i].sum(axis=0)
    out[6] = out[6][:, :, 0] if angles_ndim == 3 else out[6]
    return tuple(out[: len(needs)])


def _trapezoidal_scan_reference(
    q, k, v, dt, a, trap, angles, q_bias, k_bias, skip=None, psi=None,
    theta=None, h=None, k_prev=None, v_prev=None, *, rotary="pair", radians=False, mask=None,
):  # fmt: skip
    """The defining recurrence, one sequence, head and token at a time."""
    batch, length, rank, groups, size = q.shape
    heads, width = v.shape[2:]
    turns = angles.shape[-1]
    angles = angles[:, :, None] if angles.ndim == 3 else angles
    angles = np.broadcast_to(angles, (batch, length, heads, turns))
    skip = np.zeros(heads) if skip is None else skip
    psi = np.ones((heads, rank, width)) if psi is None else psi
    theta = np.zeros((batch, heads, turns)) if theta is None else theta.copy()
    h = np.zeros((batch, heads, width, size)) if h is None else h.copy()
    k_prev = np.zeros((batch, rank, heads, size)) if k_prev is None else k_prev.copy()
    v_prev = np.zeros((batch, heads, width)) if v_prev is None else v_prev.copy()
    y = np.zeros((batch, length, rank, heads, width))
    i = np.arange(turns)
    pairs = (2 * i, 2 * i + 1) if rotary == "pair" else (i, i + size // 2)

    def rotate(x, angle):
        out = x.copy()
        out[:, pairs[0]] = x[:, pairs[0]] * np.cos(angle) - x[:, pairs[1]] * np.sin(angle)
        out[:, pairs[1]] = x[:, pairs[0]] * np.sin(angle) + x[:, pairs[1]] * np.cos(angle)
        return out

    for b, t, j in np.ndindex(batch, length, heads):
        if mask is not None and not mask[b, t]:
            continue
        g, step, mix = j * groups // heads, dt[b, t, j], 1 / (1 + np.exp(-trap[b, t, j]))
        alpha = np.exp(a[b, t, j] * step)
        turn = angles[b, t, j] if radians else np.pi * np.tanh(angles[b, t, j]) * step
        theta[b, j] = np.mod(theta[b, j] + turn, 2 * np.pi)
        key = rotate(k[b, t, :, g] + k_bias[j], theta[b, j])
        query = rotate(q[b, t, :, g] + q_bias[j], theta[b, j])
        value, previous = psi[j] * v[b, t, j], psi[j] * v_prev[b, j]
        h[b, j] = (
            alpha * h[b, j]
            + alpha * (1 - mix) * step * previous.T @ k_prev[b, :, j]
            + mix * step * value.T @ key
        )
        y[b, t, :, j] = query @ h[b, j].T + skip[j] * value
        k_prev[b, :, j], v_prev[b, j] = key, v[b, t, j]
    return y, theta, h, k_prev, v_prev


def _trapezoidal_scan_samples(rng):
    for batch, length, rank, groups, heads, size, width, turns, rotary, state, shared, masked in (
        (2, 5, 1, 1, 2, 4, 3, 1, "pair", False, True, False),
        (1, 4, 2, 2, 4, 6, 2, 2, "half", True, True, False),
        (2, 4, 2, 1, 2, 4, 2, 2, "half", True, False, True),
        (1, 1, 1, 1, 1, 2, 1, 0, "pair", True, True, False),
    ):
        normal = rng.standard_normal
        inputs = [
            normal((batch, length, rank, groups, size)), normal((batch, length, rank, groups, size)),
            normal((batch, length, heads, width)), rng.uniform(0.05, 1, (batch, length, heads)),
            -rng.uniform(0.1, 2, (batch, length, heads)), normal((batch, length, heads)),
            normal((batch, length, turns) if shared else (batch, length, heads, turns)),
            normal((heads, rank, size)), normal((heads, rank, size)), normal(heads),
        ]  # fmt: skip
        if state:
            inputs += [
                normal((heads, rank, width)), rng.uniform(2, 4, (batch, heads, turns)),
                normal((batch, heads, width, size)), normal((batch, rank, heads, size)),
                normal((batch, heads, width)),
            ]  # fmt: skip
        mask = rng.random((batch, length)) < 0.6 if masked else None
        yield tuple(inputs), {"rotary": rotary, "radians": size == 6, "mask": mask}


trapezoidal_scan = primitive(
    "trapezoidal_scan", _trapezoidal_scan_forward, _trapezoidal_scan_vjp,
    reference=_trapezoidal_scan_reference, samples=_trapezoidal_scan_samples, outputs=5, tolerance=1e-4, consumes=True,
)  # fmt: skip
