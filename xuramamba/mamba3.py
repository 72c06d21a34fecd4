"""Mamba-3 (arXiv 2603.15569): trapezoidal state update, data-dependent rotation, no short convolution.

Parameters have the names and row orders of the published module, so its checkpoints load as they
are.  Two choices of a checkpoint are not written in its config: the activation of A (softplus in the
paper and the code until June 2026, ``heavy_tail`` since) and which coordinates rotate together
('pair' in the single-input kernels, 'half' in the multi-input ones).

The options ``rope``, ``trap``, ``bc_bias`` and ``bc_norm`` take away one part of the model each, as the
paper's ablations do; what a part needs of ``in_proj`` goes with it.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from xuracore import nn, ops
from xuracore.config import Config, require
from xuracore.errors import ShapeError
from xuracore.nn import Module, Parameter, init
from xuracore.ops.blocks import sequences
from xuracore.tensor import Tensor
from xuramamba import packed
from xuramamba.mamba1 import DepthwiseConv


TRAP_OF_EULER = 60.0  # its sigmoid is 1, to the last bit, in float32 and float64


class Mamba3State(NamedTuple):
    """What one layer remembers of a sequence, whatever its length."""

    theta: Tensor  # (B, H, S) accumulated rotation, modulo 2 pi
    h: Tensor  # (B, H, P, N)
    k: Tensor  # (B, R, H, N) the last token's key, already rotated
    v: Tensor  # (B, H, P) the last token's value


class Mamba3ConvState(NamedTuple):
    """The same, with the past of the optional short convolution."""

    theta: Tensor
    h: Tensor
    k: Tensor
    v: Tensor
    conv: Tensor  # (B, K - 1, d_inner + 2 R G N) its last inputs, oldest first


@dataclass(frozen=True)
class Mamba3Config(Config):
    """Sizes and options of one layer.

    rope : 'data_dependent' (the model's own), 'standard' (the same turn every token, theta**(-i/S) for
        pair i, whatever the step size; Su et al. 2021), or 'none'.
    trap : 'learned', or the weight of the new end fixed at 1/2 ('half') or at 1 ('euler', as in Mamba-2).
    bc_bias, bc_norm : whether keys and queries are normalised, and have a bias, which starts at
        ``bc_bias_init``.
    d_conv : width of a causal convolution with silu over [x | B | C], as in Mamba-2; 0 leaves it out.
    """

    d_model: int
    d_state: int = 128
    expand: int = 2
    headdim: int = 64
    ngroups: int = 1
    rope_fraction: float = 0.5
    is_mimo: bool = False
    mimo_rank: int = 4
    is_outproj_norm: bool = False
    a_activation: str = "heavy_tail"
    rotary: str = "pair"
    rope: str = "data_dependent"
    rope_theta: float = 1e4
    trap: str = "learned"
    bc_bias: bool = True
    bc_bias_init: float = 1.0  # not zero: the state then moves before keys have learned anything
    bc_norm: bool = True
    d_conv: int = 0
    dt_min: float = 1e-3
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    a_floor: float = 1e-4  # every head forgets at least this much per unit of time
    norm_eps: float = 1e-5

    def __post_init__(self):
        require(self.d_model > 0 and self.d_state > 0 and self.expand > 0, "sizes must be positive")
        require(
            self.headdim > 0 and self.d_inner % self.headdim == 0,
            f"headdim={self.headdim} must divide expand * d_model = {self.d_inner}",
        )
        require(
            self.ngroups > 0 and self.heads % self.ngroups == 0,
            f"ngroups={self.ngroups} must divide the {self.heads} heads",
        )
        require(0 <= self.rope_fraction <= 1, f"rope_fraction={self.rope_fraction}; expected 0 to 1")
        require(self.mimo_rank > 0, f"mimo_rank={self.mimo_rank}; expected at least 1")
        require(
            self.a_activation in ("heavy_tail", "softplus"),
            f"a_activation={self.a_activation!r}; expected 'heavy_tail' or 'softplus'",
        )
        require(self.rotary in ("pair", "half"), f"rotary={self.rotary!r}; expected 'pair' or 'half'")
        require(
            self.rope in ("data_dependent", "standard", "none"),
            f"rope={self.rope!r}; expected 'data_dependent', 'standard' or 'none'",
        )
        require(self.d_conv >= 0, f"d_conv={self.d_conv}; expected a width, or 0 for none")
        require(self.rope_theta > 0, f"rope_theta={self.rope_theta}; expected a positive number")
        require(
            self.trap in ("learned", "half", "euler"),
            f"trap={self.trap!r}; expected 'learned', 'half' or 'euler'",
        )
        require(
            self.rotary == "pair" or self.d_state % 2 == 0,
            f"rotary='half' needs an even d_state; got {self.d_state}",
        )

    @property
    def d_inner(self):
        return self.expand * self.d_model

    @property
    def heads(self):
        return self.d_inner // self.headdim

    @property
    def rank(self):
        return self.mimo_rank if self.is_mimo else 1

    @property
    def keys(self):
        """Numbers in the keys of one token."""
        return self.rank * self.ngroups * self.d_state

    @property
    def angles(self):
        """Rotated pairs: ``rope_fraction`` of the coordinates, made even, two to a pair."""
        return 0 if self.rope == "none" else int(self.d_state * self.rope_fraction) // 2


class Mamba3(Module):
    """``y, state = mixer(x, state=None, *, mask=None, cu_seqlens=None)``, x and y (B, L, d_model).

    state : what an earlier call returned; None starts afresh.  One token, many, or all at once:
        the numbers are the same.
    mask : (B, L), true for a real token.  Padding, wherever it stands, leaves the state alone and gives 0.
    cu_seqlens : (n + 1,) where packed sequences begin in the one row (B = 1), and its length; the states
        then have n rows.
    offset : (B, H, P, N), or a row for each packed sequence, that every token reads beside the state:
        y_t = C_t (h_t + offset), keys not turned (state-offset tuning, arXiv 2503.03499).

    >>> mixer = Mamba3(64, d_state=16, headdim=32, rng=np.random.default_rng(0))
    """

    def __init__(self, d_model, *, rng=None, **fields):
        config = Mamba3Config.from_dict({"d_model": d_model, **fields})
        rng = np.random.default_rng(0) if rng is None else rng
        heads, rank, size = config.heads, config.rank, config.d_state
        self.config = config
        self.in_proj = nn.Linear(d_model, sum(self._row_counts()), bias=False, rng=rng)
        self.dt_bias = Parameter(
            init.inverse_softplus_steps(heads, rng, config.dt_min, config.dt_max, config.dt_init_floor)
        )
        if config.d_conv:
            self.conv1d = DepthwiseConv(config.d_inner + 2 * config.keys, config.d_conv, True, rng=rng)
        if config.bc_bias:
            self.B_bias = Parameter(np.full((heads, rank, size), config.bc_bias_init, np.float32))
            self.C_bias = Parameter(np.full((heads, rank, size), config.bc_bias_init, np.float32))
        if config.bc_norm:
            self.B_norm = nn.RMSNorm(size, config.norm_eps)
            self.C_norm = nn.RMSNorm(size, config.norm_eps)
        self.D = Parameter(init.ones(heads))
        if config.is_mimo:
            shape = (heads, rank, config.headdim)
            self.mimo_x = Parameter(init.ones(shape) / np.float32(rank))
            self.mimo_z = Parameter(init.ones(shape))
            self.mimo_o = Parameter(init.ones(shape) / np.float32(rank))
        if config.is_outproj_norm:
            self.norm = nn.RMSNorm(config.d_inner, config.norm_eps)
        self.out_proj = nn.Linear(config.d_inner, d_model, bias=False, rng=rng)

    def _row_counts(self):
        c = self.config
        trap = c.heads if c.trap == "learned" else 0
        angles = c.angles if c.rope == "data_dependent" else 0
        return c.d_inner, c.d_inner, c.keys, c.keys, c.heads, c.heads, trap, angles

    def initial_state(self, batch):
        """The state before the first token: all zeros."""
        c, dtype = self.config, self.D.dtype
        shapes = (
            (batch, c.heads, c.angles),
            (batch, c.heads, c.headdim, c.d_state),
            (batch, c.rank, c.heads, c.d_state),
            (batch, c.heads, c.headdim),
        )
        parts = [Tensor(np.zeros(shape, dtype)) for shape in shapes]
        if not c.d_conv:
            return Mamba3State(*parts)
        return Mamba3ConvState(*parts, Tensor(np.zeros((batch, c.d_conv - 1, c.d_inner + 2 * c.keys), dtype)))

    def forward(self, x, state=None, *, mask=None, cu_seqlens=None, offset=None):
        c = self.config
        if x.ndim != 3 or x.shape[-1] != c.d_model:
            raise ShapeError(f"Mamba3: x has shape {x.shape}; expected (B, L, {c.d_model})")
        mixer = self if offset is None else partial(self, offset=offset)
        if mask is not None:
            return packed.without_padding(mixer, x, state, mask, cu_seqlens)
        if lengths := packed.pieces(x, cu_seqlens):
            return packed.piecewise(mixer, x, state, lengths)
        batch, length, _ = x.shape
        z, v, k, q, step, forget, trap, angles = ops.unpack_8(self.in_proj(x), sizes=self._row_counts())
        carried, conv = tuple(state or ())[:4], None
        if c.d_conv:
            u, conv = self._convolve(ops.concatenate(v, k, q, axis=-1), state, cu_seqlens)
            v, k, q = ops.unpack_3(u, sizes=(c.d_inner, c.keys, c.keys))
        keyed = (batch, length, c.rank, c.ngroups, c.d_state)
        k, q = k.reshape(*keyed), q.reshape(*keyed)
        if c.bc_norm:
            k, q = self.B_norm(k), self.C_norm(q)
        dt = ops.softplus(step + self.dt_bias)
        rate = ops.heavy_tail(forget) if c.a_activation == "heavy_tail" else ops.softplus(forget)
        a = -ops.maximum(rate, c.a_floor)
        y, *after = ops.trapezoidal_scan(
            q, k, v.reshape(batch, length, c.heads, c.headdim), dt, a,
            self._trap(trap, dt.shape), self._angles(angles), *self._biases(), self.D,
            self.mimo_x if c.is_mimo else None, *carried,
            rotary=c.rotary, radians=c.rope == "standard", cu_seqlens=cu_seqlens,
        )  # fmt: skip
        if offset is not None:
            y = y + self._read_offset(q, offset, cu_seqlens)
        after = Mamba3ConvState(*after, conv) if c.d_conv else Mamba3State(*after)
        return self.out_proj(self._gate(y, z)), after

    def _read_offset(self, q, offset, cu_seqlens):
        """q (B, L, R, G, N) and offset (B, H, P, N) → C_t offset, (B, L, R, H, P)."""
        c = self.config
        batch, length, rank, groups, size = q.shape
        q = q.reshape(batch, length, rank, groups, 1, size)
        q = q + self._biases()[0].transpose(1, 0, 2).reshape(rank, groups, c.heads // groups, size)
        q = q.reshape(batch, length, rank, c.heads, size)
        if cu_seqlens is None:
            return ops.einsum(q, offset, equation="blrhn,bhpn->blrhp")
        lengths = np.diff(cu_seqlens)
        rows = offset[np.repeat(np.arange(len(lengths)), lengths)]
        return ops.einsum(q[0], rows, equation="lrhn,lhpn->lrhp").reshape(1, length, rank, c.heads, c.headdim)

    def _convolve(self, u, state, cu_seqlens):
        before = None if state is None else state[4]
        if cu_seqlens is None:
            return self.conv1d(u, before)
        sequences(u.shape, cu_seqlens, "Mamba3")  # refuses what is not one
        return packed.convolve(self.conv1d, u, before, cu_seqlens, self.config.d_conv - 1)

    def _trap(self, trap, shape):
        if self.config.trap == "learned":
            return trap
        return np.full(shape, TRAP_OF_EULER if self.config.trap == "euler" else 0.0, trap.dtype)

    def _angles(self, angles):
        """What turns each pair: one row a token, or for 'standard' the same for all."""
        c = self.config
        if c.rope != "standard":
            return angles
        turns = c.rope_theta ** (-np.arange(c.angles) / max(1, c.angles))
        return np.broadcast_to(turns.astype(angles.dtype), (*angles.shape[:2], c.angles))

    def _biases(self):
        c = self.config
        if c.bc_bias:
            return self.C_bias, self.B_bias
        return (np.zeros((c.heads, c.rank, c.d_state), self.D.dtype),) * 2

    def _gate(self, y, z):
        """y (B, L, R, H, P) and z (B, L, Di) to (B, L, Di)."""
        c = self.config
        batch, length, rank = y.shape[:3]
        if not c.is_mimo:
            y = y.reshape(batch, length, c.d_inner)
            if c.is_outproj_norm:
                return ops.gated_rms_norm(
                    y, z, self.norm.weight, eps=c.norm_eps, group_size=c.headdim, norm_before_gate=True
                )
            return y * ops.silu(z)
        by_rank = (rank, c.heads * c.headdim)
        zeta = self.mimo_z.transpose(1, 0, 2).reshape(*by_rank)
        omega = self.mimo_o.transpose(1, 0, 2).reshape(*by_rank)
        y = y.reshape(batch, length, *by_rank)
        z = z.reshape(batch, length, 1, c.d_inner) * zeta
        if c.is_outproj_norm:
            y = ops.gated_rms_norm(
                y, z, self.norm.weight, eps=c.norm_eps, group_size=c.headdim, norm_before_gate=True
            )
        else:
            y = y * ops.silu(z)
        return (y * omega).sum(axis=2)
