"""Exports for inference: weights in full, half or 8-bit form beside a manifest that holds the whole configuration."""

from pathlib import Path

import numpy as np

from xuracore.config import require
from xuracore.errors import FormatError
from xuracore.io.strict_json import load_json, save_json
from xuramamba.wavecore.checkpoint import describe, load_arrays, model_of, save_arrays
from xuramamba.wavecore.parameters import arrays, check_same_form, flatten, unflatten
from xuramamba.wavecore.session import dequantize_int8, int8_error, quantize_int8

MANIFEST, WEIGHTS = "model_manifest.json", "weights.npz"
QUANTIZATIONS = ("int8", "fp16", None)


def is_export(folder):
    """Whether a folder holds an export."""
    return (Path(folder) / MANIFEST).is_file()


def export_model(folder, model, variables, quantization=None, *, checkpoint_path="", arch_preset="", backend="auto",
                 sparsity_lambda=0.0):  # fmt: skip
    """Write an export and return its manifest; quantization is "int8", "fp16" or None."""
    require(quantization in QUANTIZATIONS, f"quantization={quantization!r}; expected one of {QUANTIZATIONS}")
    folder, params = Path(folder), variables["params"]
    folder.mkdir(parents=True, exist_ok=True)
    about = {"model_type": "jax_core_model", "checkpoint_path": str(checkpoint_path), **describe(model),
             "quantization": quantization, "backend": backend, "format": "npz", "arch_preset": arch_preset,
             "sparsity_lambda": float(sparsity_lambda), "compact": quantization is not None}
    if quantization == "int8":
        small, scales = quantize_int8(params)
        named = {f"params/{n}": x for n, x in small.items()} | {f"scales/{n}": x for n, x in scales.items()}
        if model.config.obs_type == "vector":
            about["int8_error"] = int8_error(model, params)
    else:
        kind = np.float16 if quantization else np.float32
        named = {f"params/{name}": x for name, x in flatten(arrays(params, kind)).items()}
    save_arrays(folder / WEIGHTS, named)
    save_json(folder / MANIFEST, about)
    return about


def load_export(folder):
    """(model, variables with float32 arrays) of an export; FormatError for a damaged one."""
    folder = Path(folder)
    about = load_json(folder / MANIFEST)
    model, named = model_of(about, folder / MANIFEST), load_arrays(folder / WEIGHTS)
    parts = {"params": {}, "scales": {}}
    for name, x in named.items():
        part, _, rest = name.partition("/")
        if part not in parts or not rest:
            raise FormatError("is neither a parameter nor a scale", folder / WEIGHTS, name)
        parts[part][rest] = x
    if set(parts["scales"]) - set(parts["params"]):
        raise FormatError("holds scales of unknown parameters", folder / WEIGHTS)
    if about.get("quantization") == "int8":
        tree = dequantize_int8(parts["params"], parts["scales"])
    else:
        tree = unflatten({name: x.astype(np.float32) for name, x in parts["params"].items()})
    check_same_form(tree, model.init(0, object_features="objects" in tree.get("encoder", {})), folder / WEIGHTS)
    return model, {"params": tree}
