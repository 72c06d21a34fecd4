"""What lies beside a vision model's weights: how pictures are prepared, and the licence.

Read are ``preprocessor_config.json`` (and its video form) as Hugging Face's processors write it, and the
``pretrained_cfg`` of timm's ``config.json``; without either, the habit of the family.
"""

import re
from dataclasses import replace
from pathlib import Path

from xuracore import io
from xuracore.errors import ConfigError, FormatError
from xuravljepa.image import PREPROCESSING, Preprocessing

PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's numbers
_HABITS = {"timm": "timm", "vit": "hf-vit", "dinov2": "dinov2", "dinov2-hf": "dinov2", "ijepa": "dinov2",
           "ijepa-hf": "hf-vit", "vjepa2": "vjepa2"}
_SQUARE = re.compile("ViT|DeiT|Siglip|IJepa")  # processors for which one number means both sides
_CARD_BYTES = 65536


def usual(size, family="xura"):
    """The Preprocessing of a family's models for pictures of ``size``; ours squash, and have mean and std 0.5."""
    return replace(PREPROCESSING[_HABITS.get(family, "scenes")], size=size)


def read_preprocessing(directory, settings, family, image_size):
    """The Preprocessing that a folder's files ask for, else the family's habit at ``image_size``.

    settings : of ``config.json``.   Raises FormatError, naming the file, for what cannot be done here: no
    square at the end, channels other than three, unknown filters.
    """
    for name in PROCESSOR_FILES:
        path = Path(directory) / name
        if path.is_file():
            return _checked(_from_processor, io.load_json(path), path, usual(image_size, family))
    timm = settings.get("pretrained_cfg") if isinstance(settings, dict) else None
    if isinstance(timm, dict):
        return _checked(_from_timm, timm, Path(directory) / "config.json", usual(image_size, family))
    return usual(image_size, family)


def _checked(function, data, path, default):
    if not isinstance(data, dict):
        raise FormatError(f"holds a {type(data).__name__}, not an object", path)
    try:
        return function(data, default)
    except (ConfigError, TypeError, ValueError, KeyError, OverflowError, ZeroDivisionError) as error:
        raise FormatError(getattr(error, "reason", None) or f"{error}", path) from None


def _from_processor(data, default):
    for part in ("image_processor", "video_processor"):  # processor_config.json keeps them one level down
        if isinstance(data.get(part), dict):
            data = data[part]
    kind = str(data.get("video_processor_type") or data.get("image_processor_type")
               or data.get("feature_extractor_type") or "")
    mean, std = default.mean, default.std
    mean, std = _three(data.get("image_mean", mean)), _three(data.get("image_std", std))
    if data.get("do_normalize") is False:
        mean, std = (0.0,) * 3, (1.0,) * 3
    factor = data.get("rescale_factor", 1 / 255) if data.get("do_rescale") is not False else 1.0
    if not isinstance(factor, (int, float)) or isinstance(factor, bool) or not factor > 0:
        raise ConfigError(f"rescale_factor is {factor!r}; expected a number above 0")
    if abs(255 * factor - 1) > 1e-6:  # here a value is first divided by 255: (255 f v/255 - m)/s
        mean, std = tuple(m / (255 * factor) for m in mean), tuple(s / (255 * factor) for s in std)
    crop = _square(data.get("crop_size"), "crop_size")
    cropped = data.get("do_center_crop", crop is not None) is True
    filter = data.get("resample", default.filter)
    filter = _FILTERS.get(filter, filter) if not isinstance(filter, (list, dict)) else None
    recipe = {"mean": mean, "std": std, "filter": filter}
    size = data.get("size")
    short = size.get("shortest_edge") if isinstance(size, dict) else None
    if isinstance(size, int) and not isinstance(size, bool) and not (_SQUARE.search(kind) or not cropped):
        short = size
    if "VJEPA2" in kind and crop is not None:  # that processor goes by its crop alone
        short = int(crop * 256 / 224)
    if data.get("do_resize") is False:
        if not cropped or crop is None:
            raise ConfigError("neither resizes nor crops, so pictures of different sizes cannot be batched")
        return Preprocessing(crop, resize="none", **recipe)
    if short is not None:
        if not cropped or crop is None:
            raise ConfigError("resizes the short side and crops nothing, which gives pictures of different sizes")
        return Preprocessing(crop, resize="crop", short=short, **recipe)
    side = default.size if size is None else _square(size, "size")
    if cropped and crop is not None and crop != side:
        return Preprocessing(crop, resize="squash", short=side, **recipe)
    return Preprocessing(side, resize="squash", **recipe)


def _from_timm(data, default):
    size = data.get("input_size", [3, default.size, default.size])
    if not isinstance(size, list) or len(size) != 3 or size[0] != 3 or size[1] != size[2]:
        raise ConfigError(f"input_size is {size!r}; expected [3, side, side]")
    fraction, mode = data.get("crop_pct", default.crop_fraction), data.get("crop_mode", "center")
    if mode not in ("center", "squash"):
        raise ConfigError(f"crop_mode is {mode!r}; expected 'center' or 'squash'")
    if not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
        raise ConfigError(f"crop_pct is {fraction!r}; expected a share in (0, 1]")
    return Preprocessing(size[1], _three(data.get("mean", default.mean)), _three(data.get("std", default.std)),
                         "crop" if mode == "center" else "squash", 1.0, data.get("interpolation", default.filter),
                         short=int(size[1] / fraction))


def _three(values):
    values = [values] * 3 if isinstance(values, (int, float)) else values
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        raise ConfigError(f"mean or std is {values!r}; expected three numbers")
    return tuple(float(value) for value in values)


def _square(size, name):
    """The side of {"height": n, "width": n}, n or [n, n]; None for None."""
    if isinstance(size, dict) and set(size) == {"height", "width"}:
        size = [size["height"], size["width"]]
    if isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if size is not None and (not isinstance(size, int) or isinstance(size, bool)):
        raise ConfigError(f"{name} is {size!r}; expected one side, or equal height and width")
    return size


def preprocessor_settings(recipe):
    """A Preprocessing in the words of ``preprocessor_config.json``."""
    numbers = {name: number for number, name in _FILTERS.items()}
    side = {"height": recipe.size, "width": recipe.size}
    data = {"image_processor_type": "ViTImageProcessor", "do_resize": recipe.resize != "none", "do_rescale": True,
            "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(recipe.mean),
            "image_std": list(recipe.std), "resample": numbers[recipe.filter], "size": side}
    if recipe.resize == "crop":
        data |= {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": recipe.resized}}
    elif recipe.resized != recipe.size:
        data |= {"size": {"height": recipe.resized, "width": recipe.resized}}
    if recipe.resize != "squash" or recipe.resized != recipe.size:
        data |= {"do_center_crop": True, "crop_size": side}
    return data


def read_licence(directory, settings):
    """The licence that a folder states, in its words, or None: the model card's front matter, else config.json."""
    card = Path(directory) / "README.md"
    if card.is_file():
        with open(card, "rb") as file:
            text = file.read(_CARD_BYTES).decode("utf-8", "replace")
        front = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", text, re.S)
        fields = dict(re.findall(r"^(license|license_name):[ \t]*[\"']?([^\s\"'#][^\"'#\r\n]*)", front[1], re.M)) if (
            front) else {}
        if fields:
            return " ".join(fields[key].strip() for key in ("license", "license_name") if key in fields)
    timm = settings.get("pretrained_cfg") if isinstance(settings, dict) else None
    for source in (settings, timm):
        found = source.get("license") if isinstance(source, dict) else None
        if isinstance(found, str) and found.strip():
            return found.strip()
    return None
