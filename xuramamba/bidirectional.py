"""Two mixers over one sequence, one of them backwards: each token sees both sides."""

from typing import NamedTuple

import numpy as np

from xuracore import nn, ops
from xuracore.config import require
from xuracore.errors import ConfigError, ShapeError
from xuracore.nn import Module
from xuracore.ops.blocks import sequences

COMBINE = ("add", "concat", "gate")


class BidirectionalState(NamedTuple):
    """The last states of both directions; the backward one has read the first token last."""

    forward: tuple
    backward: tuple


class Bidirectional(Module):
    """``y, state = mixer(x, mask=None, cu_seqlens=None)``, x and y (B, L, d_model).

    forward_mixer, backward_mixer : two mixers of one width, or the same one twice to share weights.
    combine : 'add' sums both outputs, 'concat' puts them side by side and projects to d_model, 'gate'
        weights them, ``g f + (1 - g) b`` with ``g = sigmoid(W [f, b] + bias)`` for each channel.

    Each sequence is reversed within its own tokens: padding stays where it is, and sequences of a
    packed row do not mix.  The layer reads a sequence whole, so it takes no state to go on from.

    >>> rng = np.random.default_rng(0)
    >>> mixer = Bidirectional(Mamba1(64, rng=rng), Mamba1(64, rng=rng), combine="gate", rng=rng)
    """

    def __init__(self, forward_mixer, backward_mixer, combine="add", *, rng=None):
        rng = np.random.default_rng(0) if rng is None else rng
        require(combine in COMBINE, f"combine={combine!r}; expected one of {', '.join(COMBINE)}")
        width, other = forward_mixer.config.d_model, backward_mixer.config.d_model
        require(width == other, f"the mixers have d_model {width} and {other}; expected one width")
        self.forward_mixer, self.backward_mixer, self._combine = forward_mixer, backward_mixer, combine
        if combine != "add":
            self.proj = nn.Linear(2 * width, width, rng=rng)

    def forward(self, x, state=None, *, mask=None, cu_seqlens=None):
        if state is not None:
            raise ConfigError("Bidirectional reads a sequence whole and cannot go on from a state; give none")
        order = _reversed_within(x, mask, cu_seqlens)
        options = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
        options |= {} if mask is None else {"mask": mask}
        ahead, last = self.forward_mixer(x, None, **options)
        back, first = self.backward_mixer(_reordered(x, order), None, **options)
        return self._joined(ahead, _reordered(back, order)), BidirectionalState(last, first)

    def _joined(self, ahead, back):
        if self._combine == "add":
            return ahead + back
        mixed = self.proj(ops.concatenate(ahead, back, axis=-1))
        if self._combine == "concat":
            return mixed
        gate = ops.sigmoid(mixed)
        return back + gate * (ahead - back)


def _reordered(x, order):
    return x.reshape(-1, x.shape[-1])[order].reshape(*x.shape)


def _reversed_within(x, mask, cu_seqlens):
    """(B L,) for each token, the one that takes its place when each sequence is reversed; its own inverse."""
    if x.ndim != 3:
        raise ShapeError(f"Bidirectional: x has shape {x.shape}; expected (B, L, d_model)")
    batch, length, _ = x.shape
    order = np.arange(batch * length)
    if mask is not None:
        real = np.asarray(mask).astype(bool)
        if real.shape != (batch, length):
            raise ShapeError(f"Bidirectional: mask has shape {real.shape}; expected {(batch, length)}")
        for row in range(batch):
            places = row * length + np.flatnonzero(real[row])
            order[places] = places[::-1]
        return order
    for row, start, stop in sequences(x.shape, cu_seqlens, "Bidirectional"):
        start, stop = row * length + start, row * length + stop
        order[start:stop] = order[start:stop][::-1]
    return order
