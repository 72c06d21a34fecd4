"""The X-Encoder: a Vision Transformer (Dosovitskiy et al. 2021).

patches → linear embedding → [CLS] + learned positions → pre-norm blocks → final norm.

Parameters have timm's names.  Weights saved by timm or by Hugging Face's ViT (the files on the hub
and the names newer versions write) are recognised by their names; see ``canonical_state``.
"""

import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xuracore import io, nn, ops
from xuracore.config import Config, require, require_positive
from xuracore.errors import FormatError, ShapeError
from xuracore.nn import init

ACTIVATIONS = {
    "gelu": ops.gelu,
    "gelu_tanh": functools.partial(ops.gelu, approximate="tanh"),
    "relu": ops.relu,
    "silu": ops.silu,
}


@dataclass(frozen=True)
class VitConfig(Config):
    """Sizes of a Vision Transformer.  Lengths in pixels or numbers of features."""

    image_size: int = 224
    patch_size: int = 16
    d_model: int = 768
    depth: int = 12
    n_heads: int = 12
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6  # timm; Hugging Face's ViT uses 1e-12
    qkv_bias: bool = True
    activation: str = "gelu"  # the exact one; others: see ACTIVATIONS

    def __post_init__(self):
        require_positive(self, "image_size", "patch_size", "d_model", "depth", "n_heads")
        require(self.mlp_ratio > 0 and self.norm_eps > 0,
                f"mlp_ratio {self.mlp_ratio} and norm_eps {self.norm_eps} must be positive")
        require(self.activation in ACTIVATIONS,
                f"activation is {self.activation!r}; choose one of {', '.join(ACTIVATIONS)}")
        require(self.image_size % self.patch_size == 0,
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        require(self.d_model % self.n_heads == 0,
                f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}")

    @property
    def n_patches(self):
        """Patches of an image of ``image_size``."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def hidden(self):
        """Width inside the MLPs."""
        return round(self.d_model * self.mlp_ratio)

    @property
    def parameter_count(self):
        """Parameters of a model of these sizes, by arithmetic."""
        d, h = self.d_model, self.hidden
        block = 4 * d * d + d + 3 * d * self.qkv_bias + 2 * d * h + h + d + 4 * d
        return d + (1 + self.n_patches) * d + d * (3 * self.patch_size**2 + 1) + self.depth * block + 2 * d

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

    def __init__(self, dim, n_heads, qkv_bias, *, rng):
        self.n_heads = n_heads
        self.qkv = nn.Linear(dim, 3 * dim, qkv_bias, rng=rng)
        self.proj = nn.Linear(dim, dim, rng=rng)

    def forward(self, x):
        batch, length, dim = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.n_heads, dim // self.n_heads)
        q, k, v = (part for part in qkv.transpose(2, 0, 3, 1, 4))  # each (B, heads, L, width)
        y = ops.attention(q, k, v)
        return self.proj(y.transpose(0, 2, 1, 3).reshape(batch, length, dim))


class Mlp(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, dim, hidden, activation, *, rng):
        self._activation = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(dim, hidden, rng=rng)
        self.fc2 = nn.Linear(hidden, dim, rng=rng)

    def forward(self, x):
        return self.fc2(self._activation(self.fc1(x)))


class Block(nn.Module):
    """x + attention(norm1 x), then x + mlp(norm2 x)."""

    def __init__(self, config, *, rng):
        dim = config.d_model
        self.norm1 = nn.LayerNorm(dim, config.norm_eps)
        self.attn = Attention(dim, config.n_heads, config.qkv_bias, rng=rng)
        self.norm2 = nn.LayerNorm(dim, config.norm_eps)
        self.mlp = Mlp(dim, config.hidden, config.activation, rng=rng)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Non-overlapping patches as one matrix product; ``proj`` has a convolution's weight (D, 3, P, P)."""

    def __init__(self, patch_size, dim, *, rng):
        self.patch_size = patch_size
        self.proj = nn.Module()
        self.proj.weight = nn.Parameter(init.uniform((dim, 3, patch_size, patch_size), rng,
                                                     1 / math.sqrt(3 * patch_size**2)))
        self.proj.bias = nn.Parameter(init.zeros(dim))

    def forward(self, pixels):
        batch, channels, height, width = pixels.shape
        p = self.patch_size
        rows, columns = height // p, width // p
        patches = pixels.reshape(batch, channels, rows, p, columns, p).transpose(0, 2, 4, 1, 3, 5)
        flat = patches.reshape(batch, rows * columns, channels * p * p)
        dim = self.proj.weight.shape[0]
        return ops.linear(flat, self.proj.weight.reshape(dim, -1), self.proj.bias)


class VisionTransformer(nn.Module):
    """pixels (B, 3, H, W) float32, normalised → tokens (B, 1 + n, d_model) after the final norm.

    H and W are multiples of the patch size.  Another size than ``config.image_size`` interpolates
    the learned positions (bicubic, a = -0.75, as Hugging Face's ViT does).  Token 0 is [CLS].
    """

    def __init__(self, config, *, rng=None):
        rng = np.random.default_rng(0) if rng is None else rng
        self.config = config
        dim = config.d_model
        self.cls_token = nn.Parameter(init.truncated_normal((1, 1, dim), rng))
        self.pos_embed = nn.Parameter(sine_positions(config.image_size // config.patch_size, dim))
        self.patch_embed = PatchEmbed(config.patch_size, dim, rng=rng)
        self.blocks = nn.ModuleList(Block(config, rng=rng) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, config.norm_eps)
        for depth, block in enumerate(self.blocks, 1):  # branches start small, as in the JEPA repositories
            block.attn.proj.weight.data /= math.sqrt(2 * depth)
            block.mlp.fc2.weight.data /= math.sqrt(2 * depth)

    def forward(self, pixels):
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ShapeError(f"pixels have shape {pixels.shape}; expected (batch, 3, height, width)")
        p = self.config.patch_size
        height, width = pixels.shape[2:]
        if height % p or width % p or not height or not width:
            raise ShapeError(f"image of {height} × {width} pixels; both must be positive multiples of {p}")
        x = self.patch_embed(pixels)
        cls = ops.broadcast_to(self.cls_token, shape=(x.shape[0], 1, x.shape[2]))
        x = ops.concatenate(cls, x, axis=1) + self._positions(height // p, width // p)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def _positions(self, rows, columns):
        side = self.config.image_size // self.config.patch_size
        if (rows, columns) == (side, side):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(side, side, -1)
        grid = ops.einsum(bicubic_matrix(side, rows), grid, equation="ri,ijd->rjd")
        grid = ops.einsum(bicubic_matrix(side, columns), grid, equation="cj,rjd->rcd")
        return ops.concatenate(self.pos_embed[:, :1], grid.reshape(1, rows * columns, -1), axis=1)

    @classmethod
    def from_pretrained(cls, directory):
        """Read a folder with ``config.json`` and ``model.safetensors``, ours, timm's or Hugging Face's.

        Raises FormatError for damaged or foreign files, ConfigError for settings that no ViT has,
        StateDictError if names or shapes do not fit.
        """
        directory = Path(directory)
        state = io.load_safetensors(directory / "model.safetensors")
        settings = io.load_json(directory / "config.json") if (directory / "config.json").exists() else {}
        try:
            canonical = canonical_state(state)
            config = config_of(canonical, settings, any("layernorm_before" in name for name in state))
        except FormatError as error:
            raise FormatError(error.reason, directory, error.entry) from None
        stored = sum(array.size for array in canonical.values())
        if config.parameter_count > 2 * stored:  # before a hostile shape asks for all memory
            raise FormatError(f"the shapes are those of {config.parameter_count:,} parameters, "
                              f"but it holds {stored:,}", directory / "model.safetensors")
        model = cls(config)
        model.load_state_dict(canonical)
        return model

    def save_pretrained(self, directory):
        """Write ``config.json`` and ``model.safetensors``, readable by :meth:`from_pretrained`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        io.save_safetensors(directory / "model.safetensors", self.state_dict())
        io.save_json(directory / "config.json", {"model_type": "xura-vit", **self.config.to_dict()})


def sine_positions(side, dim):
    """(1, 1 + side², dim) float32: where the learned positions start.

    Sines and cosines of row and column (He et al. 2022, MAE): the product of two positions depends on
    their distance alone, so that attention can tell near from far before it has learned anything.
    """
    quarter = dim // 4
    frequency = 1 / 10000 ** (np.arange(quarter) / max(quarter, 1))
    place = np.arange(side)[:, None] * frequency
    wave = np.concatenate([np.sin(place), np.cos(place)], axis=1)  # (side, 2 · quarter)
    table = np.zeros((1 + side * side, dim), np.float32)
    table[1:, : 2 * quarter] = np.repeat(wave, side, axis=0)
    table[1:, 2 * quarter : 4 * quarter] = np.tile(wave, (side, 1))
    return table[None]


def bicubic_matrix(old, new):
    """(new, old) float32: resampling of ``old`` places to ``new``.

    Cubic convolution (Keys 1981) with a = -0.75, half-pixel centres, clamped borders, no antialias.
    """
    a = -0.75
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(centres).astype(int)
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        distance = np.abs(centres - (first + tap))
        near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
        far = a * distance**3 - 5 * a * distance**2 + 8 * a * distance - 4 * a
        weight = np.where(distance <= 1, near, np.where(distance < 2, far, 0))
        np.add.at(matrix, (np.arange(new), np.clip(first + tap, 0, old - 1)), weight)
    return matrix.astype(np.float32)


# ---------------------------------------------------------------------- names in other people's files
_PREFIX = re.compile(r"^(?:module\.|vit\.|backbone\.|visual\.trunk\.|vision_encoder\.|"
                     r"encoder\.(?=cls_token|pos_embed|patch_embed|blocks\.|norm\.))+")
_ALIASES = [
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(weight|bias)", r"patch_embed.proj.\1"),
    (r"(?:encoder\.layer|layers)\.(\d+)\.layernorm_before\.(weight|bias)", r"blocks.\1.norm1.\2"),
    (r"(?:encoder\.layer|layers)\.(\d+)\.layernorm_after\.(weight|bias)", r"blocks.\1.norm2.\2"),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)",
     r"blocks.\1.attn.\2.\3"),
    (r"layers\.(\d+)\.attention\.q_proj\.(weight|bias)", r"blocks.\1.attn.query.\2"),
    (r"layers\.(\d+)\.attention\.k_proj\.(weight|bias)", r"blocks.\1.attn.key.\2"),
    (r"layers\.(\d+)\.attention\.v_proj\.(weight|bias)", r"blocks.\1.attn.value.\2"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    (r"layers\.(\d+)\.attention\.o_proj\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.(weight|bias)", r"blocks.\1.mlp.fc1.\2"),
    (r"encoder\.layer\.(\d+)\.output\.dense\.(weight|bias)", r"blocks.\1.mlp.fc2.\2"),
    (r"layers\.(\d+)\.mlp\.(fc[12])\.(weight|bias)", r"blocks.\1.mlp.\2.\3"),
    (r"layernorm\.(weight|bias)", r"norm.\1"),
]
_IGNORED = re.compile(r"^(head|classifier|pooler|fc_norm)\.|mask_token$")
_FOREIGN = {  # the first that any name matches
    r"attn_pool\.|vision_model\.head\.": "a SigLIP tower",
    r"norm_pre\.|ln_pre\.|pre_layrnorm\.|visual\.conv1|^vision_model\.|^text_model\.": "a CLIP tower",
    r"weights_in|mlp\.w12|mlp\.w3": "a DINOv2 model with SwiGLU",
    r"rope|fc1_g|inner_attn_ln|attn\.q_bias|attn\.[qkv]_proj\.": "an EVA model",
    r"patch_embeddings\.proj\.": "a V-JEPA 2 model",
    r"layer_scale|\.ls[12]\.|register_tokens|reg_token": "a DINOv2 model (layer scale or registers)",
    r"attn\.[qk]_norm\.": "a model that normalises queries and keys",
    r"cls_pos_embed|dist_token|relative_position": "a DeiT, BEiT or similar model",
}


def canonical_state(state):
    """Rename a ViT's tensors to timm's names, joining separate q, k, v; heads and poolers are left out.

    state : {name: array} as read.  Raises FormatError naming the family if it is no plain ViT.
    """
    for pattern, family in _FOREIGN.items():
        for name in state:
            if re.search(pattern, name):
                raise FormatError(f"this is {family}, which is not a plain Vision Transformer", entry=name)
    renamed, parts = {}, {}
    for name, array in state.items():
        short = _PREFIX.sub("", name)
        if _IGNORED.search(short):
            continue
        for pattern, target in _ALIASES:
            match = re.fullmatch(pattern, short)
            if match:
                short = match.expand(target)
                break
        joined = re.fullmatch(r"(blocks\.\d+\.attn\.)(query|key|value)(\.weight|\.bias)", short)
        if joined:
            parts.setdefault(joined[1] + "qkv" + joined[3], {})[joined[2]] = array
        elif short in renamed:
            raise FormatError(f"there are two tensors for {short!r}", entry=name)
        else:
            renamed[short] = array
    for name, pieces in parts.items():
        if set(pieces) != {"query", "key", "value"}:
            raise FormatError(f"has only {sorted(pieces)} of query, key and value", entry=name)
        if len({piece.shape for piece in pieces.values()}) != 1 or name in renamed:
            raise FormatError("query, key and value differ in shape, or are there twice", entry=name)
        renamed[name] = np.concatenate([pieces["query"], pieces["key"], pieces["value"]])
    return renamed


# Published widths whose number of heads is known; what no tensor's shape shows.
_HEADS = {192: 3, 384: 6, 512: 8, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
_ACTIVATION_NAMES = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}


def config_of(state, settings, hugging_face=False):
    """VitConfig from the shapes; from ``config.json`` what no shape shows: heads, epsilon, activation.

    state : {timm's name: array}.   settings : ours, timm's or Hugging Face's, may be empty.
    hugging_face : whether the names were Hugging Face's, whose default epsilon is 1e-12.
    """
    if not isinstance(settings, dict):
        raise FormatError(f"config.json holds a {type(settings).__name__}, not an object")
    try:
        dim, _, patch, _ = state["patch_embed.proj.weight"].shape
        _, places, _ = state["pos_embed"].shape
        hidden, _ = state["blocks.0.mlp.fc1.weight"].shape
    except (KeyError, ValueError) as error:
        raise FormatError(f"these are not the tensors of a Vision Transformer: {error}") from None
    said = settings.get("model_args") or {}  # timm writes there what differs from the architecture's default
    said = {**settings, **said} if isinstance(said, dict) else settings

    def first(*names, default):
        return next((said[name] for name in names if name in said), default)

    heads = first("n_heads", "num_attention_heads", "num_heads", default=_HEADS.get(dim))
    if heads is None:
        raise FormatError(f"config.json names no number of heads (num_attention_heads) for {dim} features")
    activation = first("activation", "hidden_act", default="gelu")
    if isinstance(activation, str):
        activation = _ACTIVATION_NAMES.get(activation, activation)
    return VitConfig.from_dict({
        "image_size": math.isqrt(max(places - 1, 0)) * patch,
        "patch_size": patch,
        "d_model": dim,
        "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "n_heads": heads,
        "mlp_ratio": hidden / dim,
        "norm_eps": first("norm_eps", "layer_norm_eps", default=1e-12 if hugging_face else 1e-6),
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "activation": activation,
    })
