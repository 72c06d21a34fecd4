"""The chunked scan that Mamba-2 and Mamba-3 share: products by BLAS, the rest by kernels, chunk after chunk.

The mathematics stands in :mod:`xuracore.kernels.ssd`.  A task is a run of heads of one sequence; its
arrays of one chunk stay in a core's cache.  Tasks are independent and cut from shapes alone, so the
numbers do not depend on the number of threads.

Queries and keys come from a source: :class:`Grouped` here, rotated ones in :mod:`xuracore.ops.trapezoid`.
"""

import numpy as np

from xuracore import threads
from xuracore.autograd import is_grad_enabled
from xuracore.kernels import ssd

CHUNK_ROWS = 64  # half of a chunk's scores are wasted above the diagonal, so not many more
RUNS = 4  # tasks of one call, at least, where there are heads enough
TOKEN_BY_TOKEN = 8  # up to this length the plain recurrence is faster than products of such few rows


def _runs(spans, groups, heads):
    """Heads cut into runs [low, high), each within one group where heads share groups."""
    longest = max((stop - start for _, start, stop in spans), default=0)
    wanted = 1 if longest <= TOKEN_BY_TOKEN else -(-RUNS // len(spans))
    per_group = heads // groups
    if per_group == 1:
        wanted = min(wanted, heads)
        edges = [heads * i // wanted for i in range(wanted + 1)]
        return list(zip(edges, edges[1:]))
    parts = -(-wanted // groups)
    parts = next(n for n in range(1, per_group + 1) if per_group % n == 0 and (n >= parts or n == per_group))
    return [(h, h + per_group // parts) for h in range(0, heads, per_group // parts)]


class Grouped:
    """Queries and keys (B, L, G, N) as they are, G dividing the heads; one rank."""

    rank = 1

    def __init__(self, q, k, heads):
        self.q, self.k = q, k
        self.groups, self.size = q.shape[2:]
        self.per_group = heads // self.groups

    def prepare(self, runs):
        """Make room for gradients; runs that share a group each have their own."""
        self.parts = max(1, self.per_group // (runs[0][1] - runs[0][0]))
        self.gq, self.gk = (np.empty((self.parts, *x.shape), x.dtype) for x in (self.q, self.k))

    def task(self, place, span, run):
        """What reads, and in a backward pass writes, one run of heads of one sequence."""
        return _GroupedRun(self, span[0], run)

    def gradients(self):
        """(gq, gk), when all is written."""
        return tuple(g[0] if self.parts == 1 else g.sum(axis=0) for g in (self.gq, self.gk))


class _GroupedRun:
    def __init__(self, source, b, run):
        self.source, self.b = source, b
        first = run[0] // source.per_group
        self.groups = slice(first, first + max(1, (run[1] - run[0]) // source.per_group))
        self.part = run[0] % source.per_group // (run[1] - run[0])

    def read(self, index, start, tokens):
        """Queries and keys of a chunk, (U or 1, rows, N)."""
        at = self.b, slice(start, start + tokens), self.groups
        return (np.ascontiguousarray(x[at].swapaxes(0, 1)) for x in (self.source.q, self.source.k))

    def write(self, index, start, tokens, dq, dk):
        """The gradients of what ``read`` gave."""
        at = self.part, self.b, slice(start, start + tokens), self.groups
        self.source.gq[at], self.source.gk[at] = dq.swapaxes(0, 1), dk.swapaxes(0, 1)


class _Chunks:
    """Shapes of one call, and what a task allocates."""

    def __init__(self, source, v, chunk):
        self.source, self.size, self.rank = source, source.size, source.rank
        self.width, self.dtype = v.shape[3], v.dtype
        self.tokens = max(1, min(chunk, CHUNK_ROWS // self.rank))

    def of(self, span):
        starts = range(span[1], span[2], self.tokens)
        return [(index, t, min(self.tokens, span[2] - t)) for index, t in enumerate(starts)]

    def rows(self, x, b, start, tokens, run):
        """A run of heads of x (B, L * R, H, P) as (U, rows, P)."""
        return x[b, start * self.rank : (start + tokens) * self.rank, run[0] : run[1]].swapaxes(0, 1)

    def scratch(self, run, span):
        count, rows = run[1] - run[0], min(self.tokens, span[2] - span[1]) * self.rank
        ends = self.size + rows
        shapes = (count, rows, ends), (count, ends, self.width), (count, rows, self.width), (count,)
        return [np.empty(shape, self.dtype) for shape in shapes]


def scan(source, v, log_decay, gain, own, skip, state, spans, chunk=CHUNK_ROWS):
    """The recurrence of :mod:`xuracore.kernels.ssd` from ``state`` (S, H, N, P), one for each of S spans.

    v (B, L * R, H, P); log_decay, gain, own (B, L, H); skip (H,).  Returns (y like v, last like state, the
    states before the chunks of each span for :func:`scan_gradient`, none while no tape is kept).
    """
    sizes = _Chunks(source, v, chunk)
    y, last = np.empty_like(v), np.empty_like(state)
    kept = [len(sizes.of(span)) if is_grad_enabled() else 0 for span in spans]
    entering = [np.empty((n, *state.shape[1:]), v.dtype) for n in kept]
    fill, step = ssd.ssd_chunk.sized(0), ssd.ssd_steps.sized(0)

    def task(place, run):
        span, heads = spans[place], slice(*run)
        b, start, stop = span
        read = source.task(place, span, run).read
        if stop - start <= TOKEN_BY_TOKEN:
            last[place, heads] = state[place, heads]
            for index, t, tokens in sizes.of(span):
                if kept[place]:
                    entering[place][index, heads] = last[place, heads]
                queries, keys = read(index, t, tokens)
                step(queries, keys, v, log_decay, gain, own, skip, b, t, run[0], tokens, last[place, heads], y)
            return
        a, x, scaled, total = sizes.scratch(run, span)
        carried = x[:, : sizes.size]
        carried[...] = state[place, heads]
        for index, t, tokens in sizes.of(span):
            rows = tokens * sizes.rank
            ends = sizes.size + rows
            queries, keys = read(index, t, tokens)
            products = queries @ keys.swapaxes(1, 2)
            fill(queries, v, log_decay, gain, own, skip, b, t, run[0], tokens, products, a, x, scaled, total)
            if kept[place]:
                entering[place][index, heads] = carried
            np.matmul(a[:, :rows, :ends], x[:, :ends], out=sizes.rows(y, b, t, tokens, run))
            carried *= total[:, None, None]
            carried += keys.swapaxes(1, 2) @ scaled[:, :rows]
        last[place, heads] = carried

    tasks = _tasks(task, source, v, spans)
    threads.share(tasks, 4 * v.size * source.size)
    return y, last, entering


def _tasks(task, source, v, spans):
    runs = _runs(spans, source.groups, v.shape[2])
    return [(task, place, run) for place in range(len(spans)) for run in runs]


def scan_gradient(source, v, log_decay, gain, own, skip, entering, spans, gy, glast, chunk=CHUNK_ROWS):
    """Gradients of :func:`scan`: (gv, glog_decay, ggain, gown, gskip, gstate); the source keeps its own."""
    sizes = _Chunks(source, v, chunk)
    gstate = np.empty_like(glast)
    gv, glog, ggain, gown = (np.empty_like(m) for m in (v, log_decay, gain, own))
    gskip = np.zeros((len(spans), v.shape[2]), v.dtype)
    fill, take_apart = ssd.ssd_chunk.sized(0), ssd.ssd_chunk_gradient.sized(0)
    size = sizes.size
    source.prepare(_runs(spans, source.groups, v.shape[2]))

    def task(place, run):
        span, heads = spans[place], slice(*run)
        keyed = source.task(place, span, run)
        grad = glast[place, heads].copy()
        a, x, scaled, total = sizes.scratch(run, span)
        da, dx, back = np.empty_like(a), np.empty_like(x), np.empty_like(scaled)
        dkeys = np.empty((len(a), a.shape[1], size), v.dtype)
        for index, t, tokens in reversed(sizes.of(span)):
            rows = tokens * sizes.rank
            ends = size + rows
            queries, keys = keyed.read(index, t, tokens)
            products = queries @ keys.swapaxes(1, 2)
            fill(queries, v, log_decay, gain, own, skip, span[0], t, run[0], tokens, products, a, x, scaled, total)
            x[:, :size] = entering[place][index, heads]
            dy = sizes.rows(gy, span[0], t, tokens, run)
            np.matmul(dy, x[:, :ends].swapaxes(1, 2), out=da[:, :rows, :ends])
            np.matmul(a[:, :rows, :ends].swapaxes(1, 2), dy, out=dx[:, :ends])
            np.matmul(keys, grad, out=back[:, :rows])
            np.matmul(scaled[:, :rows], grad.swapaxes(1, 2), out=dkeys[:, :rows])
            dproducts = np.empty_like(products)
            dq, dk = np.empty((2, *queries.shape), v.dtype)
            take_apart(
                v, log_decay, gain, own, span[0], t, run[0], tokens, products, a, x, grad,
                da, dx, back, dkeys, dproducts, dq, dk, gv, glog, ggain, gown, gskip[place],
            )  # fmt: skip
            dq += dproducts @ keys
            dk += dproducts.swapaxes(1, 2) @ queries
            keyed.write(index, t, tokens, dq, dk)
            grad *= total[:, None, None]
            grad += dx[:, :size]
        gstate[place, heads] = grad

    threads.share(_tasks(task, source, v, spans), 10 * v.size * size)
    return gv, glog, ggain, gown, gskip.sum(axis=0), gstate
