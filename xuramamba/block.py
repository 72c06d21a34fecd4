"""Residual blocks, and a stack of them with its states."""

from dataclasses import dataclass, field

import numpy as np

from xuracore import nn, ops
from xuracore.config import Config, require
from xuracore.nn import Module
from xuramamba.mamba1 import Mamba1
from xuramamba.mamba3 import Mamba3

MIXERS = {"mamba1": Mamba1, "mamba3": Mamba3}


class GatedMLP(Module):
    """fc2(y · silu(gate)) with (y, gate) = fc1(x).  x (…, d_model)."""

    def __init__(self, d_model, hidden, *, rng):
        self.fc1 = nn.Linear(d_model, 2 * hidden, bias=False, rng=rng)
        self.fc2 = nn.Linear(hidden, d_model, bias=False, rng=rng)

    def forward(self, x):
        hidden = self.fc2.weight.shape[1]
        y, gate = ops.unpack_2(self.fc1(x), sizes=(hidden, hidden))
        return self.fc2(y * ops.silu(gate))


class Block(Module):
    """x + mixer(norm x), then, with an MLP, x + mlp(norm2 x).  Called like a mixer."""

    def __init__(self, d_model, mixer, mlp=None, norm_eps=1e-5):
        self.norm = nn.RMSNorm(d_model, norm_eps)
        self.mixer = mixer
        if mlp is not None:
            self.norm2, self.mlp = nn.RMSNorm(d_model, norm_eps), mlp
        self._has_mlp = mlp is not None

    def forward(self, x, state=None, **options):
        y, state = self.mixer(self.norm(x), state, **options)
        x = x + y
        if self._has_mlp:
            x = x + self.mlp(self.norm2(x))
        return x, state


@dataclass(frozen=True)
class StackConfig(Config):
    """Sizes of a stack.  ``mixer_fields`` go to the mixer as they are (d_state, headdim …)."""

    d_model: int
    n_layer: int
    mixer: str = "mamba3"
    mixer_fields: dict = field(default_factory=dict)
    d_intermediate: int = 0  # width of the MLP before rounding up; 0 leaves MLPs out
    mlp_multiple_of: int = 128
    norm_eps: float = 1e-5

    def __post_init__(self):
        require(self.mixer in MIXERS, f"mixer={self.mixer!r}; expected one of {', '.join(MIXERS)}")
        require(self.d_model > 0 and self.n_layer > 0, "d_model and n_layer must be positive")
        require(
            self.d_intermediate >= 0 and self.mlp_multiple_of > 0,
            "d_intermediate must not be negative, mlp_multiple_of must be positive",
        )

    @property
    def mlp_width(self):
        return -(-self.d_intermediate // self.mlp_multiple_of) * self.mlp_multiple_of


class Stack(Module):
    """Blocks and a final norm: ``hidden, states = stack(x, states=None)``, x (B, L, d_model).

    states is a tuple with one mixer state a layer.  Keywords (a ``mask``) are handed to each mixer.
    """

    def __init__(self, config, *, rng):
        self.config = config
        self.layers = nn.ModuleList()
        branches = config.n_layer * (2 if config.mlp_width else 1)
        for _ in range(config.n_layer):
            mixer = MIXERS[config.mixer](config.d_model, rng=rng, **config.mixer_fields)
            mlp = GatedMLP(config.d_model, config.mlp_width, rng=rng) if config.mlp_width else None
            # The residual sum of many branches should start as large as one (GPT-2, section 2.3).
            for projection in [mixer.out_proj] + ([mlp.fc2] if mlp else []):
                projection.weight.data /= np.float32(branches**0.5)
            self.layers.append(Block(config.d_model, mixer, mlp, config.norm_eps))
        self.norm_f = nn.RMSNorm(config.d_model, config.norm_eps)

    def initial_state(self, batch):
        """One zero state a layer."""
        return tuple(layer.mixer.initial_state(batch) for layer in self.layers)

    def forward(self, x, states=None, **options):
        after = []
        for i, layer in enumerate(self.layers):
            x, state = layer(x, None if states is None else states[i], **options)
            after.append(state)
        return self.norm_f(x), tuple(after)
