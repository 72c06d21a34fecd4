"""Mamba-2 (SSD, arXiv 2405.21060): short convolution over [x | B | C], scan with one decay a head, gated norm.

Parameters have the names and row orders of the published module, so its checkpoints load as they are.
"""

import math
from dataclasses import dataclass
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


class Mamba2State(NamedTuple):
    """What one layer remembers of a sequence, whatever its length."""

    conv: Tensor  # (B, K - 1, d_ssm + 2 G N) the last inputs of the convolution, oldest first
    ssm: Tensor  # (B, H, P, N)


@dataclass(frozen=True)
class Mamba2Config(Config):
    """Sizes and options of one layer.

    d_ssm : channels of the scan; those left of ``d_inner`` form a gated MLP beside it.
    rmsnorm : a norm with gate before out_proj, over groups of d_ssm / ngroups; else the gate alone.
    dt_limit : step sizes are clipped to this range.   chunk_size : tokens per product, at most.
    """

    d_model: int
    d_state: int = 128
    d_conv: int = 4
    expand: int = 2
    headdim: int = 64
    ngroups: int = 1
    chunk_size: int = 64
    d_ssm: int | None = None
    rmsnorm: bool = True
    norm_before_gate: bool = False
    norm_eps: float = 1e-5
    dt_limit: tuple[float, float] = (0.0, math.inf)
    D_has_hdim: bool = False
    bias: bool = False
    conv_bias: bool = True
    A_init_range: tuple[float, float] = (1.0, 16.0)
    dt_min: float = 1e-3
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4

    def __post_init__(self):
        sizes = (self.d_model, self.d_state, self.d_conv, self.expand, self.chunk_size)
        require(
            min(sizes) > 0,
            f"d_model, d_state, d_conv, expand, chunk_size are {sizes}; expected positive numbers",
        )
        require(
            0 < self.width <= self.d_inner,
            f"d_ssm={self.d_ssm}; expected 1 to expand * d_model = {self.d_inner}",
        )
        require(
            self.headdim > 0 and self.width % self.headdim == 0,
            f"headdim={self.headdim} must divide the {self.width} channels of the scan",
        )
        require(
            self.ngroups > 0 and self.heads % self.ngroups == 0,
            f"ngroups={self.ngroups} must divide the {self.heads} heads",
        )
        require(
            len(self.dt_limit) == 2 and 0 <= self.dt_limit[0] <= self.dt_limit[1],
            f"dt_limit={self.dt_limit}; expected (least, greatest)",
        )
        require(
            len(self.A_init_range) == 2 and 0 < self.A_init_range[0] <= self.A_init_range[1],
            f"A_init_range={self.A_init_range}; expected (least, greatest), positive",
        )

    @property
    def d_inner(self):
        return self.expand * self.d_model

    @property
    def width(self):
        """Channels of the scan."""
        return self.d_inner if self.d_ssm is None else self.d_ssm

    @property
    def heads(self):
        return self.width // self.headdim

    @property
    def d_mlp(self):
        return self.d_inner - self.width

    @property
    def channels(self):
        """Of the convolution: x, B and C."""
        return self.width + 2 * self.ngroups * self.d_state


class Mamba2(Module):
    """``y, state = mixer(x, state=None, *, mask=None, cu_seqlens=None)``, x and y (B, L, d_model).

    state : what an earlier call returned; None starts afresh.  One token, many, or all at once:
        the numbers are the same.
    mask : (B, L), true for a real token.  Padding, wherever it stands, leaves the state alone and gives 0.
    cu_seqlens : (n + 1,) where packed sequences begin in the one row (B = 1), and its length; the states
        then have n rows.

    >>> mixer = Mamba2(64, d_state=16, headdim=32, rng=np.random.default_rng(0))
    """

    def __init__(self, d_model, *, rng=None, **fields):
        config = Mamba2Config.from_dict({"d_model": d_model, **fields})
        rng = np.random.default_rng(0) if rng is None else rng
        heads = config.heads
        self.config = config
        rows = 2 * config.d_mlp + config.width + config.channels + heads
        self.in_proj = nn.Linear(d_model, rows, bias=config.bias, rng=rng)
        self.conv1d = DepthwiseConv(config.channels, config.d_conv, config.conv_bias, rng=rng)
        self.dt_bias = Parameter(
            init.inverse_softplus_steps(heads, rng, config.dt_min, config.dt_max, config.dt_init_floor)
        )
        self.A_log = Parameter(np.log(rng.uniform(*config.A_init_range, heads)).astype(np.float32))
        self.D = Parameter(init.ones((heads, config.headdim) if config.D_has_hdim else heads))
        if config.rmsnorm:
            self.norm = nn.RMSNorm(config.width, config.norm_eps)
        self.out_proj = nn.Linear(config.d_inner, d_model, bias=config.bias, rng=rng)

    def initial_state(self, batch):
        """The state before the first token: all zeros."""
        c, dtype = self.config, self.D.dtype
        shapes = ((batch, c.d_conv - 1, c.channels), (batch, c.heads, c.headdim, c.d_state))
        return Mamba2State(*(Tensor(np.zeros(shape, dtype)) for shape in shapes))

    def forward(self, x, state=None, *, mask=None, cu_seqlens=None):
        c = self.config
        if x.ndim != 3 or x.shape[-1] != c.d_model:
            raise ShapeError(f"Mamba2: x has shape {x.shape}; expected (B, L, {c.d_model})")
        if mask is not None:
            return packed.without_padding(self, x, state, mask, cu_seqlens)
        if lengths := packed.pieces(x, cu_seqlens):
            return packed.piecewise(self, x, state, lengths)
        batch, length, _ = x.shape
        projected, beside = self.in_proj(x), None
        if c.d_mlp:
            beside, projected = ops.unpack_2(
                projected, sizes=(2 * c.d_mlp, projected.shape[-1] - 2 * c.d_mlp)
            )
        z, u, dt = ops.unpack_3(projected, sizes=(c.width, c.channels, c.heads))
        conv, ssm = state or (None, None)
        if cu_seqlens is None:
            u, conv = self.conv1d(u, conv)
        else:
            sequences(x.shape, cu_seqlens, "Mamba2")  # refuses what is not one
            u, conv = packed.convolve(self.conv1d, u, conv, cu_seqlens, c.d_conv - 1)
        keys = c.ngroups * c.d_state
        u, b, mix = ops.unpack_3(u, sizes=(c.width, keys, keys))
        headed, grouped = (batch, length, c.heads, c.headdim), (batch, length, c.ngroups, c.d_state)
        y, ssm = ops.ssd_scan(
            u.reshape(*headed), dt, -ops.exp(self.A_log), b.reshape(*grouped), mix.reshape(*grouped), self.D,
            None if c.rmsnorm else z.reshape(*headed), self.dt_bias, ssm,
            dt_softplus=True, dt_limit=c.dt_limit, chunk=c.chunk_size, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        y = y.reshape(batch, length, c.width)
        if c.rmsnorm:
            y = ops.gated_rms_norm(
                y, z, self.norm.weight, eps=c.norm_eps,
                group_size=c.width // c.ngroups, norm_before_gate=c.norm_before_gate,
            )  # fmt: skip
        if c.d_mlp:
            gate, value = ops.unpack_2(beside, sizes=(c.d_mlp, c.d_mlp))
            y = ops.concatenate(ops.silu(gate) * value, y, axis=-1)
        return self.out_proj(y), Mamba2State(conv, ssm)
