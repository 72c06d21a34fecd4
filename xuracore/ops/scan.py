"""Scans: the recurrences of the state-space models, one op each, state in and state out."""

import numpy as np

from xuracore.autograd import is_grad_enabled
from xuracore.errors import ConfigError, ShapeError
from xuracore.kernels import selective_scan as selective
from xuracore.kernels import trapezoid
from xuracore.ops.registry import primitive

SCRATCH_BYTES = 1 << 18  # recomputed states of one block of tokens: a part of a core's L2 cache


def _block_length(length, state_bytes):
    """Tokens between stored states, so that the recomputed ones stay in cache; without a tape, one state."""
    if not is_grad_enabled():
        return length
    return max(1, min(length, 64, max(8, SCRATCH_BYTES // max(1, state_bytes))))


def _dense(x, shape, like, fill=0):
    """``x`` as a contiguous array of ``shape`` and of ``like``'s dtype; ``fill`` everywhere if None."""
    if x is None:
        return np.full(shape, fill, like.dtype)
    return np.ascontiguousarray(x, dtype=like.dtype)


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
        dense.append(_dense(x, shape, q, fill=1 if name == "psi" else 0))
    real = np.ones(q.shape[:2], np.uint8) if mask is None else np.ascontiguousarray(mask, dtype=np.uint8)
    if real.shape != q.shape[:2]:
        raise ShapeError(f"trapezoidal_scan: mask has shape {real.shape}; expected {q.shape[:2]}")
    return dense[:11], real, dense[11:]


def _trapezoidal_scan_forward(
    q, k, v, dt, a, trap, angles, q_bias, k_bias, skip=None, psi=None,
    theta=None, h=None, k_prev=None, v_prev=None, *, rotary="pair", mask=None,
):  # fmt: skip
    """The Mamba-3 scan (arXiv 2603.15569): trapezoidal update, cumulative data-dependent rotation.

    q, k (B, L, R, G, N), normalised, before bias and rotation; v (B, L, H, P); dt (B, L, H) > 0;
    a (B, L, H) < 0; trap (B, L, H) before its sigmoid; angles (B, L, S), or one set a head (B, L, H, S),
    before tanh; q_bias, k_bias (H, R, N); skip (H,), the D term; psi (H, R, P) spreads v over ranks.
    The state, all None for a fresh start: theta (B, H, S) modulo 2 pi, h (B, H, P, N),
    k_prev (B, R, H, N) rotated, v_prev (B, H, P).
    rotary : 'pair' rotates coordinates (2i, 2i+1), 'half' (i, i + N/2).
    mask : (B, L), false where a token is padding: it leaves the state alone and gives y = 0.

    Returns (y (B, L, R, H, P), theta, h, k_last, v_last).  Raises ShapeError, ConfigError.
    """
    given = (q, k, v, dt, a, trap, angles, q_bias, k_bias, skip, psi, theta, h, k_prev, v_prev)
    inputs, real, state = _trapezoid_inputs(given, mask, rotary)
    batch, length, rank, _, size = q.shape
    heads, width = v.shape[2:]
    turns = angles.shape[-1]
    block = _block_length(length, size * width * q.itemsize)
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
    call(*inputs, real, *state, rotary == "half", block, *empty)
    outputs, stored = tuple(empty[:5]), empty[5:]
    return outputs, (inputs, real, state, rotary == "half", block, stored, angles.ndim, work)


def _trapezoidal_scan_vjp(grad, saved, needs):
    inputs, real, state, half, block, stored, angles_ndim, work = saved
    q, v, angles = inputs[0], inputs[2], inputs[6]
    batch, length, rank, groups, size = q.shape
    heads, width = v.shape[2:]
    parts = 1 if batch * groups >= 8 else heads // groups  # enough tasks for the threads, from shapes alone
    runs = groups * parts if angles.shape[2] == 1 else 1
    shapes = [(batch, length, rank, heads, width)] + [x.shape for x in state]
    cotangents = [_dense(g, shape, q) for g, shape in zip(grad, shapes)]
    partials = {0: (parts, *q.shape), 1: (parts, *q.shape), 6: (runs, *angles.shape)}
    partials.update({i: (batch, *inputs[i].shape) for i in (7, 8, 9, 10)})
    out = [np.empty(partials.get(i, x.shape), q.dtype) for i, x in enumerate(inputs + state)]
    trapezoid.trapezoid_backward.split(batch * groups * parts, 4 * work)(
        *inputs, real, state[2], state[3], half, block, *stored, *cotangents, *out
    )
    for i in partials:
        out[i] = out[i][0] if len(out[i]) == 1 else out[i].sum(axis=0)
    out[6] = out[6][:, :, 0] if angles_ndim == 3 else out[6]
    return tuple(out[: len(needs)])


def _trapezoidal_scan_reference(
    q, k, v, dt, a, trap, angles, q_bias, k_bias, skip=None, psi=None,
    theta=None, h=None, k_prev=None, v_prev=None, *, rotary="pair", mask=None,
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
        theta[b, j] = np.mod(theta[b, j] + np.pi * np.tanh(angles[b, t, j]) * step, 2 * np.pi)
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
        yield tuple(inputs), {"rotary": rotary, "mask": mask}


trapezoidal_scan = primitive(
    "trapezoidal_scan", _trapezoidal_scan_forward, _trapezoidal_scan_vjp,
    reference=_trapezoidal_scan_reference, samples=_trapezoidal_scan_samples, outputs=5, tolerance=1e-4,
)  # fmt: skip


# ---------------------------------------------------------------------- selective scan
def _selective_inputs(u, delta, a, b, c, skip, z, delta_bias, h):
    if u.ndim != 3 or a.ndim != 2 or b.ndim not in (3, 4):
        raise ShapeError(
            f"selective_scan: u {u.shape}, A {a.shape}, B {b.shape}; expected u (B, L, D), A (D, N), "
            "B (B, L, N) or (B, L, G, N)"
        )
    b, c = (x[:, :, None, :] if x.ndim == 3 else x for x in (b, c))
    (batch, length, channels), size, groups = u.shape, a.shape[1], b.shape[2]
    if groups == 0 or channels % groups:
        raise ShapeError(f"selective_scan: {groups} groups do not divide {channels} channels")
    shapes = {
        "u": u.shape,
        "delta": u.shape,
        "A": (channels, size),
        "B": (batch, length, groups, size),
        "C": (batch, length, groups, size),
        "D": (channels,),
        "z": u.shape if z is not None else (0, 0, 0),
        "delta_bias": (channels,),
        "h": (batch, channels, size),
    }
    dense = []
    for (name, shape), x in zip(shapes.items(), (u, delta, a, b, c, skip, z, delta_bias, h)):
        if x is not None and x.shape != shape:
            raise ShapeError(f"selective_scan: {name} has shape {x.shape}; expected {shape}")
        dense.append(_dense(x, shape, u))
    return dense


def _selective_scan_forward(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, h=None, *, delta_softplus=False
):  # fmt: skip
    """The selective scan of Mamba-1 (arXiv 2312.00752); returns (y (B, L, D), last state (B, D, N)).

    u, delta, z (B, L, D); A (D, N), negative; B, C (B, L, G, N), or (B, L, N) for one group; D,
    delta_bias (D,); h (B, D, N) the state before the first token.  D, z, delta_bias and h may be
    None: no skip, no gate, no bias, a fresh start.  delta_softplus : delta is given before softplus.
    Raises ShapeError.
    """
    inputs = _selective_inputs(u, delta, A, B, C, D, z, delta_bias, h)
    batch, length, channels = u.shape
    groups, size = inputs[3].shape[2:]
    block = _block_length(length, size * selective.CHANNELS * u.itemsize)
    y, last = np.empty(u.shape, u.dtype), np.empty_like(inputs[8])
    stored = np.empty((batch, -(-length // block), size, channels), u.dtype)
    tasks, work = selective.tasks(batch, channels, groups), 20 * batch * length * channels * size
    call = selective.selective_scan_forward.split(tasks, work)
    call(*inputs, bool(delta_softplus), block, y, last, stored)
    return (y, last), (inputs, bool(delta_softplus), block, stored, B.ndim, C.ndim)


def _selective_scan_vjp(grad, saved, needs):
    inputs, soft, block, stored, b_ndim, c_ndim = saved
    u, b, h = inputs[0], inputs[3], inputs[8]
    (batch, length, channels), (groups, size) = u.shape, b.shape[2:]
    cotangents = [_dense(g, shape, u) for g, shape in zip(grad, (u.shape, h.shape))]
    out = [np.empty(x.shape, u.dtype) for x in inputs]
    runs = selective.runs(channels, groups)
    out[2] = np.empty((batch, size, channels), u.dtype)
    out[3], out[4] = (np.empty((runs, *b.shape), u.dtype) for _ in range(2))
    out[5], out[7] = (np.empty((batch, channels), u.dtype) for _ in range(2))
    tasks, work = selective.tasks(batch, channels, groups), 60 * batch * length * channels * size
    call = selective.selective_scan_backward.split(tasks, work)
    call(*inputs[:8], soft, block, stored, *cotangents, *out)
    out[2] = out[2].sum(axis=0).T
    for i in (3, 4, 5, 7):
        out[i] = out[i].sum(axis=0)
    out[3] = out[3][:, :, 0] if b_ndim == 3 else out[3]
    out[4] = out[4][:, :, 0] if c_ndim == 3 else out[4]
    return tuple(out[: len(needs)])


def _selective_scan_reference(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, h=None, *, delta_softplus=False
):  # fmt: skip
    """The defining recurrence, one token at a time."""
    batch, length, channels = u.shape
    delta = delta + (0 if delta_bias is None else delta_bias)
    delta = np.logaddexp(0, delta) if delta_softplus else delta
    B, C = (x[:, :, None] if x.ndim == 3 else x for x in (B, C))
    B, C = (np.repeat(x, channels // x.shape[2], axis=2) for x in (B, C))
    h = np.zeros((batch, channels, A.shape[1])) if h is None else h
    y = np.zeros(u.shape)
    for t in range(length):
        step = delta[:, t, :, None]
        h = np.exp(step * A) * h + step * B[:, t] * u[:, t, :, None]
        y[:, t] = (C[:, t] * h).sum(axis=2) + (0 if D is None else D * u[:, t])
    return (y if z is None else y * z / (1 + np.exp(-z))), h


def _selective_scan_samples(rng):
    for batch, length, channels, size, groups, full in (
        (2, 5, 4, 3, 1, True), (1, 4, 6, 2, 2, True), (2, 3, 3, 2, 0, False), (1, 1, 1, 1, 1, False),
    ):  # fmt: skip
        normal = rng.standard_normal
        mixing = (batch, length, groups, size) if groups else (batch, length, size)
        inputs = [
            normal((batch, length, channels)), rng.uniform(0.1, 1, (batch, length, channels)),
            -rng.uniform(0.2, 2, (channels, size)), normal(mixing), normal(mixing),
        ]  # fmt: skip
        if full:
            inputs += [normal(channels), normal((batch, length, channels)), normal(channels)]
            inputs += [normal((batch, channels, size))]
        yield tuple(inputs), {"delta_softplus": full}


selective_scan = primitive(
    "selective_scan", _selective_scan_forward, _selective_scan_vjp,
    reference=_selective_scan_reference, samples=_selective_scan_samples, outputs=2, tolerance=1e-4,
)  # fmt: skip


# ---------------------------------------------------------------------- unpack
def _unpack_forward(x, *, sizes):
    """Cut the last axis into contiguous pieces of the given sizes; one copy forward, one backward.

    Slicing would give each piece's gradient an array of the size of the whole.
    """
    if sum(sizes) != x.shape[-1]:
        raise ShapeError(f"sizes {tuple(sizes)} add up to {sum(sizes)}; the last axis has {x.shape[-1]}")
    pieces = np.split(x, np.cumsum(sizes[:-1]), axis=-1)
    return tuple(np.ascontiguousarray(piece) for piece in pieces), (x.shape, sizes)


def _unpack_vjp(grad, saved, needs):
    shape, sizes = saved
    given = next(g for g in grad if g is not None)
    whole = np.empty(shape, given.dtype)
    start = 0
    for piece, size in zip(grad, sizes):
        whole[..., start : start + size] = 0 if piece is None else piece
        start += size
    return (whole,)


def _unpack_reference(x, *, sizes):
    return tuple(np.split(x, np.cumsum(sizes[:-1]), axis=-1))


def _unpack_op(count):
    def samples(rng):
        sizes = tuple(int(n) for n in rng.integers(0, 4, count))
        yield (rng.standard_normal((2, 3, sum(sizes))),), {"sizes": sizes}

    return primitive(
        f"unpack_{count}", _unpack_forward, _unpack_vjp,
        reference=_unpack_reference, samples=samples, outputs=count,
    )  # fmt: skip


unpack_2, unpack_3, unpack_8 = _unpack_op(2), _unpack_op(3), _unpack_op(8)
