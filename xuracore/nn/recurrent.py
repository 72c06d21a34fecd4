"""Recurrent layers of one direction, step by step on the tape: GRU and LSTM, with torch's names."""

import numpy as np

from xuracore import ops
from xuracore.errors import ShapeError
from xuracore.nn import init
from xuracore.nn.module import Module, Parameter
from xuracore.tensor import Tensor


class _Recurrent(Module):
    _gates = 0

    def __init__(self, input_size, hidden_size, bias=True, *, rng):
        self.hidden_size, rows, bound = hidden_size, self._gates * hidden_size, hidden_size**-0.5
        self.weight_ih_l0 = Parameter(init.uniform((rows, input_size), rng, bound))
        self.weight_hh_l0 = Parameter(init.uniform((rows, hidden_size), rng, bound))
        self.bias_ih_l0 = Parameter(init.uniform(rows, rng, bound)) if bias else None
        self.bias_hh_l0 = Parameter(init.uniform(rows, rng, bound)) if bias else None

    def _inputs(self, x):
        """What the input adds to the gates of each step: one product for all of them."""
        if len(x.shape) != 3 or x.shape[2] != self.weight_ih_l0.shape[1] or not x.shape[1]:
            raise ShapeError(f"{type(self).__name__}: x {tuple(x.shape)}; expected "
                             f"(B, L, {self.weight_ih_l0.shape[1]}) with L from 1")
        return ops.unstack(ops.linear(x, self.weight_ih_l0, self.bias_ih_l0), axis=1)

    def _zeros(self, x):
        return Tensor(np.zeros((len(x), self.hidden_size), self.weight_hh_l0.dtype))

    def extra_repr(self):
        return f"{self.weight_ih_l0.shape[1]} → {self.hidden_size}"


class LSTM(_Recurrent):
    """Long short-term memory (Hochreiter & Schmidhuber 1997; Gers et al. 2000): (B, L, in) → (B, L, hidden).

    i, f, o = sigmoid(W x + U h + b),   g = tanh(W x + U h + b),   c = f c + i g,   h = o tanh(c)

    weight_ih_l0 (4 hidden, in), weight_hh_l0 (4 hidden, hidden), two biases; gates in the order i, f, g, o.
    """

    _gates = 4

    def forward(self, x, state=None):
        """x (B, L, in), state (h, c) of (B, hidden) each or None for zeros → (y (B, L, hidden), (h, c))."""
        steps = self._inputs(x)
        h, c = (self._zeros(x), self._zeros(x)) if state is None else state
        outputs = []
        for step in steps:
            i, f, g, o = ops.chunk(step + ops.linear(h, self.weight_hh_l0, self.bias_hh_l0), 4)
            c = ops.sigmoid(f) * c + ops.sigmoid(i) * ops.tanh(g)
            h = ops.sigmoid(o) * ops.tanh(c)
            outputs.append(h)
        return ops.stack(*outputs, axis=1), (h, c)


class GRU(_Recurrent):
    """Gated recurrent unit (Cho et al. 2014): (B, L, in) → (B, L, hidden).

    r, z = sigmoid(W x + U h + b),   n = tanh(Wₙ x + b + r (Uₙ h + b')),   h = (1 - z) n + z h

    weight_ih_l0 (3 hidden, in), weight_hh_l0 (3 hidden, hidden), two biases; gates in the order r, z, n.
    """

    _gates = 3

    def forward(self, x, state=None):
        """x (B, L, in), state h (B, hidden) or None for zeros → (y (B, L, hidden), h)."""
        steps = self._inputs(x)
        h = self._zeros(x) if state is None else state
        outputs = []
        for step in steps:
            r, z, n = ops.chunk(step, 3)
            to_r, to_z, to_n = ops.chunk(ops.linear(h, self.weight_hh_l0, self.bias_hh_l0), 3)
            z = ops.sigmoid(z + to_z)
            n = ops.tanh(n + ops.sigmoid(r + to_r) * to_n)
            h = n + z * (h - n)
            outputs.append(h)
        return ops.stack(*outputs, axis=1), h
