"""StateInjector: let the predictor know a tool's result without reading it word by word.

k is the Y-Encoder's embedding of the result.  How it is taken in is the injector's mode:

    state      once, into the states, before the question is read again (below)
    offset     at every token: y_t = C_t (h_t + h'), with a constant h' of k (arXiv 2503.03499)
    residual   at every token: W k is added to the stream after one layer (the earlier design)
    token      as one more token of the sequence, W k
    text       nothing is trained: the result is read as text, as the teacher does

In mode "state" each layer's S (heads, P, N) receives a write of the same form as a step of the recurrence:

    S' = a ∘ S + Σ_r g_r (X_r k) ⊗ Rot(θ)(B_r k),       a = 2σ(α + A k) per head

g, α and A start at zero: a is 1, and a new injector changes nothing at all.  Mamba-3 keys live in a frame that
turns with the cumulative angle θ: the written key is turned by the current θ, so that later reads see it as
written now.  θ itself and the previous token's key and value are left alone.  The change is limited to
``max_change`` times the size of the state (Frobenius norms).

The target is what reading would have done: S* after the tool's text, less S before it, both seen in the
frame of their own θ (``relative``).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from xuracore import nn, ops
from xuracore.config import Config, require, require_positive
from xuracore.errors import ConfigError, ShapeError
from xuracore.nn import init

MODES = ("state", "offset", "residual", "token", "text")


@dataclass(frozen=True)
class InjectorConfig(Config):
    """``mode``: as above; ``rank``: of a write into a state, or of an offset.

    width : numbers that k is brought down to before each layer makes its write of it, W_i N k; 0: all of k.
    Without it the writes of a large predictor are as large as the predictor.
    """

    mode: str = "state"
    knowledge_dim: int = 64
    rank: int = 4
    width: int = 0
    max_change: float = 4.0  # ‖S' - S‖ ≤ max_change · ‖S‖, a guard against blow-up, seldom reached
    residual_layer: int = 0

    def __post_init__(self):
        require(self.mode in MODES, f"mode is {self.mode!r}; choose one of {', '.join(MODES)}")
        require_positive(self, "knowledge_dim", "rank")
        require(self.width >= 0, f"width is {self.width}; expected 0, for all, or more")
        require(self.max_change > 0, f"max_change is {self.max_change}; expected more than 0")
        require(self.residual_layer >= 0, f"residual_layer is {self.residual_layer}; layers count from 0")


class LayerWrite(nn.Module):
    """The write into one layer's state."""

    def __init__(self, config, heads, headdim, d_state, *, rng):
        self._shape = config.rank, heads, headdim, d_state
        k = config.width or config.knowledge_dim
        bound = k**-0.5
        self.value = nn.Parameter(init.uniform((config.rank * heads * headdim, k), rng, bound * 2))
        self.key = nn.Parameter(init.uniform((config.rank * heads * d_state, k), rng, bound * 2))
        self.key_bias = nn.Parameter(init.normal((config.rank * heads * d_state,), rng, 0.5))
        self.gain = nn.Parameter(init.zeros((config.rank, heads)))
        if config.mode == "state":
            self.keep = nn.Parameter(init.zeros((heads, k)))
            self.keep_bias = nn.Parameter(init.zeros(heads))

    def forward(self, knowledge, h, theta):
        """knowledge (B, K), h (B, H, P, N), theta (B, H, S) → h' (B, H, P, N)."""
        batch, heads = knowledge.shape[0], self._shape[1]
        kept = ops.sigmoid(ops.linear(knowledge, self.keep, self.keep_bias)) * 2.0
        return h * kept.reshape(batch, heads, 1, 1) + self.write(knowledge, theta)

    def write(self, knowledge, theta=None):
        """What is added, (B, H, P, N); without theta its keys are not turned."""
        rank, heads, headdim, d_state = self._shape
        batch = knowledge.shape[0]
        x = ops.linear(knowledge, self.value).reshape(batch, rank, heads, headdim)
        b = ops.linear(knowledge, self.key, self.key_bias).reshape(batch, rank, heads, d_state)
        if theta is not None:
            b = turn(b, theta.reshape(theta.shape[0], 1, *theta.shape[1:]))
        x = x * self.gain.reshape(1, rank, heads, 1)
        return ops.einsum(x, b, equation="brhp,brhn->bhpn")


def turn(x, theta, sign=1.0):
    """Rotate the pairs (2i, 2i+1), i < S, of x (…, N) by sign · theta (…, S); the rest passes through.

    (a, b) becomes (a cos θ - b sin θ, a sin θ + b cos θ).  ShapeError where 2S > N.
    """
    angles = theta.shape[-1]
    if 2 * angles > x.shape[-1]:
        raise ShapeError(f"{angles} angles need {2 * angles} coordinates; there are {x.shape[-1]}")
    pairs = x[..., : 2 * angles].reshape(*x.shape[:-1], angles, 2)
    c, s = ops.cos(theta), ops.sin(theta) * sign
    first, second = pairs[..., 0], pairs[..., 1]
    turned = ops.stack(first * c - second * s, first * s + second * c, axis=-1)
    turned = turned.reshape(*turned.shape[:-2], 2 * angles)
    return ops.concatenate(turned, x[..., 2 * angles :], axis=-1) if 2 * angles < x.shape[-1] else turned


def relative(h, theta):
    """The state h (B, H, P, N) seen in the frame of its own angle theta (B, H, S)."""
    return turn(h, theta.reshape(theta.shape[0], theta.shape[1], 1, theta.shape[2]), -1.0)


class Injection(NamedTuple):
    """A result taken in: what the question is read again from.

    states : of the predictor.   bias : (B, d_model) or None.   offsets : one a layer, or None.
    change : (B,) ‖ΔS‖ / ‖S‖, or the same of what stands for the states in the mode.
    """

    states: list
    bias: object = None
    offsets: object = None
    change: object = 0.0

    def read(self, predictor, query, residual_layer=0):
        """The question's words (B, W, P) read from here → ``predictor.Reading``."""
        return predictor.read(query, self.states, self.bias, residual_layer, self.offsets)


class StateInjector(nn.Module):
    """The injector of a predictor of these sizes; see the module's text."""

    def __init__(self, config, predictor_config, *, rng=None):
        rng = np.random.default_rng(0) if rng is None else rng
        self.config = config
        p = predictor_config
        require(config.residual_layer < p.n_layers,
                f"residual_layer is {config.residual_layer}; the predictor has {p.n_layers} layers")
        require(config.mode not in ("state", "offset") or not p.bidirectional,
                "a bidirectional predictor has no states to write into; use mode 'text', 'token' or 'residual'")
        if config.mode in ("residual", "token"):
            self.projection = nn.Linear(config.knowledge_dim, p.d_model, rng=rng)
            if config.mode == "residual":
                self.projection.weight.data[:] = 0
        elif config.mode != "text":
            heads = p.expand * p.d_model // p.headdim
            if config.width:
                self.narrow = nn.Parameter(init.normal((config.width, config.knowledge_dim), rng, config.width**-0.5))
            self.writes = nn.ModuleList(
                LayerWrite(config, heads, p.headdim, p.d_state, rng=rng) for _ in range(p.n_layers))

    def forward(self, knowledge, states):
        """knowledge (B, K) → the states with the write in them.  ConfigError in the modes without one."""
        self._check("state", "writes into no state; use take_in")
        self._check_count(states)
        after, knowledge = [], self._narrowed(knowledge)
        for write, state in zip(self.writes, states):
            h = write(knowledge, state.h, state.theta)
            after.append(state._replace(h=_limited(state.h, h, self.config.max_change)))
        return after

    def _narrowed(self, knowledge):
        return ops.linear(knowledge, self.narrow) if self.config.width else knowledge

    def bias(self, knowledge):
        """knowledge (B, K) → what the residual mode adds to the stream, (B, d_model)."""
        self._check("residual", "has no bias; use take_in")
        return self.projection(knowledge)

    def take_in(self, predictor, texts, knowledge, states):
        """Take results in, in whatever mode → :class:`Injection`.

        texts : () → (B, W, P), called in the mode that reads them.   knowledge : (B, K), what they mean.
        """
        mode = self.config.mode
        if mode == "residual":
            bias = self.bias(knowledge)
            return Injection(states, bias=bias, change=_norms(bias) / np.sqrt(bias.shape[-1]))
        if mode == "offset":
            self._check_count(states)
            narrowed = self._narrowed(knowledge)
            offsets = [write.write(narrowed) for write in self.writes]
            total = sum(_squares(offset.data) for offset in offsets)
            size = sum(_squares(state.h.data) for state in states)
            return Injection(states, offsets=offsets, change=np.sqrt(total / np.maximum(size, 1e-24)))
        if mode == "state":
            after = self(knowledge, states)
        elif mode == "token":
            after = predictor.hear_token(self.projection(knowledge), states)
        else:
            after = predictor.hear(texts(), states)
        return Injection(after, change=state_change(states, after))

    def _check(self, mode, otherwise):
        if self.config.mode != mode:
            raise ConfigError(f"an injector in mode {self.config.mode!r} {otherwise}")

    def _check_count(self, states):
        if len(states) != len(self.writes):
            raise ShapeError(f"there are {len(states)} states for {len(self.writes)} layers")


def _limited(before, after, limit):
    """``after``, moved back towards ``before`` where the change is too large for the state's size.

    How far is a constant to the gradient.  A sample within the limit is returned as it is, bit by bit.
    """
    size = np.sqrt(_squares(before.data))
    grown = np.sqrt(_squares(after.data - before.data))
    factor = np.minimum(1, limit * size / np.maximum(grown, 1e-12))
    if (factor == 1).all():
        return after
    factor = factor.astype(before.dtype).reshape(-1, 1, 1, 1)
    return after * factor + before * (1 - factor)


def _norms(x):
    """(B,) lengths of x (B, d)."""
    return np.sqrt(_squares(x.data))


def _squares(h):
    """(B,) float64 sums of squares of h (B, …)."""
    return np.square(h, dtype=np.float64).reshape(len(h), -1).sum(axis=1)


def state_change(before, after):
    """(B,) ‖ΔS‖ / ‖S‖ over all layers: how much an injection changed."""
    changed = sum(_squares(a.h.data - b.h.data) for b, a in zip(before, after))
    changed = changed + sum(_squares(a.h.data) for a in after[len(before):])  # of a bidirectional predictor
    size = sum(_squares(b.h.data) for b in before)
    return np.sqrt(changed / np.maximum(size, 1e-24))


def injection_loss(states, injected, taught):
    """Mean over layers of ‖ΔŜ - ΔS*‖² / ‖ΔS*‖² in relative frames; 1 - that is the explained variance.

    states : before; injected : from the injector; taught : after reading the tool's text.  All lists of
    states; sums run over the batch; gradients flow into ``injected`` alone.
    """
    total = 0.0
    for before, given, target in zip(states, injected, taught, strict=True):
        aim = relative(target.h.data, target.theta.data)
        wanted = aim - relative(before.h.data, before.theta.data)
        difference = relative(given.h, given.theta) - aim
        size = float(np.square(wanted, dtype=np.float64).sum())
        total = total + (difference * difference).sum() / (size + 1e-12)
    return total / len(states)
