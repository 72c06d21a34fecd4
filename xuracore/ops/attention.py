"""Scaled dot-product attention (Vaswani et al. 2017, §3.2.1), forward and gradient, by tiles.

    S = Q Kᵀ / √d,   P = softmax(S),   O = P V
    dV = Pᵀ dO,   dP = dO Vᵀ,   dS = P ∘ (dP - rowsum(dO ∘ O)),   dQ = dS K / √d,   dK = dSᵀ Q / √d

No L × M matrix is kept (Dao et al. 2022): blocks of queries meet blocks of keys, BLAS multiplies, a kernel does what
stands between, and only the logarithm of each row's sum is saved.  The backward pass computes the tiles again.

Grouped queries: with fewer key heads than query heads, each key head serves a run of query heads.  Inside this file
queries are therefore (B, G, H/G, L, D) and keys (B, G, 1, M, D): a task is a few of the B·G groups, in two slices.
"""

import functools
import math
from collections import deque

import numpy as np

from xuracore import threads
from xuracore.errors import DTypeError, ShapeError
from xuracore.kernels.attention import attention_gradient, attention_weights
from xuracore.ops.arrays import FLOATS
from xuracore.ops.registry import primitive

QUERIES, KEYS = 256, 512  # of one tile
TILE = 160 * 1024  # scores that one task holds at a time: they should stay in the second-level cache
PARALLEL_WORK = 4_000_000  # multiplications below which one thread is faster than two


# ---------------------------------------------------------------------- the forward pass
def _attention_forward(q, k, v, mask=None, causal=False, scale=None):
    """softmax(q kᵀ · scale + mask) v.

    q (B, H, L, D), k (B, G, M, D), v (B, G, M, E) with H a multiple of G → (B, H, L, E).
    mask : broadcastable to (B, H, L, M); boolean, True where a key may be seen, or of the float type of q, added
        to the scores (its gradient is computed too).
    causal : position i of L sees keys up to i + M - L.   scale : default 1/√D.
    A row that may see nothing gives zeros.  Memory beside the result grows with L, not with L·M.  Raises ShapeError,
    DTypeError for a mask of another type.
    """
    if min(q.ndim, k.ndim, v.ndim) != 4 or max(q.ndim, k.ndim, v.ndim) != 4 or not k.shape[1]:
        raise ShapeError(f"attention: q {q.shape}, k {k.shape}, v {v.shape}: each has four axes, k a head")
    if q.shape[-1] != k.shape[-1] or k.shape[:-1] != v.shape[:-1] or q.shape[1] % k.shape[1]:
        raise ShapeError(f"attention: q {q.shape}, k {k.shape}, v {v.shape} do not fit together")
    if q.shape[0] != k.shape[0]:
        raise ShapeError(f"attention: q {q.shape}, k {k.shape}, v {v.shape} differ in batch size")
    kind = np.result_type(q, k, v)
    q, k, v = (x.astype(kind if kind in FLOATS else np.float32, copy=False) for x in (q, k, v))
    batch, heads, length, width = q.shape
    groups, wide = k.shape[1], v.shape[-1]
    scale = q.dtype.type(width**-0.5 if scale is None else scale)
    # in memory (B, L, H, E): what follows is as a rule the transpose back, and costs nothing
    out = np.empty((batch, length, heads, wide), q.dtype).transpose(0, 2, 1, 3)
    log_sum = np.empty((batch, groups, heads // groups, length), q.dtype)
    plan = _Plan(q, k, mask, causal)
    saved = q, k, v, plan, log_sum, out, scale
    plan.run(functools.partial(_forward_task, saved), plan.block_tasks(), width + wide)
    return out, saved


def _forward_task(saved, task):
    """The rows of one block of queries, for some groups of some batch entries."""
    q, k, v, plan, log_sum, out, scale = saved
    b, groups, rows = task
    queries = plan.grouped(q)[b, groups, :, rows] * scale
    count, size = math.prod(queries.shape[:4]), queries.shape[3]
    number = q.dtype.type
    top, total, shrink = np.full(count, -np.inf, number), np.zeros(count, number), np.empty(count, number)
    result = np.zeros((*queries.shape[:4], v.shape[-1]), number)
    more = None
    for columns in plan.key_blocks(rows):
        scores = plan.scores(queries, k, b, groups, rows, columns)
        attention_weights(scores.reshape(count, -1), size, plan.visible(rows, columns), top, total, shrink)
        values = v[b, groups, None, columns]
        if more is None:
            more = np.matmul(scores, values, out=result)
        else:
            result *= shrink.reshape(queries.shape[:4])[..., None]
            result += scores @ values
    empty = total == 0
    total[empty] = 1
    result /= total.reshape(queries.shape[:4])[..., None]
    plan.grouped(out)[b, groups, :, rows] = result
    np.log(total, out=total)
    total += top
    total[empty] = np.inf  # e^(s - inf): no weight in the backward pass either
    log_sum[b, groups, :, rows] = total.reshape(queries.shape[:4])


# ---------------------------------------------------------------------- the gradient
def _attention_vjp(grad, saved, needs):
    q, k, v, plan, log_sum, out, scale = saved
    to_q, to_k, to_v = (np.zeros(x.shape, x.dtype) if need else None for x, need in zip((q, k, v), needs))
    to_mask = np.zeros(plan.mask.shape, q.dtype) if len(needs) > 3 and needs[3] else None
    delta = np.einsum("bhle,bhle->bhl", grad, out).reshape(log_sum.shape)
    task = functools.partial(_backward_task, saved, grad, delta, to_q, to_k, to_v, to_mask)
    plan.run(task, plan.group_tasks(one_by_one=to_mask is not None), 3 * q.shape[-1] + 2 * v.shape[-1])
    return to_q, to_k, to_v, None if to_mask is None else plan.like_mask(to_mask)


def _backward_task(saved, grad, delta, to_q, to_k, to_v, to_mask, task):
    """All gradients of some groups of some batch entries: their keys are nobody else's."""
    q, k, v, plan, log_sum, _, scale = saved
    b, groups = task
    for rows in plan.query_blocks():
        queries = plan.grouped(q)[b, groups, :, rows] * scale
        count, size = math.prod(queries.shape[:4]), queries.shape[3]
        arriving = np.ascontiguousarray(plan.grouped(grad)[b, groups, :, rows])
        base = np.ascontiguousarray(log_sum[b, groups, :, rows]).reshape(-1)
        mean = np.ascontiguousarray(delta[b, groups, :, rows]).reshape(-1)
        for columns in plan.key_blocks(rows):
            weights = plan.scores(queries, k, b, groups, rows, columns)
            slope = arriving @ v[b, groups, None, columns].swapaxes(-1, -2)
            flat = weights.reshape(count, -1), slope.reshape(count, -1)
            attention_gradient(*flat, size, plan.visible(rows, columns), base, mean)
            if to_v is not None:
                to_v[b, groups, columns] += _sum_of_heads(weights.swapaxes(-1, -2) @ arriving)
            if to_k is not None:
                to_k[b, groups, columns] += _sum_of_heads(slope.swapaxes(-1, -2) @ queries)
            if to_q is not None:
                plan.grouped(to_q)[b, groups, :, rows] += slope @ k[b, groups, None, columns]
            if to_mask is not None:
                plan.add_to_mask(to_mask, slope, b, groups, rows, columns)
    if to_q is not None:
        plan.grouped(to_q)[b, groups] *= scale


def _sum_of_heads(x):
    """(B, G, heads of a group, M, D) → (B, G, M, D)."""
    return x[:, :, 0] if x.shape[2] == 1 else x.sum(axis=2)


# ---------------------------------------------------------------------- tiles and tasks
class _Plan:
    """How the work is cut: by the shapes alone, so that the numbers do not depend on the threads."""

    def __init__(self, q, k, mask, causal):
        self.batch, self.heads, self.length, _ = q.shape
        self.groups, self.keys = k.shape[1:3]
        self.causal = causal
        self.given, self.mask = mask, None
        if mask is not None:
            self.mask = self._checked(np.asarray(mask), q.dtype)
            self.hidden = ~self.mask if self.mask.dtype == bool else None
        self.queries = min(QUERIES, self.length)
        tile = self.heads // self.groups * self.queries * min(KEYS, self.keys)
        self.together = max(1, min(self.groups, TILE // max(tile, 1)))
        self.entries = max(1, TILE // max(tile * self.groups, 1))

    def _checked(self, mask, dtype):
        if mask.dtype != bool and mask.dtype.kind != "f":
            raise DTypeError(f"attention: mask is {mask.dtype}; expected bool, True where a key may be seen, or "
                             f"{dtype}, to be added to the scores")
        shape = self.batch, self.heads, self.length, self.keys
        try:
            np.broadcast_to(mask, shape)
        except ValueError:
            raise ShapeError(f"attention: mask {mask.shape} does not broadcast to {shape}") from None
        mask = mask if mask.dtype == bool else mask.astype(dtype, copy=False)
        return mask.reshape((1,) * (4 - mask.ndim) + mask.shape)

    def grouped(self, x):
        """(B, H, L, D) as (B, G, H/G, L, D), a view."""
        return x.reshape(self.batch, self.groups, -1, *x.shape[2:])

    def query_blocks(self):
        return [slice(i, min(i + self.queries, self.length)) for i in range(0, self.length, self.queries)]

    def key_blocks(self, rows):
        """Blocks of keys that some of these rows see."""
        end = min(self.keys, rows.stop + self.keys - self.length) if self.causal else self.keys
        return [slice(i, min(i + KEYS, end)) for i in range(0, end, KEYS)]

    def visible(self, rows, columns):
        """How many keys of the tile its first row sees, each later row one more; all without a causal mask."""
        if not self.causal:
            return columns.stop - columns.start
        return rows.start + self.keys - self.length + 1 - columns.start

    def group_tasks(self, one_by_one=False):
        if one_by_one:  # a mask that all share gets its gradient from one thread, in order
            return [[(slice(b, b + 1), slice(g, g + 1)) for b in range(self.batch) for g in range(self.groups)]]
        return [[(slice(b, b + self.entries), slice(g, g + self.together))]
                for b in range(0, self.batch, self.entries) for g in range(0, self.groups, self.together)]

    def block_tasks(self):
        return [[(*task, rows) for task in tasks] for tasks in self.group_tasks() for rows in self.query_blocks()]

    def _of_mask(self, x, b, groups, rows, columns):
        """The part that belongs to a tile, as a view that broadcasts to it; x (1 or B, 1 or H, 1 or L, 1 or M)."""
        x = x[b] if len(x) > 1 else x
        x = x.reshape(len(x), self.groups, -1, *x.shape[2:])[:, groups] if x.shape[1] > 1 else x[:, :, None]
        x = x[:, :, :, rows] if x.shape[3] > 1 else x
        return x[..., columns] if x.shape[4] > 1 else x

    def scores(self, queries, k, b, groups, rows, columns):
        scores = queries @ k[b, groups, None, columns].swapaxes(-1, -2)
        if self.mask is not None:
            if self.hidden is not None:
                np.copyto(scores, -np.inf, where=self._of_mask(self.hidden, b, groups, rows, columns))
            else:
                scores += self._of_mask(self.mask, b, groups, rows, columns)
        return scores

    def add_to_mask(self, to_mask, slope, b, groups, rows, columns):
        part = self._of_mask(to_mask, b, groups, rows, columns)  # a view
        axes = tuple(i for i in range(5) if part.shape[i] == 1 and slope.shape[i] > 1)
        part += slope.sum(axis=axes, keepdims=True)

    def like_mask(self, to_mask):
        return to_mask.reshape(np.shape(self.given))

    def run(self, function, tasks, width):
        """``function`` of every task; lists of tasks are shared among the threads, each with a BLAS of one."""
        work = self.batch * self.heads * self.length * self.keys * width
        helpers = min(threads.get_num_threads(), len(tasks)) - 1 if work >= PARALLEL_WORK else 0
        waiting = deque(tasks)
        if not helpers:
            return _work_off(function, waiting)
        with threads.one_blas_thread():
            threads.run([(_work_off, function, waiting)] * (helpers + 1))


def _work_off(function, waiting):
    while waiting:
        try:
            tasks = waiting.popleft()
        except IndexError:  # another thread was faster
            return
        for task in tasks:
            function(task)


# ---------------------------------------------------------------------- what it means
def _attention_reference(q, k, v, mask=None, causal=False, scale=None):
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    s = np.einsum("bhld,bhmd->bhlm", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    added = mask is not None and mask.dtype != bool
    s = s + mask if added else s
    allowed = np.ones(s.shape, bool) if mask is None or added else np.broadcast_to(mask, s.shape)
    if causal:
        length, keys = s.shape[-2:]
        allowed = allowed & (np.arange(keys)[None, :] <= np.arange(length)[:, None] + keys - length)
    e = np.where(allowed, np.exp(s), 0)
    total = e.sum(-1, keepdims=True)
    return np.einsum("bhlm,bhme->bhle", e / np.where(total == 0, 1, total), v)


def _attention_samples(rng):
    def draw(*shapes):
        return tuple(rng.standard_normal(shape) for shape in shapes)

    yield draw((2, 3, 4, 5), (2, 3, 6, 5), (2, 3, 6, 4)), {}
    yield draw((1, 4, 3, 2), (1, 2, 3, 2), (1, 2, 3, 2)), {"causal": True}
    mask = rng.random((2, 1, 1, 4)) < 0.6
    yield draw((2, 1, 3, 2), (2, 1, 4, 2), (2, 1, 4, 2)), {"mask": mask, "scale": 0.3}
    yield draw((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1)), {}
    yield draw((1, 2, 3, 2), (1, 1, 4, 2), (1, 1, 4, 2), (2, 1, 4)), {}  # an added mask has a gradient
    yield draw((2, 4, 3, 2), (2, 2, 4, 2), (2, 2, 4, 2), (2, 1, 3, 1)), {"causal": True}
    yield draw((1, 1, 3, 2), (1, 1, 2, 2), (1, 1, 2, 2)), {"causal": True}  # the first row may see nothing


attention = primitive("attention", _attention_forward, _attention_vjp, reference=_attention_reference,
                      samples=_attention_samples)
