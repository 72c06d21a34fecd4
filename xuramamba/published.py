"""Configurations of published checkpoints, to and from :class:`LanguageModelConfig` fields.

Three layouts are known: Hugging Face's (``model_type`` mamba, mamba2, falcon_mamba), state-spaces'
(``ssm_cfg``; Mamba-1, 2 and 3) and Mistral's params.json for Codestral (``dim``, ``n_layers``).  Defaults
are those of the published classes: a key that a file leaves out means what its writer's class says.
"""

import math

from xuracore.config import require
from xuracore.errors import ConfigError

HUGGING_FACE = ("mamba", "mamba2", "falcon_mamba")
ARCHITECTURES = {
    "mamba": "MambaForCausalLM", "mamba2": "Mamba2ForCausalLM", "falcon_mamba": "FalconMambaForCausalLM",
}  # fmt: skip
# Keys of ssm_cfg that say how upstream computes or initialises, not what the layer is.
_NOT_SIZES = {
    "layer", "use_fast_path", "use_mem_eff_path", "layer_idx", "device", "dtype", "process_group",
    "sequence_parallel", "dt_init", "A_init_range", "conv_init", "chunk_size", "fuse_pregate_headwise_norm",
    "dt_scale", "dt_min", "dt_max", "dt_init_floor",
}  # fmt: skip
_RENAMED = {"A_floor": "a_floor"}


def plain_numbers(value):
    """``{"__float__": "Infinity"}``, as transformers 5 writes what JSON lacks, to the number meant."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "inf", "-inf"):
            return float(value["__float__"])
        return {key: plain_numbers(item) for key, item in value.items()}
    return [plain_numbers(item) for item in value] if isinstance(value, list) else value


def json_numbers(value):
    """The inverse of :func:`plain_numbers`: infinities as JSON objects."""
    if isinstance(value, float) and math.isinf(value):
        return {"__float__": "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, dict):
        return {key: json_numbers(item) for key, item in value.items()}
    return [json_numbers(item) for item in value] if isinstance(value, (list, tuple)) else value


def layout_of(config):
    """``"huggingface"``, ``"state-spaces"``, ``"mistral"`` or None for a configuration read from JSON."""
    if config.get("model_type") in HUGGING_FACE and "hidden_size" in config:
        return "huggingface"
    if "ssm_cfg" in config or {"d_model", "n_layer"} <= config.keys():
        return "state-spaces"
    return "mistral" if {"dim", "n_layers"} <= config.keys() else None


def language_model_fields(config, shapes):
    """Fields of a LanguageModelConfig for a published configuration.

    shapes : {our parameter name: shape} of the file, from which sizes that configurations are known to
        state wrongly are taken.
    Raises ConfigError for what is missing, out of range, or has no counterpart here.
    """
    layout = layout_of(config)
    if layout == "huggingface":
        fields = _from_hugging_face(config, shapes)
    elif layout == "mistral":
        fields = _from_mistral(config)
    elif layout == "state-spaces":
        fields = _from_state_spaces(config)
    else:
        raise ConfigError(
            f"model_type is {config.get('model_type')!r}; expected one of {', '.join(HUGGING_FACE)}, "
            "'xura_language_model', or a state-spaces configuration (ssm_cfg)"
        )
    if fields.get("tie_embeddings") is False and "lm_head.weight" not in shapes:
        fields["tie_embeddings"] = True  # several published files leave a tied head out and do not say so
    return fields


def _from_hugging_face(config, shapes):
    kind = config["model_type"]
    hidden, expand = _number(config, "hidden_size"), config.get("expand", 2)
    require(isinstance(expand, (int, float)), f"expand is {expand!r}; expected a number")
    activation = config.get("hidden_act", "silu")
    require(activation == "silu", f"hidden_act is {activation!r}; Mamba computes with 'silu' here")
    inner = shapes.get("backbone.layers.0.mixer.out_proj.weight", (0, expand * hidden))[-1]
    if inner % hidden == 0:
        expand = inner // hidden  # FalconMamba's published expand is not the one of its weights
    fields = {
        "d_state": config.get("state_size", 128 if kind == "mamba2" else 16),
        "d_conv": config.get("conv_kernel", 4),
        "expand": expand,
        "bias": config.get("use_bias", False),
        "conv_bias": config.get("use_conv_bias", True),
    }
    eps = config.get("layer_norm_epsilon", 1e-5)
    if kind == "mamba2":
        heads, width = config.get("num_heads", 128), config.get("head_dim", 64)
        require(
            heads * width == inner, f"num_heads {heads} × head_dim {width}, but expand × hidden_size is {inner}"
        )
        fields |= {"headdim": width, "ngroups": config.get("n_groups", 8)}
        limit = config.get("time_step_limit", (0.0, math.inf))
        fields |= {"dt_limit": tuple(map(float, limit)), "norm_eps": eps}
    else:
        fields["dt_rank"] = config.get("time_step_rank", "auto")
    if kind == "falcon_mamba":
        fields["mixer_rms_eps"] = config.get("mixer_rms_eps", 1e-6)
    ends = config.get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    vocabulary = _number(config, "vocab_size")
    return {
        "vocab_size": vocabulary,
        "d_model": hidden,
        "n_layer": _number(config, "num_hidden_layers"),
        "mixer": "mamba2" if kind == "mamba2" else "mamba1",
        "mixer_fields": fields,
        "norm_eps": eps,
        "tie_embeddings": config.get("tie_word_embeddings", kind != "mamba2"),
        "eos_token_ids": tuple(end for end in ends if 0 <= end < vocabulary),
    }


def _from_mistral(config):
    groups = {"ngroups": config["n_groups"]} if "n_groups" in config else {}
    renamed = {"d_model": config["dim"], "n_layer": config["n_layers"], "tie_embeddings": False,
               "ssm_cfg": {"layer": "Mamba2", **groups}}  # fmt: skip
    return _from_state_spaces({**config, **renamed})


def _from_state_spaces(config):
    require(not config.get("attn_layer_idx"), "attn_layer_idx names attention layers; there are none here")
    ssm = config.get("ssm_cfg", {})
    require(isinstance(ssm, dict), f"ssm_cfg is a {type(ssm).__name__}; expected an object")
    mixer = str(ssm.get("layer", "Mamba1")).lower()
    require(mixer in ("mamba1", "mamba2", "mamba3"), f"ssm_cfg.layer is {ssm.get('layer')!r}")
    fields = {_RENAMED.get(key, key): value for key, value in ssm.items() if key not in _NOT_SIZES}
    if mixer == "mamba3":
        fields.setdefault("rotary", "half" if fields.get("is_mimo") else "pair")
    return {
        "vocab_size": _number(config, "vocab_size"),
        "d_model": _number(config, "d_model"),
        "n_layer": _number(config, "n_layer"),
        "mixer": mixer,
        "mixer_fields": fields,
        "d_intermediate": config.get("d_intermediate", 0),
        "tie_embeddings": config.get("tie_embeddings", True),
        "pad_vocab_size_multiple": config.get("pad_vocab_size_multiple", 8),
        "rms_norm": config.get("rms_norm", True),
    }


def hugging_face_config(config):
    """What transformers' class reads, for a LanguageModelConfig; ConfigError if it has no class for it."""
    kind = config.layer_types[0] if len(set(config.layer_types)) == 1 else config.mixer
    require(len(set(config.layer_types)) <= 1, "transformers has no class for mixed layers")
    require(kind in ("mamba1", "mamba2"), f"transformers has no class for {kind}")
    require(not config.d_intermediate, f"transformers' {kind} has no MLP; d_intermediate must be 0")
    require(config.rms_norm, f"transformers' {kind} normalises by RMSNorm alone")
    mixer = config.stack.mixer_config(0)
    mismatched = _no_counterpart(mixer, config, kind)
    require(not mismatched, f"transformers' {kind} has no counterpart of {', '.join(mismatched)}")
    falcon = kind == "mamba1" and getattr(mixer, "mixer_rms_eps", None) is not None
    name = "falcon_mamba" if falcon else "mamba" if kind == "mamba1" else "mamba2"
    ends = config.eos_token_ids
    result = {
        "architectures": [ARCHITECTURES[name]],
        "model_type": name,
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layer,
        "state_size": mixer.d_state,
        "conv_kernel": mixer.d_conv,
        "expand": mixer.expand,
        "intermediate_size": mixer.d_inner,
        "use_bias": mixer.bias,
        "use_conv_bias": mixer.conv_bias,
        "layer_norm_epsilon": config.norm_eps,
        "hidden_act": "silu",
        "residual_in_fp32": True,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,
        "pad_token_id": None,
        "eos_token_id": list(ends) if len(ends) > 1 else ends[0] if ends else None,
        "dtype": "float32",
    }
    if kind == "mamba2":
        result |= {
            "num_heads": mixer.d_inner // mixer.headdim, "head_dim": mixer.headdim, "n_groups": mixer.ngroups,
            "chunk_size": 64, "rms_norm": True,
        }  # fmt: skip
        if tuple(mixer.dt_limit) != (0.0, math.inf):  # else the default, which old and new readers share
            result["time_step_limit"] = list(mixer.dt_limit)
    else:
        result["time_step_rank"] = mixer.rank
    if falcon:
        result["mixer_rms_eps"] = mixer.mixer_rms_eps
    return result


def _no_counterpart(mixer, config, kind):
    """Fields of a mixer that change what it computes and that transformers cannot be told."""
    fixed = {"dt_limit": (0.0, math.inf)}
    if kind == "mamba2":
        fixed = {"norm_before_gate": False, "D_has_hdim": False, "rmsnorm": True, "norm_eps": config.norm_eps,
                 "width": mixer.d_inner}  # fmt: skip
    return [name for name, value in fixed.items() if getattr(mixer, name, value) != value]


def _number(config, key):
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise ConfigError(f"{key} is {value!r}; expected a positive whole number")
    return value
