"""Model folders: which file holds what, and how names and layouts of others become ours.

Nothing in a folder is believed: configurations are bounded JSON, weights are safetensors or a torch file
read without unpickling, and names and shapes are compared whole before the first weight is read.
"""

import math
import warnings
from pathlib import Path

import numpy as np

from xuracore import io
from xuracore.config import require
from xuracore.errors import ConfigError, FormatError
from xuracore.io.torch_file import open_torch_file
from xuracore.nn import init
from xuracore.nn.quantized import WIDTHS
from xuramamba import published
from xuramamba.quantize import quantize, width_of

MODEL_TYPE = "xura_language_model"
FORMATS = ("xura", "huggingface")
WEIGHT_FILES = (
    "model.safetensors", "model.safetensors.index.json", "consolidated.safetensors", "pytorch_model.bin",
)  # fmt: skip
_EMBEDDING, _HEAD = "backbone.embedding.weight", "lm_head.weight"


def load(model_class, config_class, directory, dtype=None, mixer_fields=None):
    """Build a model from ``directory``, which holds config.json (or params.json) and weights.

    Weights are model.safetensors, its sharded form (model.safetensors.index.json), Mistral's
    consolidated.safetensors or pytorch_model.bin, the first of them that is there.
    dtype : ``"float32"`` (F16 and BF16 are widened as they are read, one tensor at a time) or
        ``"float64"``; ``"bfloat16"``, ``"int8"`` or ``"int4"`` store the matrices so (see
        :mod:`xuramamba.quantize`), each as it is read.  None: as the folder has it, else float32.
    mixer_fields : options of the mixers that a published configuration does not state, such as
        ``{"a_activation": "softplus"}`` for Mamba-3 models trained before June 2026.

    Raises FormatError for a damaged or hostile file and for weights that are not finite, ConfigError for
    a configuration that means nothing here, StateDictError that lists every missing, unexpected and
    misshapen tensor at once, OSError for what cannot be read.  Nothing is left behind by a failure.
    """
    known = (*WIDTHS, "float64")
    require(dtype is None or str(dtype) in known, f"dtype is {dtype!r}; expected one of {', '.join(known)}")
    directory = Path(directory)
    config = read_config(directory)
    stored = config.pop("stored_as", "float32") if config.get("model_type") == MODEL_TYPE else "float32"
    require(stored in WIDTHS, f"{directory}: stored_as is {stored!r}; expected one of {', '.join(WIDTHS)}")
    dtype = stored if dtype is None else str(dtype)
    require(
        stored in ("float32", dtype),
        f"{directory}: the weights are stored as {stored}; {dtype} needs the folder they were made from",
    )
    with open_weights(directory) as file:
        names = own_names(file)
        shapes = {own: file.shape(name) for own, name in names.items()}
        fields = config_fields(config, shapes, directory)
        if mixer_fields:
            fields["mixer_fields"] = {**fields.get("mixer_fields", {}), **mixer_fields}
        config = config_class.from_dict(fields)
        _check_sizes(config, shapes, directory)
        if config.tie_embeddings and _HEAD in names:
            config = _decide_tie(config, file, names, directory)
        with init.blank():
            model = model_class(config)
            if stored != "float32":
                quantize(model, stored)
        _fill(model, {own: _Stored(file, name) for own, name in names.items()}, dtype)
    return model


def _check_sizes(config, shapes, directory):
    """ConfigError unless the configuration is of the size of the weights: it must not claim memory."""
    table, size = shapes.get(_EMBEDDING), (config.padded_vocab_size, config.d_model)
    packed = table is not None and len(table) == 3 and math.prod(size) <= 2 * math.prod(table)  # two to a byte
    require(
        packed or table in (None, size),
        f"{directory}: the configuration says {size[0]} tokens (padded) of width {size[1]}, the embedding is "
        f"{' × '.join(map(str, table or ()))}",
    )
    inner = {name: shape for name, shape in shapes.items() if name.startswith("backbone.layers.")}
    layers = len({name.split(".")[2] for name in inner})
    require(
        layers == config.n_layer,
        f"{directory}: the configuration says {config.n_layer} layers, the weights have {layers}",
    )
    most = max(1024, *(dimension for shape in inner.values() for dimension in shape))
    claimed = {"d_intermediate": config.d_intermediate}
    for i in range(config.n_layer if config.layer_types else 1):
        claimed |= config.stack.mixer_config(i).to_dict()
        for name, value in claimed.items():
            require(
                type(value) is not int or value <= most,
                f"{directory}: {name} is {value}; no dimension of the weights is above {most}",
            )


def _decide_tie(config, file, names, directory):
    """A head beside a tied embedding: dropped if it is the same, kept, with a warning, if not."""
    table, head = names[_EMBEDDING], names[_HEAD]
    if file.shape(table) == file.shape(head) and np.array_equal(file.read(table), file.read(head)):
        del names[_HEAD]
        return config
    warnings.warn(
        f"{directory}: the configuration ties lm_head to the embedding, the weights differ; both are used "
        "as they are", stacklevel=4,
    )  # fmt: skip
    return config.replace(tie_embeddings=False)


def _fill(model, state, dtype):
    """Read the tensors of ``state`` into a blank model, which then has matrices of ``dtype``."""
    if dtype == "float64":
        model.to_dtype(np.float64)
    own = model.state_dict()
    for name in state.keys() & own.keys():
        state[name].as_bits = own[name].dtype.kind != "f"
    given, _, _ = model.match_state_dict(state)
    if dtype in ("float32", "float64", width_of(model)):
        for name, stored in given.items():
            own[name][...] = stored.read()
        return
    first = {parameter: name for name, parameter in model.named_parameters()}

    def read(layer):
        for parameter in layer.parameters():
            parameter.data = given.pop(first[parameter]).read()

    quantize(model, dtype, before=read)
    own = model.state_dict()
    for name, stored in given.items():
        own[name][...] = stored.read()


def read_config(directory):
    """The configuration in ``directory`` as plain data; FormatError when there is none."""
    directory = Path(directory)
    if not directory.is_dir():
        reason = "is a file; expected the folder it lies in" if directory.exists() else "no such folder"
        raise FormatError(reason, directory)
    for name in ("config.json", "params.json"):
        if (directory / name).is_file():
            config = published.plain_numbers(io.load_json(directory / name, allow_infinity=True))
            if not isinstance(config, dict):
                raise FormatError("is not a JSON object", directory / name)
            return config
    raise FormatError("holds no config.json (nor params.json): this is not the folder of a model", directory)


def open_weights(directory):
    """The weights in ``directory``, an object with keys(), shape(name), dtype(name), read(name, half)."""
    directory = Path(directory)
    for name in WEIGHT_FILES:
        if (directory / name).is_file():
            open_file = open_torch_file if name.endswith(".bin") else io.open_safetensors
            return open_file(directory / name)
    if (directory / "pytorch_model.bin.index.json").is_file():
        raise FormatError("torch files in several parts are not read; convert them to safetensors", directory)
    raise FormatError(f"holds no weights; expected one of {', '.join(WEIGHT_FILES)}", directory)


def config_fields(config, shapes, directory):
    """Fields of a LanguageModelConfig for a configuration read from ``directory``, ours or published."""
    if config.get("model_type") == MODEL_TYPE:
        return {key: _tuples(value) for key, value in config.items() if key != "model_type"}
    try:
        return published.language_model_fields(config, shapes)
    except ConfigError as error:
        raise ConfigError(f"{Path(directory) / 'config.json'}: {error}") from None
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise ConfigError(f"{Path(directory) / 'config.json'}: a value has the wrong type ({error})") from None


def _tuples(value):
    """JSON has lists where our configurations have tuples, also inside mixer_fields."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def own_names(file):
    """{our parameter name: name in the file}; FormatError when two names mean the same parameter."""
    names = {}
    for name in file.keys():
        own = own_name(name)
        if own in names:
            raise FormatError(f"means the same parameter as {names[own]!r}", file.path, name)
        names[own] = name
    return names


def own_name(name):
    """Our name of a parameter: ``model.backbone.embeddings.weight`` → ``backbone.embedding.weight``."""
    if name.startswith(("model.backbone.", "model.lm_head.")):
        name = name.removeprefix("model.")
    if not name.startswith(("backbone.", "lm_head.")):  # saved without its head
        name = f"backbone.{name}"
    return _EMBEDDING if name == "backbone.embeddings.weight" else name


class _Stored:
    """A tensor that is read, and checked, when it is asked for."""

    def __init__(self, file, name):
        self.file, self.name, self.shape = file, name, file.shape(name)
        self.as_bits = False  # part of a quantised matrix

    @property
    def dtype(self):
        """The dtype that :meth:`read` gives."""
        kind = self.file.dtype(self.name)
        if kind == "BF16" and self.as_bits:
            return np.dtype(np.uint16)
        return np.dtype({"F64": "f8", "I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8", "U8": "u1"}.get(kind, "f4"))

    def read(self):
        """Its numbers, floating point and finite, or the whole numbers of a quantised matrix."""
        array = self.file.read(self.name, "bits" if self.as_bits else "float32")
        if self.as_bits:
            return array
        if array.dtype.kind != "f":
            raise FormatError(f"holds {array.dtype} numbers; expected floating point", self.file.path, self.name)
        if not np.isfinite(array).all():
            count = int((~np.isfinite(array)).sum())
            raise FormatError(
                f"{count} of {array.size} weights are NaN or infinite: the file is damaged, or its "
                "training diverged", self.file.path, self.name,
            )  # fmt: skip
        return array


def save(model, directory, format="xura"):
    """Write config.json and model.safetensors; see :meth:`LanguageModel.save_pretrained`."""
    require(format in FORMATS, f"format is {format!r}; expected one of {', '.join(FORMATS)}")
    state, metadata, width = model.state_dict(), {"format": "pt"}, width_of(model)  # transformers asks for "pt"
    if format == "huggingface":
        require(width == "float32", f"the weights are stored as {width}, which only our own format holds")
        config = published.hugging_face_config(model.config)
        state["backbone.embeddings.weight"] = state.pop(_EMBEDDING)
    else:
        config = {"model_type": MODEL_TYPE, **model.config.to_dict()}
        if width != "float32":
            config["stored_as"] = width
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    bits = [name for name, array in state.items() if array.dtype == np.uint16]
    io.save_safetensors(directory / "model.safetensors", state, metadata, bfloat16=bits)
    io.save_json(directory / "config.json", published.json_numbers(config))
