"""A WaveCore model as a folder: wavecore_seed.npz, manifest.json and config.json.

The weights are an ordinary NumPy archive with names like ``params/encoder/obs/in/kernel``, written atomically
and read without unpickling.  The manifest has the keys of the published seed; config.json holds all that the
model needs to be built again, sizes of inputs and outputs included.
"""

import io
import zipfile
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from xuracore.config import require
from xuracore.errors import FormatError
from xuracore.io.atomic import write_atomically
from xuracore.io.strict_json import load_json, save_json
from xuramamba.wavecore.config import CoreModelConfig
from xuramamba.wavecore.model import CoreModel
from xuramamba.wavecore.parameters import arrays, check_same_form, flatten, parameters, unflatten

WEIGHTS, MANIFEST, CONFIG = "wavecore_seed.npz", "manifest.json", "config.json"
VERSION = "1.0.0"
MAXIMUM_BYTES = 4 * 2**30


def manifest(model, variables, training, phase="seed"):
    """The manifest of a model; training is {"final_loss", "rlds_episodes"}."""
    return {
        "version": VERSION,
        "phase": phase,
        "timestamp": datetime.now(timezone.utc).replace(tzinfo=None).isoformat(),
        "model_type": "wavecore_seed",
        "param_count": model.param_count(variables),
        "scaffold": "google/gemma-3n-E2B-it (TEMPORARY)",
        "embedding": "google/embeddinggemma-300m (RETAINED)",
        "target": "hope_wavecore (non-transformers)",
        "training": {"final_loss": float(training["final_loss"]), "rlds_episodes": int(training["rlds_episodes"])},
    }


def save_model(folder, model, variables, training, phase="seed"):
    """Write the folder; each file whole or not at all, the manifest last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_arrays(folder / WEIGHTS, {f"params/{name}": x for name, x in flatten(arrays(variables["params"])).items()})
    save_json(folder / CONFIG, describe(model))
    save_json(folder / MANIFEST, manifest(model, variables, training, phase))


def describe(model):
    """What a model is built from, as JSON data."""
    return {"config": model.config.to_dict(), "input_dims": {"obs_dim": model.obs_dim, "action_dim": model.action_dim},
            "output_dim": model.output_dim}


def model_of(data, path=None):
    """The model that :func:`describe` described; FormatError or ConfigError for anything else."""
    try:
        dims = data["input_dims"]
        config, sizes = data["config"], (dims["obs_dim"], dims["action_dim"], data["output_dim"])
    except (KeyError, TypeError):
        raise FormatError("expected config, input_dims {obs_dim, action_dim} and output_dim", path) from None
    return CoreModel(CoreModelConfig.from_dict(config), *sizes)


def load_model(folder):
    """(model, variables) of a folder; FormatError says what is damaged, missing or does not fit."""
    folder = Path(folder)
    model = model_of(load_json(folder / CONFIG), folder / CONFIG)
    about = load_json(folder / MANIFEST)
    found = load_arrays(folder / WEIGHTS)
    for name in found:
        if not name.startswith("params/"):
            raise FormatError("is no parameter: every name begins with 'params/'", folder / WEIGHTS, name)
    tree = unflatten({name.removeprefix("params/"): array for name, array in found.items()})
    objects = "objects" in tree.get("encoder", {})
    check_same_form(tree, model.init(0, object_features=objects), folder / WEIGHTS)
    variables = {"params": parameters(tree)}
    count = about.get("param_count") if isinstance(about, dict) else None
    if count != model.param_count(variables):
        own = model.param_count(variables)
        raise FormatError(f"param_count is {count!r}; the weights are {own}", folder / MANIFEST)
    return model, variables


def save_arrays(path, named):
    """Write {name: array} as .npz, atomically."""
    buffer = io.BytesIO()
    np.savez(buffer, **named)
    return write_atomically(path, [buffer.getbuffer()])


def load_arrays(path):
    """{name: array} of an .npz file of numbers; FormatError if it is damaged or holds anything else."""
    path = Path(path)
    require(path.is_file(), f"{path} is not a file")
    if path.stat().st_size > MAXIMUM_BYTES:
        raise FormatError(f"is larger than {MAXIMUM_BYTES} bytes", path)
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MAXIMUM_BYTES:
                raise FormatError(f"unpacks to more than {MAXIMUM_BYTES} bytes", path)
        with np.load(path) as archive:
            return {name: archive[name] for name in archive.files}
    except FormatError:
        raise
    except Exception as error:  # a damaged archive raises anything
        raise FormatError(f"is damaged or no archive of numbers ({error})", path) from None
