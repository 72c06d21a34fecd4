"""Mamba-1 (arXiv 2312.00752): short causal convolution, then the selective scan, gated.

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


class Mamba1State(NamedTuple):
    """What one layer remembers of a sequence, whatever its length."""

    conv: Tensor  # (B, K - 1, d_inner) the last inputs of the convolution, oldest first
    ssm: Tensor  # (B, d_inner, N)


@dataclass(frozen=True)
class Mamba1Config(Config):
    """Sizes and options of one layer.

    dt_limit : step sizes are clipped to this range.
    mixer_rms_eps : with a number, dt (before dt_proj), B and C pass a norm without weights (FalconMamba).
    """

    d_model: int
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | str = "auto"  # width of the bottleneck that delta passes: d_model / 16, rounded up
    conv_bias: bool = True
    bias: bool = False
    dt_min: float = 1e-3
    dt_max: float = 0.1
    dt_scale: float = 1.0
    dt_init_floor: float = 1e-4
    dt_limit: tuple[float, float] = (0.0, math.inf)
    mixer_rms_eps: float | None = None

    def __post_init__(self):
        sizes = (self.d_model, self.d_state, self.d_conv, self.expand)
        require(min(sizes) > 0, f"d_model, d_state, d_conv, expand are {sizes}; expected positive numbers")
        require(
            self.dt_rank == "auto" or isinstance(self.dt_rank, int) and self.dt_rank > 0,
            f"dt_rank={self.dt_rank!r}; expected 'auto' or a positive number",
        )
        require(
            len(self.dt_limit) == 2 and 0 <= self.dt_limit[0] < self.dt_limit[1],
            f"dt_limit={self.dt_limit}; expected (low, high) with 0 ≤ low < high",
        )
        eps = self.mixer_rms_eps
        require(eps is None or eps >= 0, f"mixer_rms_eps={eps}; expected None, or a number not below 0")

    @property
    def d_inner(self):
        return self.expand * self.d_model

    @property
    def rank(self):
        return math.ceil(self.d_model / 16) if self.dt_rank == "auto" else self.dt_rank


class DepthwiseConv(Module):
    """Weights of a causal depthwise convolution: weight (C, 1, K), bias (C,) or None."""

    def __init__(self, channels, size, bias, *, rng):
        bound = 1 / math.sqrt(size)
        self.weight = Parameter(init.uniform((channels, 1, size), rng, bound))
        self.bias = Parameter(init.uniform((channels,), rng, bound)) if bias else None

    def forward(self, x, state=None):
        return ops.causal_conv1d(x, self.weight, self.bias, state, silu=True)


class Mamba1(Module):
    """``y, state = mixer(x, state=None, *, mask=None, cu_seqlens=None)``, x and y (B, L, d_model).

    state : what an earlier call returned; None starts afresh.  One token, many, or all at once:
        the numbers are the same.
    mask : (B, L), false for padding, which the state does not see and where y = 0.
    cu_seqlens : (n + 1,), with B = 1: sequence i is tokens cu_seqlens[i] … cu_seqlens[i + 1] of the
        row; each starts afresh, or from its row of a state with batch n.

    >>> mixer = Mamba1(64, d_state=16, rng=np.random.default_rng(0))
    """

    def __init__(self, d_model, *, rng=None, **fields):
        config = Mamba1Config.from_dict({"d_model": d_model, **fields})
        rng = np.random.default_rng(0) if rng is None else rng
        inner, size, rank = config.d_inner, config.d_state, config.rank
        self.config = config
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=config.bias, rng=rng)
        self.conv1d = DepthwiseConv(inner, config.d_conv, config.conv_bias, rng=rng)
        self.x_proj = nn.Linear(inner, rank + 2 * size, bias=False, rng=rng)
        self.dt_proj = nn.Linear(rank, inner, rng=rng)
        self.dt_proj.weight = Parameter(init.uniform((inner, rank), rng, config.dt_scale / math.sqrt(rank)))
        self.dt_proj.bias = Parameter(
            init.inverse_softplus_steps(inner, rng, config.dt_min, config.dt_max, config.dt_init_floor)
        )
        # A = -1, -2, … -N in every channel (S4D-Real): time scales from long to short.
        self.A_log = Parameter(np.log(np.tile(np.arange(1, size + 1, dtype=np.float32), (inner, 1))))
        self.D = Parameter(init.ones(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=config.bias, rng=rng)

    def initial_state(self, batch):
        """The state before the first token: all zeros."""
        c, dtype = self.config, self.D.dtype
        shapes = ((batch, c.d_conv - 1, c.d_inner), (batch, c.d_inner, c.d_state))
        return Mamba1State(*(Tensor(np.zeros(shape, dtype)) for shape in shapes))

    def forward(self, x, state=None, *, mask=None, cu_seqlens=None):
        c = self.config
        if x.ndim != 3 or x.shape[-1] != c.d_model:
            raise ShapeError(f"Mamba1: x has shape {x.shape}; expected (B, L, {c.d_model})")
        if mask is not None:
            return packed.without_padding(self, x, state, mask, cu_seqlens)
        conv, ssm = state or (None, None)
        u, z = ops.unpack_2(self.in_proj(x), sizes=(c.d_inner, c.d_inner))
        if cu_seqlens is None:
            u, conv = self.conv1d(u, conv)
        else:
            sequences(x.shape, cu_seqlens, "Mamba1")  # refuses what is not one
            u, conv = packed.convolve(self.conv1d, u, conv, cu_seqlens, c.d_conv - 1)
        low, b, mix = ops.unpack_3(self.x_proj(u), sizes=(c.rank, c.d_state, c.d_state))
        if c.mixer_rms_eps is not None:
            low, b, mix = (ops.rms_norm(part, eps=c.mixer_rms_eps) for part in (low, b, mix))
        delta = ops.linear(low, self.dt_proj.weight)
        y, ssm = ops.selective_scan(
            u, delta, -ops.exp(self.A_log), b, mix, self.D, z, self.dt_proj.bias, ssm,
            delta_softplus=True, dt_limit=c.dt_limit, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        return self.out_proj(y), Mamba1State(conv, ssm)
