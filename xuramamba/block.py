"""Residual blocks, and a stack of them with its states."""

from dataclasses import dataclass, field

from xuracore import nn, ops
from xuracore.config import Config, require
from xuracore.nn import Module, init
from xuramamba.mamba1 import Mamba1, Mamba1Config
from xuramamba.mamba2 import Mamba2, Mamba2Config
from xuramamba.mamba3 import Mamba3, Mamba3Config
from xuramamba.s4 import S4, S4Config
from xuramamba.s4d import S4D, S4DConfig

MIXERS = {"s4": S4, "s4d": S4D, "mamba1": Mamba1, "mamba2": Mamba2, "mamba3": Mamba3}
MIXER_CONFIGS = {
    "s4": S4Config, "s4d": S4DConfig, "mamba1": Mamba1Config, "mamba2": Mamba2Config, "mamba3": Mamba3Config,
}  # fmt: skip


class GatedMLP(Module):
    """fc2(y · silu(gate)) with (y, gate) = fc1(x).  x (…, d_model)."""

    def __init__(self, d_model, hidden, *, rng):
        self.fc1 = nn.Linear(d_model, 2 * hidden, bias=False, rng=rng)
        self.fc2 = nn.Linear(hidden, d_model, bias=False, rng=rng)

    def forward(self, x):
        both = self.fc1(x)
        hidden = both.shape[-1] // 2
        y, gate = ops.unpack_2(both, sizes=(hidden, hidden))
        return self.fc2(y * ops.silu(gate))


class Block(Module):
    """x + mixer(norm x), then, with an MLP, x + mlp(norm2 x).  Called like a mixer.

    The sum x is float32 like everything that is computed here, whatever width weights are stored at.
    """

    def __init__(self, d_model, mixer, mlp=None, norm_eps=1e-5, norm=nn.RMSNorm):
        self.norm = norm(d_model, norm_eps)
        self.mixer = mixer
        if mlp is not None:
            self.norm2, self.mlp = norm(d_model, norm_eps), mlp
        self._has_mlp = mlp is not None

    def forward(self, x, state=None, **options):
        y, state = self.mixer(self.norm(x), state, **options)
        x = x + y
        if self._has_mlp:
            x = x + self.mlp(self.norm2(x))
        return x, state


@dataclass(frozen=True)
class StackConfig(Config):
    """Sizes of a stack.

    mixer_fields go to the mixers as they are (d_state, headdim …).  With layer_types, one mixer's name
    a layer, they are given for each kind: ``{"mamba2": {"headdim": 32}, "mamba3": {}}``.
    """

    d_model: int
    n_layer: int
    mixer: str = "mamba3"
    mixer_fields: dict = field(default_factory=dict)
    d_intermediate: int = 0  # width of the MLP before rounding up; 0 leaves MLPs out
    mlp_multiple_of: int = 128
    norm_eps: float = 1e-5
    layer_types: tuple[str, ...] = ()
    rms_norm: bool = True  # else LayerNorm

    def __post_init__(self):
        require(self.d_model > 0 and self.n_layer > 0, "d_model and n_layer must be positive")
        require(
            self.d_intermediate >= 0 and self.mlp_multiple_of > 0,
            "d_intermediate must not be negative, mlp_multiple_of must be positive",
        )
        require(
            len(self.layer_types) in (0, self.n_layer),
            f"layer_types names {len(self.layer_types)} layers; n_layer is {self.n_layer}",
        )
        for name in (self.mixer, *self.layer_types):
            require(name in MIXERS, f"mixer={name!r}; expected one of {', '.join(MIXERS)}")
        if self.layer_types:
            for name, fields in self.mixer_fields.items():
                require(
                    name in self.layer_types and isinstance(fields, dict),
                    f"mixer_fields[{name!r}]: with layer_types, expected one object for each of "
                    f"{', '.join(sorted(set(self.layer_types)))}",
                )
        for i in range(self.n_layer) if self.layer_types else (0,):
            self.mixer_config(i)

    @property
    def mlp_width(self):
        return -(-self.d_intermediate // self.mlp_multiple_of) * self.mlp_multiple_of

    def mixer_of(self, layer):
        """Name and fields of the mixer of a layer."""
        if not self.layer_types:
            return self.mixer, self.mixer_fields
        name = self.layer_types[layer]
        return name, self.mixer_fields.get(name, {})

    def mixer_config(self, layer):
        """The checked configuration of the mixer of a layer."""
        name, fields = self.mixer_of(layer)
        return MIXER_CONFIGS[name].from_dict({"d_model": self.d_model, **fields})


class Stack(Module):
    """Blocks and a final norm: ``hidden, states = stack(x, states=None)``, x (B, L, d_model).

    states is a tuple with one mixer state a layer.  Keywords (a ``mask``, ``cu_seqlens``) are handed to
    each mixer.
    """

    def __init__(self, config, *, rng):
        self.config = config
        norm = nn.RMSNorm if config.rms_norm else nn.LayerNorm
        self.layers = nn.ModuleList()
        for i in range(config.n_layer):
            name, fields = config.mixer_of(i)
            mixer = MIXERS[name](config.d_model, rng=rng, **fields)
            mlp = GatedMLP(config.d_model, config.mlp_width, rng=rng) if config.mlp_width else None
            # The residual sum of many branches should start as large as one (GPT-2, section 2.3).  With
            # MLPs there are two branches a layer; the divisor is √n_layer all the same: the published
            # models are initialised twice, and the second time does not count the MLPs.
            for linear in filter(None, (getattr(mixer, "out_proj", None), mlp and mlp.fc2)):
                linear.weight.data = init.linear(linear.weight.shape, rng, config.n_layer**-0.5)
            self.layers.append(Block(config.d_model, mixer, mlp, config.norm_eps, norm))
        self.norm_f = norm(config.d_model, config.norm_eps)

    def initial_state(self, batch):
        """One zero state a layer."""
        return tuple(layer.mixer.initial_state(batch) for layer in self.layers)

    def forward(self, x, states=None, **options):
        after = []
        for i, layer in enumerate(self.layers):
            x, state = layer(x, None if states is None else states[i], **options)
            after.append(state)
        return self.norm_f(x), tuple(after)
