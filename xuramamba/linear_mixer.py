"""What S4 and S4D share: the convolution or the scan, the skip, and the layer's output.

The layer computes ``y = output(activation(ssm(x) + D x))``, as the published S4 block: GELU, dropout and
a linear layer to twice the width, halved by a gate.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from xuracore import nn, ops
from xuracore.config import Config, require
from xuracore.errors import ShapeError
from xuracore.nn import Module
from xuracore.ops.blocks import sequences
from xuracore.tensor import Tensor
from xuramamba import packed

ACTIVATIONS = {"gelu": ops.gelu, "silu": ops.silu, "relu": ops.relu, None: lambda y: y}


@dataclass(frozen=True)
class LinearMixerConfig(Config):
    """Options of S4 and S4D alike.

    mode : 'recurrent' goes token by token; 'conv' convolves with the kernel by FFT, and adds what the
        state brings.  Both give the same numbers and the same state.  'auto' is 'recurrent': it yields
        output and state in one pass, and on a CPU that pass is no slower than the transforms.
    output : 'glu' ends with a linear layer to 2 d_model and a gate, 'linear' with one to d_model, None
        with the activation.   activation : 'gelu', 'silu', 'relu' or None.
    """

    d_model: int
    d_state: int = 64
    channels: int = 1  # outputs of the state space for each input feature
    dt_min: float = 1e-3
    dt_max: float = 0.1
    activation: str | None = "gelu"
    dropout: float = 0.0
    output: str | None = "glu"
    mode: str = "auto"

    def __post_init__(self):
        sizes = (self.d_model, self.d_state, self.channels)
        require(min(sizes) > 0, f"d_model, d_state, channels are {sizes}; expected positive numbers")
        require(self.d_state % 2 == 0, f"d_state={self.d_state}; expected an even number")
        require(0 < self.dt_min <= self.dt_max, f"dt_min={self.dt_min}, dt_max={self.dt_max}; expected 0 < min ≤ max")
        require(self.activation in ACTIVATIONS, f"activation={self.activation!r}; expected gelu, silu, relu or None")
        require(self.output in ("glu", "linear", None), f"output={self.output!r}; expected 'glu', 'linear' or None")
        require(
            self.output is not None or self.channels == 1,
            f"channels={self.channels} need an output layer; output is None",
        )
        require(
            self.mode in ("auto", "conv", "recurrent"),
            f"mode={self.mode!r}; expected 'auto', 'conv' or 'recurrent'",
        )


def log_uniform_steps(count, rng, low, high):
    """log dt, uniform between log low and log high, (count,) float32."""
    return rng.uniform(math.log(low), math.log(high), count).astype(np.float32)


class LinearMixer(Module):
    """The common part; a subclass gives its parameters by :meth:`system` and its kernel by :meth:`kernel`."""

    State: type[NamedTuple]

    def _build_output(self, rng):
        c = self.config
        self.dropout = nn.Dropout(c.dropout, rng=rng)
        if c.output is not None:
            width = 2 * c.d_model if c.output == "glu" else c.d_model
            self.output_linear = nn.Linear(c.channels * c.d_model, width, rng=rng)

    def system(self):
        """(log_dt, A_real, A_imag, B, C, P or None) as :mod:`xuracore.ops.linear_state` takes them."""
        raise NotImplementedError

    def kernel(self, length):
        """The convolution kernel (channels, d_model, length)."""
        raise NotImplementedError

    @property
    def discretization(self):
        """How continuous time becomes steps."""
        return self.config.discretization

    def initial_state(self, batch):
        """The state before the first token: all zeros."""
        c = self.config
        return self.State(Tensor(np.zeros((batch, c.d_model, c.d_state // 2, 2), self.D.dtype)))

    def _scan(self, x, state):
        return ops.linear_state_scan(x, *self.system(), state, discretization=self.discretization)

    def _response(self, x, state):
        if self.config.mode != "conv":
            return self._scan(x, state)
        y = ops.fft_conv(x, self.kernel(x.shape[1]))
        free, state = (None if state is None else self._scan(x * 0.0, state)[0]), self._scan(x, state)[1]
        return y if free is None else y + free, state

    def forward(self, x, state=None, *, mask=None, cu_seqlens=None):
        c, name = self.config, type(self).__name__
        if x.ndim != 3 or x.shape[-1] != c.d_model:
            raise ShapeError(f"{name}: x has shape {x.shape}; expected (B, L, {c.d_model})")
        if mask is not None:
            return packed.without_padding(self, x, state, mask, cu_seqlens)
        (h,) = state or (None,)
        if cu_seqlens is None:
            y, h = self._response(x, h)
        else:
            y, h = self._packed(x, h, sequences(x.shape, cu_seqlens, name))
        batch, length, _ = x.shape
        skip = self.D.reshape(c.channels, c.d_model)
        y = y + skip * x.reshape(batch, length, 1, c.d_model)
        y = self.dropout(ACTIVATIONS[c.activation](y)).reshape(batch, length, c.channels * c.d_model)
        if c.output is not None:
            y = self.output_linear(y)
        if c.output == "glu":
            y, gate = ops.unpack_2(y, sizes=(c.d_model, c.d_model))
            y = y * ops.sigmoid(gate)
        return y, self.State(h)

    def _packed(self, x, h, spans):
        """Each sequence by itself."""
        if h is None:
            (h,) = self.initial_state(len(spans))
        elif len(h) != len(spans):
            raise ShapeError(f"the state has {len(h)} rows; expected one for each of {len(spans)} sequences")
        outputs, states = [x[:, :0].reshape(1, 0, 1, x.shape[2]) * self.D.reshape(-1, x.shape[2])], []
        for i, (_, start, stop) in enumerate(spans):
            if stop == start:
                states.append(h[i : i + 1])
                continue
            y, after = self._response(x[:, start:stop], h[i : i + 1])
            outputs.append(y)
            states.append(after)
        return ops.concatenate(*outputs, axis=1), ops.concatenate(*states, axis=0)
