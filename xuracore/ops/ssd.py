"""The chunked scan of Mamba-2 (SSD) as one op, state in and state out.

:func:`scan` and :func:`scan_gradient` serve Mamba-3 too; the mathematics stands in
:mod:`xuracore.kernels.ssd`.
"""

import math

import numpy as np

from xuracore import threads
from xuracore.autograd import is_grad_enabled
from xuracore.errors import ConfigError, ShapeError
from xuracore.kernels import activation, ssd
from xuracore.ops.blocks import contiguous
from xuracore.ops.registry import primitive

CHUNK_ROWS = 64  # rows of A: half of a chunk's products are wasted above the diagonal, so not many more


def sequences(shape, cu_seqlens, op):
    """(batch, start, stop) of each sequence in arrays (B, L, …): whole rows, or the parts of a packed one.

    cu_seqlens : None, or (n + 1,) integers from 0 to L, never falling, with B = 1.
    """
    batch, length = shape[:2]
    if cu_seqlens is None:
        return [(b, 0, length) for b in range(batch)]
    edges = np.asarray(cu_seqlens)
    if edges.ndim != 1 or edges.dtype.kind not in "iu" or len(edges) < 2 or batch != 1:
        raise ShapeError(
            f"{op}: cu_seqlens has shape {edges.shape} and type {edges.dtype}, the batch size is {batch}; "
            "expected (n + 1,) integers, and one packed row"
        )
    if edges[0] != 0 or edges[-1] != length or (np.diff(edges.astype(np.int64)) < 0).any():
        raise ShapeError(f"{op}: cu_seqlens must rise from 0 to the length {length}; got {edges.tolist()}")
    return [(0, int(start), int(stop)) for start, stop in zip(edges, edges[1:])]


def _runs(count, groups, heads, least):
    """Heads cut into runs [low, high), each within one group where heads share groups.

    About ``least`` runs over ``count`` sequences; from shapes alone, so that sums are the same on any machine.
    """
    per_group = heads // groups
    wanted = max(1, -(-least // max(1, count)))
    if per_group == 1:
        wanted = min(wanted, heads)
        edges = [heads * i // wanted for i in range(wanted + 1)]
        return list(zip(edges, edges[1:])), 1
    wanted = -(-wanted // groups)
    parts = next(n for n in range(1, per_group + 1) if per_group % n == 0 and (n >= wanted or n == per_group))
    run = per_group // parts
    return [(h, h + run) for h in range(0, heads, run)], parts


RUNS = 4  # tasks of a call over all sequences, at least, where there are heads enough


class _Sizes:
    """Shapes of one call, and views of one run of heads in one chunk."""

    def __init__(self, q, v, log_decay, chunk):
        self.batch, self.rows, self.groups, self.size = q.shape
        self.heads, self.width = v.shape[2:]
        self.rank = self.rows // log_decay.shape[1] if log_decay.shape[1] else 1
        self.tokens = max(1, min(chunk, CHUNK_ROWS // self.rank))
        self.per_group = self.heads // self.groups

    def chunks(self, start, stop):
        return [(t, min(self.tokens, stop - t)) for t in range(start, stop, self.tokens)]

    def keyed(self, x, b, start, tokens, run):
        """Rows of q or k for a run of heads, (1, rows, N) where they share a group, else (U, rows, N)."""
        rows = slice(start * self.rank, (start + tokens) * self.rank)
        g = run[0] // self.per_group
        return x[b, rows, g : g + (run[1] - run[0] if self.per_group == 1 else 1)].swapaxes(0, 1)

    def valued(self, x, b, start, tokens, run):
        rows = slice(start * self.rank, (start + tokens) * self.rank)
        return x[b, rows, run[0] : run[1]].swapaxes(0, 1)

    def scratch(self, run, length, dtype):
        count, rows = run[1] - run[0], min(self.tokens, length) * self.rank
        return (
            np.empty((count, rows, self.size + rows), dtype),
            np.empty((count, self.size + rows, self.width), dtype),
            np.empty((count, rows, self.width), dtype),
            np.empty(count, dtype),
        )


def scan(q, k, v, log_decay, gain, own, skip, state, spans, chunk=CHUNK_ROWS):
    """The recurrence of :mod:`xuracore.kernels.ssd` from ``state`` (S, H, N, P), one of S ``spans`` each.

    Returns (y (B, L * R, H, P), last (S, H, N, P), entering: the states before each chunk of each span,
    for :func:`scan_gradient`; empty while no tape is kept).
    """
    sizes = _Sizes(q, v, log_decay, chunk)
    y, last = np.empty_like(v), np.empty_like(state)
    chunks = [len(sizes.chunks(*span[1:])) if is_grad_enabled() else 0 for span in spans]
    entering = [np.empty((n, *state.shape[1:]), q.dtype) for n in chunks]
    fill = ssd.ssd_chunk.sized(0)

    def task(place, run):
        b, start, stop = spans[place]
        heads = slice(*run)
        if start == stop:
            last[place, heads] = state[place, heads]
            return
        a, x, scaled, total = sizes.scratch(run, stop - start, q.dtype)
        carried = x[:, : sizes.size]
        carried[...] = state[place, heads]
        for index, (t, tokens) in enumerate(sizes.chunks(start, stop)):
            rows = tokens * sizes.rank
            ends = sizes.size + rows
            queries, keys = (sizes.keyed(m, b, t, tokens, run) for m in (q, k))
            products = queries @ keys.swapaxes(1, 2)
            fill(
                q, v, log_decay, gain, own, skip, b, t, run[0], tokens, sizes.rank, products,
                a, x, scaled, total,
            )  # fmt: skip
            if chunks[place]:
                entering[place][index, heads] = carried
            np.matmul(a[:, :rows, :ends], x[:, :ends], out=sizes.valued(y, b, t, tokens, run))
            carried *= total[:, None, None]
            carried += keys.swapaxes(1, 2) @ scaled[:, :rows]
        last[place, heads] = carried

    runs, _ = _runs(len(spans), sizes.groups, sizes.heads, RUNS)
    threads.share([(task, place, run) for place in range(len(spans)) for run in runs], 4 * y.size * sizes.size)
    return y, last, entering


def scan_gradient(q, k, v, log_decay, gain, own, skip, entering, spans, gy, glast, chunk=CHUNK_ROWS):
    """Gradients of :func:`scan`: (gq, gk, gv, glog_decay, ggain, gown, gskip, gstate)."""
    sizes = _Sizes(q, v, log_decay, chunk)
    gstate = np.empty_like(glast)
    runs, parts = _runs(len(spans), sizes.groups, sizes.heads, RUNS)
    gq, gk = (np.empty((parts, *q.shape), q.dtype) for _ in range(2))
    gv, glog, ggain, gown = (np.empty_like(m) for m in (v, log_decay, gain, own))
    gskip = np.zeros((len(spans), sizes.heads), q.dtype)
    fill, take_apart = ssd.ssd_chunk.sized(0), ssd.ssd_chunk_gradient.sized(0)
    size = sizes.size

    def task(place, run):
        b, start, stop = spans[place]
        heads, count = slice(*run), run[1] - run[0]
        part = run[0] % sizes.per_group // count if parts > 1 else 0
        if start == stop:
            gstate[place, heads] = glast[place, heads]
            return
        a, x, scaled, total = sizes.scratch(run, stop - start, q.dtype)
        grad = np.ascontiguousarray(glast[place, heads])
        da, dx = np.empty_like(a), np.empty_like(x)
        back, dkeys = np.empty_like(scaled), np.empty((count, a.shape[1], size), q.dtype)
        carried = x[:, :size]
        for index, (t, tokens) in reversed(list(enumerate(sizes.chunks(start, stop)))):
            rows = tokens * sizes.rank
            ends = size + rows
            queries, keys = (sizes.keyed(m, b, t, tokens, run) for m in (q, k))
            products = queries @ keys.swapaxes(1, 2)
            fill(
                q, v, log_decay, gain, own, skip, b, t, run[0], tokens, sizes.rank, products,
                a, x, scaled, total,
            )  # fmt: skip
            carried[...] = entering[place][index, heads]
            dy = sizes.valued(gy, b, t, tokens, run)
            np.matmul(dy, x[:, :ends].swapaxes(1, 2), out=da[:, :rows, :ends])
            np.matmul(a[:, :rows, :ends].swapaxes(1, 2), dy, out=dx[:, :ends])
            np.matmul(keys, grad, out=back[:, :rows])
            np.matmul(scaled[:, :rows], grad.swapaxes(1, 2), out=dkeys[:, :rows])
            dproducts = np.empty_like(products)
            dq, dk = np.empty((2, len(products), rows, size), q.dtype)
            take_apart(
                v, log_decay, gain, own, b, t, run[0], tokens, sizes.rank, products, a, x, grad,
                da, dx, back, dkeys, dproducts, dq, dk, gv, glog, ggain, gown, gskip[place],
            )  # fmt: skip
            np.add(dq, dproducts @ keys, out=sizes.keyed(gq[part], b, t, tokens, run))
            np.add(dk, dproducts.swapaxes(1, 2) @ queries, out=sizes.keyed(gk[part], b, t, tokens, run))
            grad *= total[:, None, None]
            grad += dx[:, :size]
        gstate[place, heads] = grad

    threads.share([(task, place, run) for place in range(len(spans)) for run in runs], 10 * gv.size * sizes.size)
    gq, gk = (m[0] if parts == 1 else m.sum(axis=0) for m in (gq, gk))
    return gq, gk, gv, glog, ggain, gown, gskip.sum(axis=0), gstate


# ---------------------------------------------------------------------- Mamba-2
def _ssd_inputs(x, dt, a, b, c, skip, z, dt_bias, h, spans):
    if x.ndim != 4 or b.ndim != 4 or b.shape[2] == 0 or x.shape[2] % b.shape[2]:
        raise ShapeError(
            f"ssd_scan: x {x.shape}, B {b.shape}; expected (B, L, H, P) and (B, L, G, N) with G dividing H"
        )
    batch, length, heads, width = x.shape
    keyed = (batch, length, *b.shape[2:])
    shapes = {
        "x": x.shape,
        "dt": (batch, length, heads),
        "A": (heads,),
        "B": keyed,
        "C": keyed,
        "D": (heads, width) if skip is not None and skip.ndim == 2 else (heads,),
        "z": x.shape,
        "dt_bias": (heads,),
        "h": (len(spans), heads, width, b.shape[3]),
    }
    dense = []
    for (name, shape), given in zip(shapes.items(), (x, dt, a, b, c, skip, z, dt_bias, h)):
        if given is not None and given.shape != shape:
            raise ShapeError(f"ssd_scan: {name} has shape {given.shape}; expected {shape}")
        dense.append(given if given is None and name == "z" else contiguous(given, shape, x))
    return dense


def _softplus(x):
    y = np.empty_like(x)
    activation.softplus_forward.sized(20 * x.size)(x.reshape(-1), y.reshape(-1))
    return y


def _ssd_scan_forward(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, h=None,
    *, dt_softplus=False, dt_limit=(0.0, math.inf), chunk=CHUNK_ROWS, cu_seqlens=None,
):  # fmt: skip
    """The scan of Mamba-2 (SSD, arXiv 2405.21060), in chunks → (y (B, L, H, P), last state (S, H, P, N)).

    h_t = e^{dt_t A} h_{t-1} + dt_t x_t B_t^T,   y_t = h_t C_t + D x_t, times silu(z_t) if z is given.

    x, z (B, L, H, P); dt (B, L, H); A (H,), negative; B, C (B, L, G, N), head h reads group h // (H / G);
    D (H,) or (H, P); dt_bias (H,); h (S, H, P, N) the state before the first token, S = B.
    D, z, dt_bias and h may be None: no skip, no gate, no bias, a fresh start.
    dt_softplus : dt is given before softplus.   dt_limit : dt is clipped to this range afterwards.
    chunk : tokens per product, at most; the numbers do not depend on it.
    cu_seqlens : (S + 1,), with B = 1: sequence i is tokens cu_seqlens[i] … cu_seqlens[i + 1] of the row.
    Raises ShapeError, ConfigError.
    """
    low, high = dt_limit
    if not 0 <= low <= high:
        raise ConfigError(f"dt_limit={dt_limit}; expected 0 <= least <= greatest")
    spans = sequences(x.shape, cu_seqlens, "ssd_scan")
    x, dt, a, b, c, skip, z, bias, h = _ssd_inputs(x, dt, A, B, C, D, z, dt_bias, h, spans)
    raw = dt + bias
    step = _softplus(raw) if dt_softplus else raw
    inside = (step >= low) & (step <= high)
    step = np.clip(step, x.dtype.type(low), x.dtype.type(high))
    direct = skip if skip.ndim == 1 else np.zeros(x.shape[2], x.dtype)
    inputs = (c, b, x, step * a, step, step, direct)
    y, last, entering = scan(*inputs, np.ascontiguousarray(h.swapaxes(2, 3)), spans, chunk)
    if skip.ndim == 2:
        y += skip * x
    before, gate = y, None
    if z is not None:
        gate = np.empty_like(z)
        activation.silu_forward.sized(8 * z.size)(z.reshape(-1), gate.reshape(-1))
        y = y * gate
    last = np.ascontiguousarray(last.swapaxes(2, 3))
    return (y, last), (inputs, a, raw, inside, skip, z, before, gate, entering, spans, chunk, dt_softplus)


def _ssd_scan_vjp(grad, saved, needs):
    inputs, a, raw, inside, skip, z, before, gate, entering, spans, chunk, soft = saved
    x, step = inputs[2], inputs[4]
    heads, width, size = *x.shape[2:], inputs[0].shape[3]
    gy, glast = (contiguous(g, s, x) for g, s in zip(grad, (x.shape, (len(spans), heads, width, size))))
    gz = None
    if z is not None:
        gz = np.empty_like(z)
        through = (gy * before).reshape(-1)
        activation.silu_backward.sized(8 * z.size)(through, z.reshape(-1), gz.reshape(-1))
        gy = gy * gate
    gc, gb, gx, glog, ggain, gown, gskip, gh = scan_gradient(
        *inputs, entering, spans, gy, np.ascontiguousarray(glast.swapaxes(2, 3)), chunk
    )
    if skip.ndim == 2:
        gskip = np.einsum("blhp,blhp->hp", gy, x)
        gx += skip * gy
    gstep = np.where(inside, ggain + gown + glog * a, 0)
    if soft:
        gstep *= 1 / (1 + np.exp(-np.maximum(raw, x.dtype.type(-80))))
    gstep = gstep.astype(x.dtype, copy=False)
    ga = np.einsum("blh,blh->h", glog, step)
    return gx, gstep, ga, gb, gc, gskip, gz, gstep.sum(axis=(0, 1)), gh.swapaxes(2, 3)


def _ssd_scan_reference(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, h=None,
    *, dt_softplus=False, dt_limit=(0.0, math.inf), chunk=CHUNK_ROWS, cu_seqlens=None,
):  # fmt: skip
    """The defining recurrence, one token at a time."""
    heads, width = x.shape[2:]
    dt = dt + (0 if dt_bias is None else dt_bias)
    dt = np.clip(np.logaddexp(0, dt) if dt_softplus else dt, *dt_limit)
    B, C = (np.repeat(m, heads // m.shape[2], axis=2) for m in (B, C))
    spans = sequences(x.shape, cu_seqlens, "ssd_scan")
    h = np.zeros((len(spans), heads, width, B.shape[3])) if h is None else h.copy()
    skip = np.zeros((heads, 1)) if D is None else D.reshape(heads, -1)
    y = np.zeros(x.shape)
    for place, (b, start, stop) in enumerate(spans):
        for t in range(start, stop):
            push = (dt[b, t, :, None] * x[b, t])[:, :, None] * B[b, t][:, None, :]
            h[place] = np.exp(dt[b, t] * A)[:, None, None] * h[place] + push
            y[b, t] = np.einsum("hpn,hn->hp", h[place], C[b, t]) + skip * x[b, t]
    return (y if z is None else y * z / (1 + np.exp(-z))), h


def _ssd_scan_samples(rng):
    for batch, length, heads, width, groups, size, full, packed in (
        (2, 5, 2, 3, 1, 2, True, None), (1, 67, 2, 1, 2, 2, False, None), (1, 6, 4, 2, 2, 3, True, (0, 2, 2, 6)),
        (1, 1, 1, 1, 1, 1, False, None),
    ):  # fmt: skip
        normal = rng.standard_normal
        inputs = [
            normal((batch, length, heads, width)), rng.uniform(0.1, 1, (batch, length, heads)),
            -rng.uniform(0.2, 2, heads), normal((batch, length, groups, size)),
            normal((batch, length, groups, size)),
        ]  # fmt: skip
        options = {}
        if full:
            count = len(packed) - 1 if packed else batch
            inputs += [normal((heads, width) if packed else heads), normal((batch, length, heads, width))]
            inputs += [normal(heads), normal((count, heads, width, size))]
            options = {"dt_softplus": True, "dt_limit": (0.3, 1.7), "chunk": 2, "cu_seqlens": packed}
        yield tuple(inputs), options


ssd_scan = primitive(
    "ssd_scan", _ssd_scan_forward, _ssd_scan_vjp,
    reference=_ssd_scan_reference, samples=_ssd_scan_samples, outputs=2, tolerance=1e-4,
)  # fmt: skip
