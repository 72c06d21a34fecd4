"""The trapezoidal scan of Mamba-3 as one op, state in and state out.

With P-vectors v and rotated keys k~ and queries q~ (see :mod:`xuracore.kernels.trapezoid`), per head::

    alpha_t = exp(a_t dt_t)      lambda_t = sigmoid(trap_t)
    gamma_t = lambda_t dt_t      beta'_t  = (1 - lambda_t) dt_t
    h_t = alpha_t (h_{t-1} + beta'_t sum_r v_{t-1,r} k~_{t-1,r}^T) + gamma_t sum_r v_{t,r} k~_{t,r}^T
    y_{t,r} = h_t q~_{t,r} + D v_{t,r}                                   v_{t,r} = psi_r v_t

The scan carries the state with the next token's share of this token already in it,
``H_t = h_t + beta'_{t+1} sum_r v_{t,r} k~_{t,r}^T``, so that each token is one decay and one update::

    H_t = alpha_t H_{t-1} + s_t sum_r v_{t,r} k~_{t,r}^T       s_t = gamma_t + beta'_{t+1}
    y_{t,r} = alpha_t H_{t-1} q~_{t,r} + gamma_t sum_u (q~_{t,r} . k~_{t,u}) v_{t,u} + D v_{t,r}

with beta' = 0 after the last token, where H = h: the scan of :mod:`xuracore.kernels.ssd`, which is that
of Mamba-2 too, with other weights.
"""

import functools
import itertools

import numpy as np

from xuracore.autograd import is_grad_enabled
from xuracore.errors import ConfigError, ShapeError
from xuracore.kernels import activation, trapezoid
from xuracore.ops.blocks import contiguous, sequences
from xuracore.ops.chunked import CHUNK_ROWS, scan, scan_gradient
from xuracore.ops.registry import primitive


def _trapezoid_shapes(q, v, angles, count):
    batch, length, rank, _, size = q.shape
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
        "theta": (count, heads, turns),
        "h": (count, heads, width, size),
        "k_prev": (count, rank, heads, size),
        "v_prev": (count, heads, width),
    }


def _trapezoid_inputs(arrays, spans, rotary):
    q, v, angles = arrays[0], arrays[2], arrays[6]
    if q.ndim != 5 or v.ndim != 4 or angles.ndim not in (3, 4):
        raise ShapeError(
            f"trapezoidal_scan: q {q.shape}, v {v.shape}, angles {angles.shape}; expected q (B, L, R, G, N), "
            "v (B, L, H, P), angles (B, L, S) or (B, L, H, S)"
        )
    if rotary not in ("pair", "half"):
        raise ConfigError(f"rotary={rotary!r}; expected 'pair' or 'half'")
    angles = angles[:, :, None, :] if angles.ndim == 3 else angles
    shapes = _trapezoid_shapes(q, v, angles, len(spans))
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
        if name == "h":  # states are (N, P) in memory: what a call returns comes back without a copy
            x = np.zeros(shape, q.dtype).swapaxes(2, 3) if x is None else x.swapaxes(2, 3)
            shape = x.shape
        dense.append(contiguous(x, shape, q, fill=1 if name == "psi" else 0))
    return dense[:11], dense[11:]


class _Rotated:
    """Biased, rotated queries and keys of Mamba-3: a source of :func:`xuracore.ops.chunked.scan`."""

    def __init__(self, q, k, q_bias, k_bias, rate, dt, half, radians, theta, spans):
        self.arrays, self.options = (q, k, q_bias, k_bias), (half, radians)
        self.rate, self.dt = rate, dt
        self.rank, self.size = q.shape[2], q.shape[4]
        self.groups = dt.shape[2]  # every head has its own
        self.theta = theta.copy()  # of the last token read; after the scan, of the last of all
        self.k_last = np.empty((len(spans), self.rank, self.groups, self.size), q.dtype)
        self.saved = {}  # theta before each step of each task
        self.keep, self.partials = is_grad_enabled(), None
        self.rotate = trapezoid.rotated_keys.sized(0)

    def prepare(self, tasks):
        """Make room for gradients.  Each run of heads sums its own, since heads share q, k and the angles."""
        q, k, q_bias, k_bias = self.arrays
        runs = 1 + max((task.run_number for task in tasks), default=0)
        shared = self.rate.shape[2] == 1
        self.gtheta = self.gtheta.copy()
        self.partials = [np.zeros((runs, *x.shape), q.dtype) for x in (q, k)]
        self.grate = np.zeros((runs if shared else 1, *self.rate.shape), q.dtype)
        self.gbiases = [np.zeros((len(tasks), *x.shape), q.dtype) for x in (q_bias, k_bias)]
        self.gdt = np.zeros_like(self.dt)
        self.unrotate = trapezoid.unrotated_keys.sized(0)

    def task(self, task):
        """What reads, and in a backward pass writes, the queries and keys of a task."""
        return _RotatedTask(self, task)

    def gradients(self):
        """(gq, gk, gq_bias, gk_bias, grate, gdt), when all is written."""
        return *(x.sum(axis=0) for x in (*self.partials, *self.gbiases, self.grate)), self.gdt


class _RotatedTask:
    def __init__(self, source, task):
        self.source, self.task, self.now = source, task, None

    def read(self, step):
        source, task = self.source, self.task
        members, backward = (step.members, task.heads), source.partials is not None
        theta = source.saved[task.number, step.index].copy() if backward else source.theta[members]
        if source.keep and not backward:
            source.saved[task.number, step.index] = theta.copy()
        dtype, shape = source.dt.dtype, (2, len(theta), task.count, step.tokens * source.rank, source.size)
        queries, keys = step.room(shape, dtype)
        cosine, sine = np.empty((2, len(theta), task.count, step.tokens, source.rate.shape[3]), dtype)
        source.rotate(
            *source.arrays, source.rate, source.dt, step.places, task.run[0], *source.options,
            theta, cosine, sine, queries, keys,
        )  # fmt: skip
        if not backward:
            source.theta[members] = theta
            if len(step.ending):
                numbers, pieces, rows = self._last_rows(step)
                source.k_last[numbers, :, task.heads] = keys[pieces, :, rows]
        self.now = queries, keys, cosine, sine
        return queries, keys

    def _last_rows(self, step):
        """For the pieces that are their sequence's last: sequences (e,), pieces (e, 1), rows (e, R) of last tokens."""
        rank, ending = self.source.rank, step.ending
        rows = (step.places[ending, 2, None] - 1) * rank + np.arange(rank)
        return np.arange(len(self.source.k_last))[step.members][ending], ending[:, None], rows

    def write(self, step, dq, dk):
        source, task = self.source, self.task
        number = task.run_number
        if len(step.ending):
            numbers, pieces, rows = self._last_rows(step)
            dk[pieces, :, rows] += source.gk_last[numbers, :, task.heads]
        gtheta = source.gtheta[step.members, task.heads]
        source.unrotate(
            dq, dk, *self.now, source.rate, source.dt, step.places, task.run[0], *source.options,
            gtheta, source.partials[0][number], source.partials[1][number],
            source.gbiases[0][task.number], source.gbiases[1][task.number],
            source.grate[number if len(source.grate) > 1 else 0], source.gdt,
        )  # fmt: skip
        source.gtheta[step.members, task.heads] = gtheta


def _weights(dt, a, trap, spans):
    """log alpha, s, gamma, beta' (the first of a sequence belongs to the state) and lambda of each token."""
    mix = np.empty_like(trap)
    activation.sigmoid_forward.sized(20 * mix.size)(trap.reshape(-1), mix.reshape(-1))
    gamma = mix * dt
    behind = dt - gamma
    gain = gamma.copy()
    gain[:, :-1] += behind[:, 1:]
    if len(spans) > 1 and len(dt) == 1:
        _, b, _, final = _ends(spans)
        gain[b, final] = gamma[b, final]
    return a * dt, gain, gamma, behind, mix


def _spread(v, psi):
    """v (…, H, P) over the ranks: (…, R, H, P)."""
    return np.ascontiguousarray(v[..., None, :, :] * psi.swapaxes(0, 1))


@functools.lru_cache(16)
def _ends(spans):
    """Of the sequences that have tokens: their numbers, rows of the batch, first and last tokens."""
    table = np.array(spans, np.int64).reshape(-1, 3)
    real = np.flatnonzero(table[:, 1] < table[:, 2])
    b, first, stop = table[real].T
    return real, b, first, stop - 1


def _firsts(x, spans):
    """x (B, L, H) at the first token of each sequence; 0 for one without tokens."""
    picked = np.zeros((len(spans), x.shape[2]), x.dtype)
    real, b, first, _ = _ends(spans)
    picked[real] = x[b, first]
    return picked


def _trapezoidal_scan_forward(
    q, k, v, dt, a, trap, angles, q_bias, k_bias, skip=None, psi=None,
    theta=None, h=None, k_prev=None, v_prev=None,
    *, rotary="pair", radians=False, chunk=CHUNK_ROWS, cu_seqlens=None,
):  # fmt: skip
    """The Mamba-3 scan (arXiv 2603.15569): trapezoidal update, cumulative data-dependent rotation.

    q, k (B, L, R, G, N), normalised, before bias and rotation; v (B, L, H, P); dt (B, L, H) > 0;
    a (B, L, H) < 0; trap (B, L, H) before its sigmoid; angles (B, L, S), or one set a head (B, L, H, S),
    before tanh; q_bias, k_bias (H, R, N); skip (H,), the D term; psi (H, R, P) spreads v over ranks.
    The state, all None for a fresh start: theta (B, H, S) modulo 2 pi, h (B, H, P, N),
    k_prev (B, R, H, N) rotated, v_prev (B, H, P).
    rotary : 'pair' rotates coordinates (2i, 2i+1), 'half' (i, i + N/2).
    radians : theta grows by ``angles`` as they are, in radians a token, not by pi tanh(angles) dt.
    chunk : tokens per product, at most; the numbers do not depend on it.
    cu_seqlens : (n + 1,), with B = 1: sequence i is tokens cu_seqlens[i] … cu_seqlens[i + 1] of the row,
        and the state has n rows.

    Returns (y (B, L, R, H, P), theta, h, k_last, v_last).  Raises ShapeError, ConfigError.
    """
    spans = tuple(sequences(q.shape, cu_seqlens, "trapezoidal_scan"))
    given = (q, k, v, dt, a, trap, angles, q_bias, k_bias, skip, psi, theta, h, k_prev, v_prev)
    inputs, state = _trapezoid_inputs(given, spans, rotary)
    q, k, v, dt, a, trap, turns, q_bias, k_bias, skip, psi = inputs
    batch, length, rank = q.shape[:3]
    heads, width = v.shape[2:]
    log_decay, gain, gamma, behind, mix = _weights(dt, a, trap, spans)
    rate = turns if radians else (np.pi * np.tanh(turns)).astype(q.dtype, copy=False)
    source = _Rotated(q, k, q_bias, k_bias, rate, dt, rotary == "half", bool(radians), state[0], spans)
    plain = given[10] is None and rank == 1
    values = v if plain else _spread(v, psi)
    values = values.reshape(batch, length * rank, heads, width)
    entering = state[1]
    if k_prev is not None and v_prev is not None:
        entering = np.empty_like(state[1])
        call = trapezoid.previous_token.sized(4 * entering.size)
        call(state[1], _firsts(behind, spans), state[2], _spread(state[3], psi), entering)
    scanned = (values, log_decay, gain, gamma, skip)
    y, last, kept = scan(source, *scanned, entering, spans, chunk)
    v_last = state[3].copy()
    real, b, _, final = _ends(spans)
    v_last[real] = v[b, final]
    if len(real) < len(spans):
        nothing = np.setdiff1d(np.arange(len(spans)), real)
        source.k_last[nothing], last[nothing] = state[2][nothing], state[1][nothing]
    y = y.reshape(batch, length, rank, heads, width)
    outputs = y, source.theta, last.swapaxes(2, 3), source.k_last, v_last
    saved = (inputs, state, spans, bool(radians), source, scanned, behind, mix, kept, plain, angles.ndim)
    return outputs, saved


def _trapezoidal_scan_vjp(grad, saved, needs):
    inputs, state, spans, radians, source, scanned, behind, mix, kept, plain, angles_ndim = saved
    q, _, v, dt, a, _, _, _, _, _, psi = inputs
    values = scanned[0]
    batch, length, rank = q.shape[:3]
    heads, width = v.shape[2:]
    gy, gtheta, gh, gk_last, gv_last = grad
    given = zip((gtheta, gk_last, gv_last), (state[0], *state[2:]))
    gtheta, gk_last, gv_last = (contiguous(g, x.shape, q) for g, x in given)
    gy = contiguous(gy, values.shape, q).reshape(values.shape)
    gh = contiguous(None if gh is None else gh.swapaxes(2, 3), state[1].shape, q)
    source.gtheta, source.gk_last = gtheta, gk_last  # what reaches the last state
    gvalues, glog, ggain, ggamma, gskip, gstate = scan_gradient(source, *scanned, kept, gy, gh)
    gq, gk, gq_bias, gk_bias, grate, gdt = source.gradients()

    gvalues = gvalues.reshape(batch, length, rank, heads, width)
    gv = gvalues[:, :, 0] if plain else np.einsum("blrhp,hrp->blhp", gvalues, psi)
    firsts, spread = _firsts(behind, spans), _spread(state[3], psi).swapaxes(1, 2)  # (S, H, R, P)
    gk_prev = (firsts[:, :, None, None] * (spread @ gstate.swapaxes(2, 3))).swapaxes(1, 2)
    gspread = state[2].swapaxes(1, 2) @ gstate
    gfirst = np.einsum("shrp,shrp->sh", gspread, spread)
    gspread *= firsts[:, :, None, None]
    gv_prev = gspread[:, :, 0] if plain else np.einsum("shrp,hrp->shp", gspread, psi)
    gpsi = None
    if any(needs[10:11]):
        gpsi = np.einsum("blrhp,blhp->hrp", gvalues, v) + np.einsum("shrp,shp->hrp", gspread, state[3])
    gbehind = np.zeros_like(behind)
    gbehind[:, 1:] = ggain[:, :-1]
    real, b, first, final = _ends(spans)
    gv[b, final] += gv_last[real]
    gbehind[b, first] = gfirst[real]
    if len(real) < len(spans):
        nothing = np.setdiff1d(np.arange(len(spans)), real)
        gk_prev[nothing], gv_prev[nothing] = gk_last[nothing], gv_last[nothing]
    ggamma += ggain
    gdt += a * glog + mix * ggamma + (1 - mix) * gbehind
    gtrap = dt * (ggamma - gbehind) * mix * (1 - mix)
    if not radians:
        grate *= np.pi - source.rate * source.rate / np.pi
    gangles = grate[:, :, 0] if angles_ndim == 3 else grate
    return (
        gq, gk, gv, gdt, dt * glog, gtrap, gangles, gq_bias, gk_bias, gskip, gpsi,
        source.gtheta, gstate.swapaxes(2, 3), gk_prev, gv_prev,
    )  # fmt: skip


def _trapezoidal_scan_reference(
    q, k, v, dt, a, trap, angles, q_bias, k_bias, skip=None, psi=None,
    theta=None, h=None, k_prev=None, v_prev=None,
    *, rotary="pair", radians=False, chunk=CHUNK_ROWS, cu_seqlens=None,
):  # fmt: skip
    """The defining recurrence, one sequence, head and token at a time."""
    batch, length, rank, groups, size = q.shape
    heads, width = v.shape[2:]
    turns = angles.shape[-1]
    angles = angles[:, :, None] if angles.ndim == 3 else angles
    angles = np.broadcast_to(angles, (batch, length, heads, turns))
    skip = np.zeros(heads) if skip is None else skip
    psi = np.ones((heads, rank, width)) if psi is None else psi
    spans = sequences(q.shape, cu_seqlens, "trapezoidal_scan")
    count = len(spans)
    theta = np.zeros((count, heads, turns)) if theta is None else theta.copy()
    h = np.zeros((count, heads, width, size)) if h is None else h.copy()
    k_prev = np.zeros((count, rank, heads, size)) if k_prev is None else k_prev.copy()
    v_prev = np.zeros((count, heads, width)) if v_prev is None else v_prev.copy()
    y = np.zeros((batch, length, rank, heads, width))
    i = np.arange(turns)
    pairs = (2 * i, 2 * i + 1) if rotary == "pair" else (i, i + size // 2)

    def rotate(x, angle):
        out = x.copy()
        out[:, pairs[0]] = x[:, pairs[0]] * np.cos(angle) - x[:, pairs[1]] * np.sin(angle)
        out[:, pairs[1]] = x[:, pairs[0]] * np.sin(angle) + x[:, pairs[1]] * np.cos(angle)
        return out

    tokens = [(s, b, t) for s, (b, low, high) in enumerate(spans) for t in range(low, high)]
    for (s, b, t), j in itertools.product(tokens, range(heads)):
        g, step, mix = j * groups // heads, dt[b, t, j], 1 / (1 + np.exp(-trap[b, t, j]))
        alpha = np.exp(a[b, t, j] * step)
        turn = angles[b, t, j] if radians else np.pi * np.tanh(angles[b, t, j]) * step
        theta[s, j] = np.mod(theta[s, j] + turn, 2 * np.pi)
        key = rotate(k[b, t, :, g] + k_bias[j], theta[s, j])
        query = rotate(q[b, t, :, g] + q_bias[j], theta[s, j])
        value, previous = psi[j] * v[b, t, j], psi[j] * v_prev[s, j]
        h[s, j] = (
            alpha * h[s, j]
            + alpha * (1 - mix) * step * previous.T @ k_prev[s, :, j]
            + mix * step * value.T @ key
        )
        y[b, t, :, j] = query @ h[s, j].T + skip[j] * value
        k_prev[s, :, j], v_prev[s, j] = key, v[b, t, j]
    return y, theta, h, k_prev, v_prev


def _trapezoidal_scan_samples(rng):
    for batch, length, rank, groups, heads, size, width, turns, rotary, state, shared, packed in (
        (2, 5, 1, 1, 2, 4, 3, 1, "pair", False, True, None),
        (1, 4, 2, 2, 4, 6, 2, 2, "half", True, True, None),
        (1, 13, 2, 1, 2, 4, 2, 2, "half", True, False, (0, 9, 9, 13)),
        (1, 1, 1, 1, 1, 2, 1, 0, "pair", True, True, None),
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
            count = len(packed) - 1 if packed else batch
            inputs += [
                normal((heads, rank, width)), rng.uniform(2, 4, (count, heads, turns)),
                normal((count, heads, width, size)), normal((count, rank, heads, size)),
                normal((count, heads, width)),
            ]  # fmt: skip
        chunk = 3 if packed else CHUNK_ROWS
        yield tuple(inputs), {"rotary": rotary, "radians": size == 6, "chunk": chunk, "cu_seqlens": packed}


trapezoidal_scan = primitive(
    "trapezoidal_scan", _trapezoidal_scan_forward, _trapezoidal_scan_vjp,
    reference=_trapezoidal_scan_reference, samples=_trapezoidal_scan_samples, outputs=5, tolerance=1e-4,
)  # fmt: skip
