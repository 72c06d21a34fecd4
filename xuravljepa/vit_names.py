"""What other people call a Vision Transformer's tensors and settings.

A table of regular expressions turns every family's names into timm's; the names also tell the family.  Towers
that need another forward pass (CLIP, SigLIP, EVA, BEiT, DINOv3 …) are recognised and refused by name.
"""

import math
import re

import numpy as np

from xuracore.errors import FormatError

FAMILIES = {
    "xura": "saved by this package",
    "timm": "timm",
    "vit": "Hugging Face's ViT",
    "dinov2": "DINOv2, the original names",
    "dinov2-hf": "Hugging Face's DINOv2, with or without registers",
    "ijepa": "I-JEPA, the original or timm's names",
    "ijepa-hf": "Hugging Face's I-JEPA",
    "vjepa2": "V-JEPA 2",
}
_PREFIX = re.compile(r"^(?:module\.|vit\.|dinov2\.|dinov2_with_registers\.|ijepa\.|vjepa2\.|backbone\.|"
                     r"visual\.trunk\.|vision_encoder\.|"
                     r"encoder\.(?=cls_token|pos_embed|patch_embed\.|blocks\.|norm\.))+")
_LAYER = r"(?:encoder\.layer|layers)\.(\d+)\."
_ALIASES = [(re.compile(pattern), target) for pattern, target in (
    (r"embeddings\.cls_token", "cls_token"),
    (r"(?:embeddings\.)?register_tokens", "reg_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"(?:encoder\.)?embeddings\.patch_embeddings\.proj(?:ection)?\.(weight|bias)", r"patch_embed.proj.\1"),
    (_LAYER + r"(?:layernorm_before|norm1)\.(weight|bias)", r"blocks.\1.norm1.\2"),
    (_LAYER + r"(?:layernorm_after|norm2)\.(weight|bias)", r"blocks.\1.norm2.\2"),
    (_LAYER + r"attention\.(?:attention\.)?(query|key|value)\.(weight|bias)", r"blocks.\1.attn.\2.\3"),
    (_LAYER + r"attention\.q_proj\.(weight|bias)", r"blocks.\1.attn.query.\2"),
    (_LAYER + r"attention\.k_proj\.(weight|bias)", r"blocks.\1.attn.key.\2"),
    (_LAYER + r"attention\.v_proj\.(weight|bias)", r"blocks.\1.attn.value.\2"),
    (_LAYER + r"attention\.(?:output\.dense|o_proj|proj)\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    (_LAYER + r"layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (_LAYER + r"intermediate\.dense\.(weight|bias)", r"blocks.\1.mlp.fc1.\2"),
    (_LAYER + r"output\.dense\.(weight|bias)", r"blocks.\1.mlp.fc2.\2"),
    (_LAYER + r"mlp\.(fc[12])\.(weight|bias)", r"blocks.\1.mlp.\2.\3"),
    (_LAYER + r"mlp\.(gate|up)_proj\.(weight|bias)", r"blocks.\1.mlp.\2.\3"),
    (_LAYER + r"mlp\.weights_in\.(weight|bias)", r"blocks.\1.mlp.fc1.\2"),
    (_LAYER + r"mlp\.(?:weights_out|down_proj)\.(weight|bias)", r"blocks.\1.mlp.fc2.\2"),
    (r"blocks\.(\d+)\.mlp\.w12\.(weight|bias)", r"blocks.\1.mlp.fc1.\2"),
    (r"blocks\.(\d+)\.mlp\.w3\.(weight|bias)", r"blocks.\1.mlp.fc2.\2"),
    (r"(?:encoder\.)?layernorm\.(weight|bias)", r"norm.\1"),
)]
_PIECES = {"attn.qkv": ("query", "key", "value"), "mlp.fc1": ("gate", "up")}  # stacked, in this order
_WHOLE = {piece: whole for whole, pieces in _PIECES.items() for piece in pieces}
_PIECE = re.compile(r"(blocks\.\d+\.)(?:attn|mlp)\.(query|key|value|gate|up)(\.weight|\.bias)")
_IGNORED = re.compile(r"^(head|classifier|pooler|fc_norm|decoder|predictor)\.|mask_token$")
_FOREIGN = {  # the first that any name matches
    r"attn_pool\.|(?:^|\.)head\.probe$": "a SigLIP tower",
    r"norm_pre\.|ln_pre\.|pre_layrnorm\.|class_embedding$|visual\.conv1|^vision_model\.|^text_model\.|resblocks\.":
        "a CLIP tower",
    r"encoder\.layers\.\d+\.self_attn\.": "a CLIP or SigLIP tower",
    r"rope_embed|^(?:model\.)?layer\.\d+\.|patch_embeddings\.(?:weight|bias)$": "a DINOv3 model",
    r"rope|fc1_g|inner_attn_ln|\battn\.[qv]_bias|\battn\.[qkv]_proj\.": "an EVA model",
    r"cls_pos_embed|dist_token|distillation_token|relative_position|\.lambda_[12]$|\.gamma_[12]$":
        "a DeiT, BEiT or similar model",
}
_FOREIGN_SETTINGS = {r"siglip": "a SigLIP tower", r"clip": "a CLIP tower", r"^eva": "an EVA model",
                     r"^dinov3|_dinov3": "a DINOv3 model"}
# Published widths whose number of heads is known; what no tensor's shape shows.
_HEADS = {192: 3, 384: 6, 512: 8, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16}
_ACTIVATION_NAMES = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}


def canonical_state(source, settings=None):
    """{timm's name: array} of a ViT's tensors; heads, poolers and predictors are left out.

    source : {name: array}, or an open SafetensorsFile, of which only what is needed is read.
    settings : of ``config.json``.   Separate queries, keys and values are joined, gates and values too.
    Raises FormatError, naming the family, for towers that need another forward pass.
    """
    settings = settings if isinstance(settings, dict) else {}
    names = list(source.keys())
    _refuse_foreign(names, settings)
    read = source.read if hasattr(source, "read") else source.__getitem__
    whole, pieces = {}, {}
    for name in names:
        short = canonical_name(name)
        if short is None:
            continue
        piece = _PIECE.fullmatch(short)
        place, key = (whole, short) if piece is None else (
            pieces.setdefault(f"{piece[1]}{_WHOLE[piece[2]]}{piece[3]}", {}), piece[2])
        if key in place:
            raise FormatError(f"there are two tensors for {short!r}", entry=name)
        place[key] = name
    state = {short: read(name) for short, name in whole.items()}
    for short, found in pieces.items():
        wanted = next(order for order in _PIECES.values() if next(iter(found)) in order)
        if set(found) != set(wanted):
            raise FormatError(f"has only {sorted(found)} of {', '.join(wanted)}", entry=next(iter(found.values())))
        arrays = [read(found[piece]) for piece in wanted]
        if len({array.shape for array in arrays}) != 1 or short in state or not arrays[0].ndim:
            raise FormatError(f"{', '.join(wanted)} differ in shape, or are there twice", entry=found[wanted[0]])
        state[short] = np.concatenate(arrays)
    return state


def canonical_name(name):
    """timm's name for a tensor, as far as the table knows it; None for what belongs to no encoder."""
    short = _PREFIX.sub("", name)
    if _IGNORED.search(short):
        return None
    for pattern, target in _ALIASES:
        match = pattern.fullmatch(short)
        if match:
            return match.expand(target)
    return short


def _refuse_foreign(names, settings):
    def refuse(family, entry):
        raise FormatError(f"this is {family}, which needs another forward pass; what can be read: "
                          f"{', '.join(list(FAMILIES.values())[1:])}", entry=entry)

    for pattern, family in _FOREIGN.items():
        for name in names:
            if re.search(pattern, name):
                refuse(family, name)
    for key in ("model_type", "architecture"):
        for pattern, family in _FOREIGN_SETTINGS.items():
            if isinstance(settings.get(key), str) and re.search(pattern, settings[key]):
                refuse(family, settings[key])


def family_of(names, state, settings):
    """Which of FAMILIES a model is.  names : as in its file; state : as ``canonical_state`` gives it."""
    if not isinstance(settings, dict):
        raise FormatError(f"config.json holds a {type(settings).__name__}, not an object")
    names = list(names)
    if settings.get("model_type") == "xura-vit":
        return "xura"
    if state.get("patch_embed.proj.weight", np.empty(0)).ndim == 5:
        return "vjepa2"
    hugging_face = any("embeddings." in name for name in names)
    if "cls_token" not in state:
        return "ijepa-hf" if hugging_face else "ijepa"
    if hugging_face:
        return "dinov2-hf" if any("layer_scale1." in name for name in names) else "vit"
    original = any(name.endswith("register_tokens") for name in names) or (
        "blocks.0.ls1.gamma" in state and any(name.endswith("mask_token") for name in names))
    return "dinov2" if original else "timm"


def settings_of(state, settings, family):
    """A VitConfig's values: from the shapes, and from ``config.json`` what no shape shows.

    state : {timm's name: array}.   settings : ours, timm's or Hugging Face's, may be empty.
    Raises FormatError if shapes and settings are not those of a Vision Transformer.
    """
    try:
        dim, _, *tubelet, patch, _ = state["patch_embed.proj.weight"].shape
        places = 0 if tubelet else state["pos_embed"].shape[1]
        _, hidden = state["blocks.0.mlp.fc2.weight"].shape
        wide, _ = state["blocks.0.mlp.fc1.weight"].shape
        registers = state["reg_token"].shape[1] if "reg_token" in state else 0
        if not tubelet and state["pos_embed"].ndim != 3 or len(tubelet) > 1 or not patch or not dim:
            raise ValueError("pos_embed or patch_embed.proj.weight has another number of axes")
    except (KeyError, ValueError, IndexError) as error:
        raise FormatError(f"these are not the tensors of a Vision Transformer: {error}") from None
    said = settings.get("model_args") or {}  # timm writes there what differs from the architecture's default
    said = {**settings, **said} if isinstance(said, dict) else settings

    def first(*names, default):
        return next((said[name] for name in names if name in said), default)

    heads = first("n_heads", "num_attention_heads", "num_heads",
                  default=22 if tubelet and dim == 1408 else _HEADS.get(dim))
    if heads is None:
        raise FormatError(f"config.json names no number of heads (num_attention_heads) for {dim} features")
    activation = first("activation", "hidden_act", default="gelu")
    if isinstance(activation, str):
        activation = _ACTIVATION_NAMES.get(activation, activation)
    class_token = "cls_token" in state
    class_position = class_token and _has_class_row(places)
    antialiased = family == "timm" or registers and family in ("dinov2", "dinov2-hf")
    usual = "timm" if antialiased else "dinov2" if family == "dinov2" else "hf"
    return {
        "image_size": _image_size(said, patch, places - class_position, bool(tubelet)),
        "patch_size": patch,
        "d_model": dim,
        "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "n_heads": heads,
        "mlp_ratio": hidden / dim,
        "norm_eps": first("norm_eps", "layer_norm_eps", default=1e-12 if family in ("vit", "ijepa-hf") else 1e-6),
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "activation": activation,
        "class_token": class_token,
        "class_position": class_position,
        "registers": registers,
        "layer_scale": "blocks.0.ls1.gamma" in state,
        "swiglu": wide == 2 * hidden,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "interpolation": first("interpolation", default=usual) if family == "xura" else usual,
        "tubelet_size": tubelet[0] if tubelet else 0,
    }


def _has_class_row(places):
    """Whether a table of so many rows is a square and a row for [CLS], not a square alone."""
    return math.isqrt(places) ** 2 != places or places <= 1


def _image_size(said, patch, places, tubelets):
    if tubelets:
        size = said.get("crop_size", said.get("image_size"))
        if size is None:
            raise FormatError("config.json names no crop_size, and rotary positions need the size of the grid")
        return size
    side = math.isqrt(max(places, 0))
    if side * side != places:
        raise FormatError(f"pos_embed has {places} places, which is no square of patches", entry="pos_embed")
    return side * patch
