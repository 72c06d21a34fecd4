"""What the scans share: where sequences begin, how many tokens lie between stored states, contiguous inputs."""

import numpy as np

from xuracore.autograd import is_grad_enabled
from xuracore.errors import ShapeError
from xuracore.ops import arrays

SCRATCH_BYTES = 1 << 18  # recomputed states of one block of tokens: a part of a core's L2 cache


def block_length(length, state_bytes):
    """Tokens between stored states, so that the recomputed ones stay in cache; without a tape, one state."""
    if not is_grad_enabled():
        return length
    return max(1, min(length, 64, max(8, SCRATCH_BYTES // max(1, state_bytes))))


def contiguous(x, shape, like, fill=0):
    """``x`` as a contiguous array of ``shape`` and of ``like``'s dtype; ``fill`` everywhere if None."""
    if x is None:
        return np.full(shape, fill, like.dtype)
    return arrays.contiguous(x, like.dtype)


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


class Spans:
    """The sequences of arrays (B, L, …) read as one row of B L tokens: whole rows, or parts of a packed one.

    edges : (count + 1,) int64, where each begins, and the end.
    """

    def __init__(self, shape, cu_seqlens, op):
        batch, length = shape[:2]
        if cu_seqlens is None:
            self.edges = np.arange(batch + 1) * length
        else:
            sequences(shape, cu_seqlens, op)  # refuses what is not one
            self.edges = np.asarray(cu_seqlens).astype(np.int64)
        self.count = len(self.edges) - 1

    @property
    def longest(self):
        """Tokens of the longest sequence, at least 1."""
        return max(1, int(np.diff(self.edges).max(initial=0)))
