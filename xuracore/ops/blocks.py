"""What the scans share: how many tokens lie between stored states, and contiguous inputs."""

import numpy as np

from xuracore.autograd import is_grad_enabled

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
    return np.ascontiguousarray(x, dtype=like.dtype)
