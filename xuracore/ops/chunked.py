"""The chunked scan that Mamba-2 and Mamba-3 share: products by BLAS, the rest by kernels, chunk after chunk.

The mathematics stands in :mod:`xuracore.kernels.ssd`.  A task is a run of heads of one long sequence, or of
several short ones side by side, padded with zeros to the longest of them; its arrays of one chunk stay in a
core's cache.  Tasks are independent and cut from shapes alone, so the numbers do not depend on the number of
threads.

Queries and keys come from a source: :class:`Grouped` here, rotated ones in :mod:`xuracore.ops.trapezoid`.
"""

import functools
from typing import NamedTuple

import numpy as np

from xuracore import threads
from xuracore.autograd import is_grad_enabled
from xuracore.kernels import ssd

CHUNK_ROWS = 64  # half of a chunk's scores are wasted above the diagonal, so not many more
TASKS = 4  # of one call, at least, where there are sequences and heads enough
TOKEN_BY_TOKEN = 8  # up to this length the plain recurrence is faster than products of such few rows
KEPT_TOKENS = 16  # up to this length the backward pass gets A and X of the forward pass instead of making them again
TASK_BYTES = 3 << 18  # what the arrays of short sequences done side by side may take: most of a core's L2 cache


class Step(NamedTuple):
    """Consecutive pieces of a task's sequences, one of each, done at once."""

    index: int
    places: np.ndarray  # (m, 3) row of the batch, first token, tokens
    members: object  # the numbers of their sequences, an index of an axis
    tokens: int  # of the longest piece
    room: object  # np.empty or, where some are shorter, np.zeros: of arrays whose rows of tokens will be written
    ending: np.ndarray  # the pieces that are their sequence's last


class Task(NamedTuple):
    """Heads run[0] … run[1] of some sequences, longest first."""

    number: int
    run_number: int
    run: tuple
    heads: slice
    count: int
    members: object  # the numbers of the sequences, an index of an axis
    steps: list


def _index(numbers):
    """Numbers of sequences as an index: a slice if there is one, which is faster and gives a view."""
    return slice(numbers[0], numbers[0] + 1) if len(numbers) == 1 else np.array(numbers)


def _steps(side, spans, chunk):
    """The Steps of the sequences ``side``, longest first."""
    table = np.array([spans[place] for place in side], np.int64)
    rows, starts, lengths = table[:, 0], table[:, 1], table[:, 2] - table[:, 1]
    steps = []
    for index in range(-(-int(lengths[0]) // chunk)):
        done = index * chunk
        m = np.count_nonzero(lengths > done)
        left = lengths[:m] - done
        places = np.empty((m, 3), np.int64)
        places[:, 0], places[:, 1], places[:, 2] = rows[:m], starts[:m] + done, np.minimum(left, chunk)
        longest, shortest = places[[0, -1], 2].tolist()
        room = np.empty if longest == shortest else np.zeros
        steps.append(Step(index, places, _index(side[:m]), longest, room, np.flatnonzero(left <= chunk)))
    return steps


def _sides(spans, chunk, bytes_a_token):
    """Sequences that are done side by side: lists of their numbers, longest first."""
    lengths = [stop - start for _, start, stop in spans]
    most, sides, first = -(-len(spans) // TASKS), [], 0
    for place in sorted(range(len(spans)), key=lambda place: -lengths[place]):
        length = min(lengths[place], chunk)
        fits = sides and len(sides[-1]) < most and (len(sides[-1]) + 1) * first * bytes_a_token <= TASK_BYTES
        if fits and 2 * length > first:
            sides[-1].append(place)
        else:
            sides.append([place])
            first = length
    return sides


def _runs(wanted, groups, heads):
    """Heads cut into at least ``wanted`` runs [low, high), if there are as many; each within one group."""
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

    def prepare(self, tasks):
        """Make room for gradients; runs that share a group each have their own."""
        self.parts = max(1, self.per_group // tasks[0].count) if tasks else 1
        self.gq, self.gk = (np.empty((self.parts, *x.shape), x.dtype) for x in (self.q, self.k))

    def task(self, task):
        """What reads, and in a backward pass writes, the queries and keys of a task."""
        return _GroupedTask(self, task)

    def gradients(self):
        """(gq, gk), when all is written."""
        return tuple(g[0] if self.parts == 1 else g.sum(axis=0) for g in (self.gq, self.gk))


class _GroupedTask:
    def __init__(self, source, task):
        self.source = source
        first = task.run[0] // source.per_group
        self.groups = slice(first, first + max(1, task.count // source.per_group))
        self.part = task.run[0] % source.per_group // task.count

    def read(self, step):
        """Queries and keys of a step, (m, U or 1, tokens, N)."""
        return (np.ascontiguousarray(take(x, step, self.groups)) for x in (self.source.q, self.source.k))

    def write(self, step, dq, dk):
        """The gradients of what ``read`` gave."""
        for to, d in ((self.source.gq, dq), (self.source.gk, dk)):
            put(to[self.part], step, self.groups, d)


def take(x, step, heads, rank=1):
    """The rows of a step in x (B, L * rank, H, P) as (m, U, tokens * rank, P), a view if it is one piece."""
    places = step.places.tolist()
    if len(places) == 1:
        b, start, tokens = places[0]
        return x[b : b + 1, start * rank : (start + tokens) * rank, heads].swapaxes(1, 2)
    out = step.room((len(places), heads.stop - heads.start, step.tokens * rank, x.shape[3]), x.dtype)
    for piece, (b, start, tokens) in zip(out, places):
        piece[:, : tokens * rank] = x[b, start * rank : (start + tokens) * rank, heads].swapaxes(0, 1)
    return out


def put(x, step, heads, values, rank=1):
    """Write what :func:`take` reads."""
    for piece, (b, start, tokens) in zip(values, step.places.tolist()):
        x[b, start * rank : (start + tokens) * rank, heads] = piece[:, : tokens * rank].swapaxes(0, 1)


@functools.lru_cache(16)  # the layers of a model cut the same sequences, forward and backward
def _tasks(spans, chunk, heads, groups, bytes_a_token):
    sides = _sides(spans, chunk, bytes_a_token)
    few = all(stop - start <= TOKEN_BY_TOKEN for _, start, stop in spans)
    runs = _runs(1 if few else -(-TASKS // max(1, len(sides))), groups, heads)
    tasks = []
    for side in sides:
        steps = _steps(side, spans, chunk)
        for number, run in enumerate(runs):
            tasks.append(Task(len(tasks), number, run, slice(*run), run[1] - run[0], _index(side), steps))
    return tasks


class _Chunks:
    """Shapes and tasks of one call."""

    def __init__(self, source, v, spans, chunk):
        self.size, self.rank, self.width, self.dtype = source.size, source.rank, v.shape[3], v.dtype
        tokens = max(1, min(chunk, CHUNK_ROWS // self.rank))
        heads, rows = v.shape[2], tokens * self.rank
        floats = heads * self.rank * (4 * self.size + 3 * self.width + 2 * rows)
        self.tasks = _tasks(tuple(spans), tokens, heads, source.groups, floats * v.itemsize)

    def scratch(self, task, step, before=None):
        """A, X, w v and e^{c_Q} of a step; those of the step before, if they will do."""
        m, rows = len(step.places), step.tokens * self.rank
        ends, room = self.size + rows, step.room
        if room is np.empty and before is not None and before[0].shape[::2] == (m, rows):
            return before
        a, x = room((m, task.count, rows, ends), self.dtype), room((m, task.count, ends, self.width), self.dtype)
        return a, x, room((m, task.count, rows, self.width), self.dtype), np.empty((m, task.count), self.dtype)


def scan(source, v, log_decay, gain, own, skip, state, spans, chunk=CHUNK_ROWS):
    """The recurrence of :mod:`xuracore.kernels.ssd` from ``state`` (S, H, N, P), one for each of S spans.

    v (B, L * R, H, P); log_decay, gain, own (B, L, H); skip (H,).  Returns (y like v, last like state, what
    :func:`scan_gradient` needs: the tasks and, where a tape is kept, the states before their steps, and for
    short sequences all that their one step made).
    """
    sizes = _Chunks(source, v, spans, chunk)
    y, last, keep = np.empty_like(v), np.empty_like(state), is_grad_enabled()
    entering, made = [[] for _ in sizes.tasks], [None for _ in sizes.tasks]
    fill, recur = ssd.ssd_chunk.sized(0), ssd.ssd_steps.sized(0)

    def do(task):
        keyed, room = source.task(task), None
        one_step, first = len(task.steps) == 1, task.steps[0].tokens if task.steps else 0
        short = one_step and first <= TOKEN_BY_TOKEN
        keep_all = keep and one_step and TOKEN_BY_TOKEN < first <= KEPT_TOKENS  # X has the state before in it
        states = state[task.members, task.heads].copy()
        for step in task.steps:
            carried = states[: len(step.places)]
            if keep and not keep_all:
                entering[task.number].append(carried.copy())
            queries, keys = keyed.read(step)
            if short:
                recur(queries, keys, v, log_decay, gain, own, skip, step.places, task.run[0], carried, y)
                continue
            a, x, scaled, total = room = sizes.scratch(task, step, room)
            products = queries @ keys.swapaxes(2, 3)
            fill(queries, v, log_decay, gain, own, skip, step.places, task.run[0], products, a, x, scaled, total)
            x[:, :, : sizes.size] = carried
            if len(step.places) == 1:
                np.matmul(a, x, out=take(y, step, task.heads, sizes.rank))
            else:
                put(y, step, task.heads, a @ x, sizes.rank)
            carried *= total[:, :, None, None]
            carried += keys.swapaxes(2, 3) @ scaled
            if keep_all:
                made[task.number] = keyed, queries, keys, products, a, x, scaled, total
        last[task.members, task.heads] = states

    threads.share([(do, task) for task in sizes.tasks], 4 * v.size * source.size)
    return y, last, (sizes, entering, made)


def scan_gradient(source, v, log_decay, gain, own, skip, kept, gy, glast):
    """Gradients of :func:`scan`: (gv, glog_decay, ggain, gown, gskip, gstate); the source keeps its own."""
    sizes, entering, made = kept
    gstate = np.empty_like(glast)
    gv, glog, ggain, gown = (np.empty_like(m) for m in (v, log_decay, gain, own))
    gskip = np.zeros((len(sizes.tasks), v.shape[2]), v.dtype)
    fill, take_apart = ssd.ssd_chunk.sized(0), ssd.ssd_chunk_gradient.sized(0)
    size = sizes.size
    source.prepare(sizes.tasks)

    def do(task):
        keyed, room = source.task(task), None
        grads = glast[task.members, task.heads].copy()
        for step in reversed(task.steps):
            grad = grads[: len(step.places)]
            if made[task.number]:
                keyed, queries, keys, products, a, x, scaled, total = made[task.number]
            else:
                queries, keys = keyed.read(step)
                a, x, scaled, total = room = sizes.scratch(task, step, room)
                products = queries @ keys.swapaxes(2, 3)
                fill(queries, v, log_decay, gain, own, skip, step.places, task.run[0], products, a, x, scaled, total)
                x[:, :, :size] = entering[task.number][step.index]
            dy = take(gy, step, task.heads, sizes.rank)
            da, dx = dy @ x.swapaxes(2, 3), a.swapaxes(2, 3) @ dy
            back, dkeys = keys @ grad, scaled @ grad.swapaxes(2, 3)
            dproducts = step.room(products.shape, v.dtype)
            dq, dk = step.room((2, *keys.shape), v.dtype)
            take_apart(
                v, log_decay, gain, own, step.places, task.run[0], products, a, x, grad,
                da, dx, back, dkeys, dproducts, dq, dk, gv, glog, ggain, gown, gskip[task.number],
            )  # fmt: skip
            dq += dproducts @ keys
            dk += dproducts.swapaxes(2, 3) @ queries
            keyed.write(step, dq, dk)
            grad *= total[:, :, None, None]
            grad += dx[:, :, :size]
        gstate[task.members, task.heads] = grads

    threads.share([(do, task) for task in sizes.tasks], 10 * v.size * size)
    return gv, glog, ggain, gown, gskip.sum(axis=0), gstate
