"""Sizes and options of the WaveCore model, its presets and tiers."""

import math
from dataclasses import dataclass

from xuracore.config import Config, require, require_positive
from xuracore.errors import ConfigError

CHOICES = {
    "obs_type": ("vector", "image"),
    "output_type": ("continuous", "discrete"),
    "core": ("gated", "seed"),
    "wave_mode": ("zoh", "euler"),
    "saturation": ("soft", "hard"),
    "cms_write": ("network", "tied", "none"),
}


@dataclass(frozen=True)
class CoreModelConfig(Config):
    """One WaveCore model.  Lists are kept as tuples, so that a configuration is hashable.

    cms_decays : the share that a level forgets in a step; a slower level has a smaller one.
    cms_write : "network" (gate, value and key of each level have weights), "tied" (the key is the query's
        direction, the value e seen through the read projection, the salience the reward: no weights), "none".
    use_object_slot : the encoder keeps room for object features, zero where none are given.
    saturation : of s, w and p at ± state_saturation_limit, "soft" (limit · tanh(x / limit)) or "hard" (clipped,
        so without gradient there).
    """

    d_s: int = 256  # fast state
    d_w: int = 256  # wave state, all modes together
    d_p: int = 128  # particle state
    d_e: int = 256  # encoded input
    d_k: int = 64  # keys and queries
    d_c: int = 256  # context read from memory
    num_levels: int = 3
    cms_sizes: tuple[int, ...] = (64, 128, 256)
    cms_dims: tuple[int, ...] = (128, 256, 512)
    cms_decays: tuple[float, ...] = (0.1, 0.05, 0.01)
    cms_write: str = "network"
    cms_write_threshold: float = 0.1  # a gate below it writes nothing
    cms_salience_threshold: float = 0.5  # θ and τ of the gate σ((salience - θ) / τ)
    cms_salience_temperature: float = 0.1
    cms_merge_similarity: float = 0.9  # a key as close as this to a stored one is written over it
    cms_usage_decay: float = 0.01
    cms_null_slot: bool = False  # let a read return less than the memory holds: a slot of zeros with logit 0
    learning_rate: float = 1e-3
    gradient_clip: float = 10.0
    use_layer_norm: bool = True
    state_saturation_limit: float = 10.0
    saturation: str = "soft"
    obs_type: str = "vector"
    image_channels: int = 3
    output_type: str = "continuous"
    core: str = "gated"
    particle_input: bool = False  # let the particle see the encoded input too, not the memory alone
    use_mamba_wave: bool = True
    wave_mode: str = "zoh"
    mamba_state_dim: int = 1
    mamba_dt_min: float = 1e-4
    mamba_dt_scale: float = 1.0
    use_object_slot: bool = False
    object_dim: int = 32
    value_head: bool = False
    world_model_head: bool = False

    def __post_init__(self):
        for name in ("cms_sizes", "cms_dims", "cms_decays"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        require_positive(self, "d_s", "d_w", "d_p", "d_e", "d_k", "d_c", "num_levels", "mamba_state_dim",
                         "image_channels", "object_dim")
        require(self.d_e % 4 == 0, f"d_e={self.d_e}; expected a multiple of 4, which action and reward share")
        for name in ("cms_sizes", "cms_dims", "cms_decays"):
            values = getattr(self, name)
            require(len(values) == self.num_levels,
                    f"{name} has {len(values)} entries; expected num_levels={self.num_levels}")
        sizes = (*self.cms_sizes, *self.cms_dims)
        require(all(type(x) is int and x > 0 for x in sizes), "cms_sizes and cms_dims; expected positive numbers")
        decays = self.cms_decays
        require(all(0 < d < 1 for d in decays), f"cms_decays={decays}; expected numbers strictly between 0 and 1")
        require(all(a > b for a, b in zip(decays, decays[1:])),
                f"cms_decays={decays}; expected a falling row: a faster level forgets a larger share a step "
                "(these are shares forgotten, not shares kept)")
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            require(value in allowed, f"{name}={value!r}; expected one of {', '.join(allowed)}")
        require(self.d_w % self.mamba_state_dim == 0,
                f"mamba_state_dim={self.mamba_state_dim} does not divide d_w={self.d_w}")
        require(self.cms_write != "tied" or self.d_c == self.d_e,
                f"cms_write='tied' stores e as context: d_c={self.d_c} and d_e={self.d_e} have to be equal")
        for name in ("learning_rate", "gradient_clip", "state_saturation_limit", "mamba_dt_min", "mamba_dt_scale",
                     "cms_salience_temperature"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)}; expected a positive number")
        for name in ("cms_write_threshold", "cms_usage_decay"):
            require(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)}; expected 0 ≤ {name} < 1")
        require(0 < self.cms_merge_similarity <= 1, f"cms_merge_similarity={self.cms_merge_similarity}; in (0, 1]")

    @property
    def half_lives(self):
        """Steps after which a level has forgotten half of what it holds: ln ½ / ln(1 - d)."""
        return tuple(math.log(0.5) / math.log1p(-d) for d in self.cms_decays)

    @classmethod
    def _sized(cls, widths, **fields):
        return cls(**{**dict(zip(("d_s", "d_w", "d_p", "d_e", "d_k", "d_c"), widths)), **fields})

    # ------------------------------------------------------------------ presets
    @classmethod
    def seed(cls, **changes):
        """The seed: 172,202 parameters with observations of 64 numbers and actions of 7."""
        return cls._sized((64, 64, 32, 64, 32, 64), **{
            "cms_sizes": (64, 128, 256), "cms_dims": (32, 64, 128), "cms_write": "tied", "use_object_slot": True,
            **changes})  # fmt: skip

    @classmethod
    def pi5_optimized(cls, **changes):
        """For a single-board computer."""
        return cls._sized((128, 128, 64, 128, 32, 128), **{
            "cms_sizes": (32, 64, 128), "cms_dims": (64, 128, 256), "cms_decays": (0.05, 0.03, 0.01),
            "gradient_clip": 5.0, "cms_write": "tied", **changes})  # fmt: skip

    @classmethod
    def development(cls, **changes):
        """Two levels, for quick trials."""
        return cls._sized((64, 64, 32, 64, 16, 64), **{
            "num_levels": 2, "cms_sizes": (16, 32), "cms_dims": (32, 64), "cms_decays": (0.1, 0.05),
            "cms_write": "tied", **changes})  # fmt: skip

    @classmethod
    def tpu_optimized(cls, **changes):
        """Four levels, for large machines."""
        return cls._sized((512, 512, 256, 512, 128, 512), **{
            "num_levels": 4, "cms_sizes": (128, 256, 512, 1024), "cms_dims": (256, 512, 768, 1024),
            "cms_decays": (0.1, 0.05, 0.01, 0.005), **changes})  # fmt: skip

    @classmethod
    def cloud_optimized(cls, **changes):
        """Another name of :meth:`tpu_optimized`."""
        return cls.tpu_optimized(**changes)

    @classmethod
    def tier(cls, version, **changes):
        """A scaling tier: "v2.0" (128 wide), "v3.0", "v4.2", "v5.0", "v6.0" (2048 wide)."""
        if version not in TIERS:
            raise ConfigError(f"tier {version!r}; expected one of {', '.join(TIERS)}")
        width, factor = TIERS[version]
        return cls._sized((width, width, width // 2, width, max(32, width // 4), width), **{
            "cms_sizes": tuple(factor * n for n in (32, 64, 128)),
            "cms_dims": tuple(factor * n for n in (64, 128, 256)), **changes})  # fmt: skip

    @classmethod
    def preset(cls, name, **changes):
        """The preset of a name, as commands take it; ConfigError for others."""
        named = {
            "seed": cls.seed, "pi5": cls.pi5_optimized, "pi5_optimized": cls.pi5_optimized,
            "development": cls.development, "tpu_optimized": cls.tpu_optimized, "cloud_optimized": cls.cloud_optimized,
            "seed_local_2050": cls.seed,
            "columnar_small": cls.development,
            "wave_only": lambda **c: cls.seed(**{"cms_write": "none", **c}),
            "hybrid": lambda **c: cls.pi5_optimized(**{"mamba_state_dim": 4, **c}),
        }  # fmt: skip
        if name in TIERS:
            return cls.tier(name, **changes)
        if name not in named:
            raise ConfigError(f"preset {name!r}; expected one of {', '.join((*named, *TIERS))}")
        return named[name](**changes)


TIERS = {"v2.0": (128, 1), "v3.0": (256, 2), "v4.2": (512, 4), "v5.0": (1024, 8), "v6.0": (2048, 16)}
