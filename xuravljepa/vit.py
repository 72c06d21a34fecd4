"""The X-Encoder: one Vision Transformer for the families whose weights can be had.

patches → linear embedding → [CLS], registers, positions → pre-norm blocks → final norm.

    ViT (Dosovitskiy et al. 2021), timm's and Hugging Face's; I-JEPA (Assran et al. 2023): no [CLS];
    DINOv2 (Oquab et al. 2024; registers: Darcet et al. 2024): layer scale, gated MLPs;
    V-JEPA 2 (Assran et al. 2025): tubelets of several frames, rotary positions along three axes, no table.

Parameters have timm's names; ``xuravljepa.vit_names`` reads other people's.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xuracore import io, nn, no_grad, ops
from xuracore.config import Config, require, require_positive
from xuracore.errors import ConfigError, FormatError, ShapeError
from xuracore.nn import init
from xuravljepa import vit_files
from xuravljepa.vit_names import canonical_state, family_of, settings_of
from xuravljepa.vit_positions import INTERPOLATIONS, Rotary, bicubic_matrix, sine_positions

ACTIVATIONS = {
    "gelu": ops.gelu,
    "gelu_tanh": functools.partial(ops.gelu, approximate="tanh"),
    "relu": ops.relu,
    "silu": ops.silu,
}


@dataclass(frozen=True)
class VitConfig(Config):
    """Sizes and habits of a Vision Transformer.  Lengths in pixels or numbers of features."""

    image_size: int = 224
    patch_size: int = 16
    d_model: int = 768
    depth: int = 12
    n_heads: int = 12
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6  # timm; Hugging Face's ViT uses 1e-12
    qkv_bias: bool = True
    activation: str = "gelu"  # the exact one; others: see ACTIVATIONS
    class_token: bool = True
    class_position: bool = True  # whether the table of positions begins with a row for [CLS]
    registers: int = 0  # tokens after [CLS], without a position
    layer_scale: bool = False
    swiglu: bool = False  # MLPs are silu(gate) · up; fc1 holds the gates first
    qk_norm: bool = False
    interpolation: str = "hf"  # of the table, for other image sizes; see INTERPOLATIONS
    tubelet_size: int = 0  # frames of a token, with V-JEPA 2's rotary positions and no table; 0: pictures

    def __post_init__(self):
        require_positive(self, "image_size", "patch_size", "d_model", "depth", "n_heads")
        require(self.mlp_ratio > 0 and self.norm_eps > 0,
                f"mlp_ratio {self.mlp_ratio} and norm_eps {self.norm_eps} must be positive")
        require(self.activation in ACTIVATIONS,
                f"activation is {self.activation!r}; choose one of {', '.join(ACTIVATIONS)}")
        require(self.interpolation in INTERPOLATIONS,
                f"interpolation is {self.interpolation!r}; choose one of {', '.join(INTERPOLATIONS)}")
        require(self.image_size % self.patch_size == 0,
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        require(self.d_model % self.n_heads == 0,
                f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}")
        require(min(self.registers, self.tubelet_size) >= 0,
                f"registers {self.registers} and tubelet_size {self.tubelet_size} cannot be negative")
        require(self.class_token or not self.class_position, "class_position without class_token")
        require(not self.tubelet_size or not (self.class_token or self.registers),
                "a model of tubelets has neither [CLS] nor registers")
        require(not self.tubelet_size or self.d_model // self.n_heads >= 6 and self.d_model // self.n_heads % 2 == 0,
                f"rotary positions need an even width of the heads from 6; it is {self.d_model // self.n_heads}")

    @property
    def side(self):
        """Patches along one side of an image of ``image_size``."""
        return self.image_size // self.patch_size

    @property
    def n_patches(self):
        """Patches of an image of ``image_size``."""
        return self.side**2

    @property
    def n_prefix(self):
        """Tokens before those of the patches."""
        return self.class_token + self.registers

    @property
    def n_tokens(self):
        """Tokens of an image of ``image_size``."""
        return self.n_prefix + self.n_patches

    @property
    def hidden(self):
        """Width inside the MLPs."""
        return round(self.d_model * self.mlp_ratio)

    @property
    def parameter_count(self):
        """Parameters of a model of these sizes, by arithmetic."""
        d, h = self.d_model, self.hidden
        block = 4 * d * d + d + 3 * d * self.qkv_bias + 2 * d * h + h + d + 4 * d
        block += self.swiglu * (d * h + h) + 2 * d * self.layer_scale + 4 * (d // self.n_heads) * self.qk_norm
        table = 0 if self.tubelet_size else (self.class_position + self.n_patches) * d
        patch = d * (3 * self.patch_size**2 * max(self.tubelet_size, 1) + 1)
        return self.n_prefix * d + table + patch + self.depth * block + 2 * d

    @classmethod
    def tiny(cls):
        """For 64-pixel scenes: 64 patches of 8 × 8."""
        return cls(image_size=64, patch_size=8, d_model=96, depth=6, n_heads=4)

    @classmethod
    def small(cls):
        """ViT-S/16 (22 M parameters)."""
        return cls(d_model=384, n_heads=6)

    @classmethod
    def large(cls):
        """ViT-L/16 (303 M parameters)."""
        return cls(d_model=1024, depth=24, n_heads=16)


class Attention(nn.Module):
    """Multi-head self-attention; ``qkv`` rows are queries, keys, values."""

    def __init__(self, config, *, rng):
        dim = config.d_model
        self.n_heads = config.n_heads
        self.qkv = nn.Linear(dim, 3 * dim, config.qkv_bias, rng=rng)
        width = dim // config.n_heads
        self.q_norm = nn.LayerNorm(width, config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.LayerNorm(width, config.norm_eps) if config.qk_norm else None
        self.proj = nn.Linear(dim, dim, rng=rng)

    def forward(self, x, turn=None):
        batch, length, dim = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.n_heads, dim // self.n_heads)
        q, k, v = (part for part in qkv.transpose(2, 0, 3, 1, 4))  # each (B, heads, L, width)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if turn is not None:
            q, k = turn(q), turn(k)
        y = ops.attention(q, k, v)
        return self.proj(y.transpose(0, 2, 1, 3).reshape(batch, length, dim))


class Mlp(nn.Module):
    """Linear, activation, linear; with ``swiglu`` the first gives gates and values (Shazeer 2020)."""

    def __init__(self, config, *, rng):
        self._activation = None if config.swiglu else ACTIVATIONS[config.activation]
        self.fc1 = nn.Linear(config.d_model, config.hidden * (1 + config.swiglu), rng=rng)
        self.fc2 = nn.Linear(config.hidden, config.d_model, rng=rng)

    def forward(self, x):
        x = self.fc1(x)
        if self._activation is not None:
            return self.fc2(self._activation(x))
        hidden = x.shape[-1] // 2
        return self.fc2(ops.silu(x[..., :hidden]) * x[..., hidden:])


class LayerScale(nn.Module):
    """x ∘ gamma (Touvron et al. 2021)."""

    def __init__(self, dim):
        self.gamma = nn.Parameter(init.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """x + ls1(attention(norm1 x)), then x + ls2(mlp(norm2 x))."""

    def __init__(self, config, *, rng):
        dim = config.d_model
        self.norm1 = nn.LayerNorm(dim, config.norm_eps)
        self.attn = Attention(config, rng=rng)
        self.ls1 = LayerScale(dim) if config.layer_scale else None
        self.norm2 = nn.LayerNorm(dim, config.norm_eps)
        self.mlp = Mlp(config, rng=rng)
        self.ls2 = LayerScale(dim) if config.layer_scale else None

    def forward(self, x, turn=None):
        y = self.attn(self.norm1(x), turn)
        x = x + (y if self.ls1 is None else self.ls1(y))
        y = self.mlp(self.norm2(x))
        return x + (y if self.ls2 is None else self.ls2(y))


class PatchEmbed(nn.Module):
    """Non-overlapping patches as one matrix product.

    ``proj`` has a convolution's weight: (D, 3, P, P), or (D, 3, T, P, P) of tubelets of T frames.
    """

    def __init__(self, config, *, rng):
        p, frames = config.patch_size, config.tubelet_size
        shape = (config.d_model, 3, *([frames] if frames else []), p, p)
        self.patch_size, self.frames = p, frames or 1
        self.proj = nn.Module()
        self.proj.weight = nn.Parameter(init.uniform(shape, rng, 1 / math.sqrt(math.prod(shape[1:]))))
        self.proj.bias = nn.Parameter(init.zeros(config.d_model))

    def forward(self, pixels):
        """pixels (B, F, 3, H, W) → (B, F/T · H/P · W/P, D), frame by frame, row by row."""
        batch, frames, channels, height, width = pixels.shape
        p, t = self.patch_size, self.frames
        depth, rows, columns = frames // t, height // p, width // p
        patches = pixels.reshape(batch, depth, t, channels, rows, p, columns, p).transpose(0, 1, 4, 6, 3, 2, 5, 7)
        flat = patches.reshape(batch, depth * rows * columns, channels * t * p * p)
        dim = self.proj.weight.shape[0]
        return ops.linear(flat, self.proj.weight.reshape(dim, -1), self.proj.bias)


class VisionTransformer(nn.Module):
    """pixels (B, 3, H, W) float32, normalised → tokens (B, prefix + n, d_model) after the final norm.

    H and W are multiples of the patch size.  Another size than ``config.image_size`` interpolates
    the learned positions as ``config.interpolation`` says.  The prefix is [CLS] and the registers, where
    the model has them.  Models of tubelets also take videos (B, F, 3, H, W); a picture, or a video shorter
    than a tubelet, is repeated to fill one.

    preprocessing : an image.Preprocessing, as the model was trained.   licence : of weights that say it, or None.
    family : what the weights were recognised as.
    """

    def __init__(self, config, *, rng=None):
        rng = np.random.default_rng(0) if rng is None else rng
        self.config = config
        self.preprocessing, self.licence, self.family = vit_files.usual(config.image_size), None, "xura"
        dim = config.d_model
        self.cls_token = nn.Parameter(init.truncated_normal((1, 1, dim), rng)) if config.class_token else None
        self.pos_embed = None
        if not config.tubelet_size:
            self.pos_embed = nn.Parameter(sine_positions(config.side, dim)[:, 1 - config.class_position :])
        self.reg_token = None
        if config.registers:
            self.reg_token = nn.Parameter(init.truncated_normal((1, config.registers, dim), rng))
        self.patch_embed = PatchEmbed(config, rng=rng)
        self.blocks = nn.ModuleList(Block(config, rng=rng) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, config.norm_eps)
        for depth, block in enumerate(self.blocks, 1):  # branches start small, as in the JEPA repositories
            block.attn.proj.weight.data /= math.sqrt(2 * depth)
            block.mlp.fc2.weight.data /= math.sqrt(2 * depth)

    def forward(self, pixels):
        x = self.patch_embed(self._frames(pixels))
        turn = None
        if self.config.tubelet_size:
            turn = Rotary(np.arange(x.shape[1]), self.config.side, self.config.d_model // self.config.n_heads, x.dtype)
        else:
            p = self.config.patch_size
            x = self._with_prefix(x, self._positions(pixels.shape[2] // p, pixels.shape[3] // p))
        for block in self.blocks:
            x = block(x, turn)
        return self.norm(x)

    def _frames(self, pixels):
        """(B, F, 3, H, W) with whole tubelets, or ShapeError."""
        p, tubelet = self.config.patch_size, self.config.tubelet_size
        video = tubelet and pixels.ndim == 5
        if pixels.ndim != (5 if video else 4) or pixels.shape[-3] != 3:
            expected = "(batch, 3, height, width)" + " or (batch, frames, 3, height, width)" * bool(tubelet)
            raise ShapeError(f"pixels have shape {pixels.shape}; expected {expected}")
        height, width = pixels.shape[-2:]
        if height % p or width % p or not height or not width:
            raise ShapeError(f"image of {height} × {width} pixels; both must be positive multiples of {p}")
        if not video:
            pixels = pixels.reshape(pixels.shape[0], 1, *pixels.shape[1:])
        frames = pixels.shape[1]
        if 0 < frames < tubelet:
            pixels = ops.concatenate(*[pixels] * tubelet, axis=1)
        elif not frames or tubelet and frames % tubelet:
            raise ShapeError(f"video of {frames} frames; expected a multiple of {max(tubelet, 1)}")
        return pixels

    def _with_prefix(self, x, positions):
        """Patch tokens (B, n, d) and the table for them → [CLS], registers and patches, positions added."""
        def repeated(token):
            return ops.broadcast_to(token, shape=(x.shape[0], *token.shape[1:]))

        if self.config.class_position:
            x = ops.concatenate(repeated(self.cls_token), x, axis=1) + positions
            if self.reg_token is None:
                return x
            return ops.concatenate(x[:, :1], repeated(self.reg_token), x[:, 1:], axis=1)
        prefix = [repeated(token) for token in (self.cls_token, self.reg_token) if token is not None]
        x = x + positions
        return ops.concatenate(*prefix, x, axis=1) if prefix else x

    def _positions(self, rows, columns):
        side, first = self.config.side, int(self.config.class_position)
        if (rows, columns) == (side, side):
            return self.pos_embed
        how, dtype = self.config.interpolation, self.pos_embed.dtype
        grid = self.pos_embed[:, first:].reshape(side, side, -1)
        grid = ops.einsum(bicubic_matrix(side, rows, how).astype(dtype), grid, equation="ri,ijd->rjd")
        grid = ops.einsum(bicubic_matrix(side, columns, how).astype(dtype), grid, equation="cj,rjd->rcd")
        grid = grid.reshape(1, rows * columns, -1)
        return ops.concatenate(self.pos_embed[:, :1], grid, axis=1) if first else grid

    @no_grad()
    def at_size(self, image_size):
        """The same model for pictures of ``image_size``: its table of positions interpolated once for all.

        ``config.n_tokens`` then counts what such pictures give.  Raises ConfigError for a size that is no
        multiple of the patch size, and for models of tubelets, whose angles belong to one size.
        """
        if image_size == self.config.image_size:
            return self
        if self.config.tubelet_size:
            raise ConfigError(f"this model's rotary positions are those of {self.config.image_size} pixels, "
                              f"not {image_size}")
        config = self.config.replace(image_size=image_size)
        state = {**self.state_dict(), "pos_embed": self._positions(config.side, config.side).data}
        with init.blank():
            model = type(self)(config)
        model.load_state_dict(state)
        model.preprocessing, model.licence, model.family = self.preprocessing, self.licence, self.family
        return model

    @classmethod
    def from_pretrained(cls, directory):
        """Read a folder with weights: ours, timm's, Hugging Face's ViT, DINOv2, I-JEPA or V-JEPA 2.

        directory : ``model.safetensors``, or its shards and index, of any float type; ``config.json``;
            and, where there is one, ``preprocessor_config.json`` and a model card with a licence.
        Raises FormatError for damaged files and for towers that are no such model (by name), ConfigError for
        settings that no ViT has, StateDictError, with lists, if names or shapes do not fit.
        """
        directory = Path(directory)
        settings = io.load_json(directory / "config.json") if (directory / "config.json").exists() else {}
        try:
            with io.open_safetensors(directory) as file:
                canonical = canonical_state(file, settings)
                family = family_of(file.keys(), canonical, settings)
            config = VitConfig.from_dict(settings_of(canonical, settings, family))
        except FormatError as error:
            if error.path is not None:
                raise
            raise FormatError(error.reason, directory, error.entry) from None
        stored = sum(array.size for array in canonical.values())
        if config.parameter_count > 2 * stored:  # before a hostile shape asks for all memory
            raise FormatError(f"the shapes are those of {config.parameter_count:,} parameters, "
                              f"but it holds {stored:,}", directory / "model.safetensors")
        with init.blank():
            model = cls(config)
        model.load_state_dict(canonical)
        model.family = family
        model.preprocessing = vit_files.read_preprocessing(directory, settings, family, config.image_size)
        model.licence = vit_files.read_licence(directory, settings)
        return model

    def save_pretrained(self, directory):
        """Write ``config.json``, ``model.safetensors`` and ``preprocessor_config.json`` for :meth:`from_pretrained`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        io.save_safetensors(directory / "model.safetensors", self.state_dict())
        licence = {} if self.licence is None else {"license": self.licence}
        io.save_json(directory / "config.json", {"model_type": "xura-vit", **self.config.to_dict(), **licence})
        io.save_json(directory / "preprocessor_config.json", vit_files.preprocessor_settings(self.preprocessing))
