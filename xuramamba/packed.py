"""Packed sequences: several one behind the other in one row, padded batches brought to that form, long ones cut.

A padded batch is run as the packed row of its real tokens, so that padding costs nothing, wherever it
stands, and cannot be seen: left, right or between.
"""

import numpy as np

from xuracore import ops
from xuracore.autograd import is_grad_enabled
from xuracore.errors import ShapeError
from xuracore.tensor import Tensor


PIECE = 2048  # tokens of all rows that a mixer takes at once without a tape


def pieces(x, cu_seqlens=None):
    """Lengths to cut x (B, L, D) into, or None to leave it whole.

    Without a tape a long sequence is run piece by piece with the state carried on: arrays of tens of megabytes
    come fresh from the system at each op, and writing to new pages costs more than the arithmetic.
    """
    if cu_seqlens is not None or is_grad_enabled():
        return None
    step = max(64, PIECE // max(1, len(x)) // 64 * 64)
    length = x.shape[1]
    return None if length <= step else [min(step, length - start) for start in range(0, length, step)]


def piecewise(mixer, x, state, lengths):
    """``mixer(x, state)`` over consecutive pieces of x."""
    y, start = np.empty(x.shape, x.dtype), 0
    for length in lengths:
        part, state = mixer(x[:, start : start + length], state)
        y[:, start : start + length] = part.data
        start += length
    return Tensor(y), state


class Padding:
    """Which tokens of a batch are real: ``mask`` (B, L), true for a real one.

    edges : (B + 1,) where each row's tokens begin in the packed row, and its length.
    """

    def __init__(self, mask, shape):
        mask = np.asarray(mask)
        if mask.shape != tuple(shape) or mask.dtype.kind not in "biu":
            raise ShapeError(
                f"mask has shape {mask.shape} and type {mask.dtype}; expected booleans of shape {tuple(shape)}, "
                "true for a real token"
            )
        mask = mask.astype(bool)
        self.shape, self.is_none = mask.shape, bool(mask.all())
        self.edges = np.concatenate([[0], np.cumsum(mask.sum(axis=1))])
        flat = mask.reshape(-1)
        self._real = np.flatnonzero(flat)
        self._places = np.where(flat, np.cumsum(flat), 0)  # row 0 is what padding gets

    def pack(self, x):
        """(B, L, D) to the row of real tokens (1, T, D)."""
        return x.reshape(-1, x.shape[-1])[self._real].reshape(1, len(self._real), x.shape[-1])

    def unpack(self, y):
        """(1, T, D) to (B, L, D), zero at padding."""
        nothing = np.zeros((1, y.shape[-1]), y.dtype)
        rows = ops.concatenate(Tensor(nothing), y.reshape(-1, y.shape[-1]), axis=0)
        return rows[self._places].reshape(*self.shape, y.shape[-1])


def without_padding(mixer, x, state, mask, cu_seqlens=None):
    """``mixer(x, state)`` of a padded batch: the state passes padding unchanged, and y is 0 there.

    ``mixer`` is called once more, with ``cu_seqlens`` or, where nothing is padding, without.
    """
    if cu_seqlens is not None:
        raise ShapeError(f"{type(mixer).__name__}: give a mask or cu_seqlens, not both")
    padding = Padding(mask, x.shape[:2])
    if padding.is_none:
        return mixer(x, state)
    y, state = mixer(padding.pack(x), state, cu_seqlens=padding.edges)
    return padding.unpack(y), state


def convolve(conv, x, state, edges, past):
    """``conv`` over each sequence of a packed row: y (1, L, C), and the state (n, past, C) after each.

    conv : called as ``conv(x, None)``, a causal convolution that looks ``past`` tokens back.
    state : (n, past, C), the inputs before each sequence, or None for zeros.
    """
    edges = np.asarray(edges)
    count, length, channels = len(edges) - 1, x.shape[1], x.shape[2]
    if state is None:
        state = Tensor(np.zeros((count, past, channels), x.dtype))
    source = ops.concatenate(state.reshape(count * past, channels), x.reshape(length, channels), axis=0)
    lengths = np.diff(edges)
    starts = edges[:-1] + past * np.arange(count)  # of each sequence's past, with the pasts let in between
    tokens = np.arange(length) + past * np.repeat(np.arange(1, count + 1), lengths)
    order = np.empty(length + count * past, np.int64)
    order[(starts[:, None] + np.arange(past)).reshape(-1)] = np.arange(count * past)
    order[tokens] = count * past + np.arange(length)
    laid_out = source[order]
    y, _ = conv(laid_out.reshape(1, len(order), channels), None)
    last = (starts + lengths)[:, None] + np.arange(past)
    return (
        y.reshape(len(order), channels)[tokens].reshape(1, length, channels),
        laid_out[last.reshape(-1)].reshape(count, past, channels),
    )
