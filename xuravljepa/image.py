"""Pictures in, normalised arrays out, and nothing that a hostile file can break.

Every vision model has its own habit of resizing and scaling; ``PREPROCESSING`` holds those of the families
whose weights can be loaded (timm, Hugging Face and V-JEPA 2 configurations).
"""
import io
import os
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from xuracore.errors import ConfigError, DTypeError, FormatError, ShapeError

MAX_PIXELS = 64_000_000
# Decoders that hand the file to another program (EPS) or are rarely exercised are left out on purpose.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_FILTERS = {name: Image.Resampling[name.upper()]
            for name in ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")}


@dataclass(frozen=True)
class Preprocessing:
    """How a model wants its pictures.

    ``size`` is the side in pixels.  ``resize`` is ``"squash"`` (both sides to ``size``), ``"crop"`` (the
    short side to ``short``, by default ``int(size / crop_fraction)``, then the middle square) or ``"none"``
    (the middle square alone).  With ``short``, a squashed picture gets these sides before the middle is cut out.
    What lies outside the picture is black.  Pixels are divided by 255, then normalised by ``mean`` and ``std``.
    """

    size: int = 64
    mean: tuple = HALF
    std: tuple = HALF
    resize: str = "squash"
    crop_fraction: float = 1.0
    filter: str = "bicubic"
    short: int | None = None

    def __post_init__(self):
        if self.resize not in ("squash", "crop", "none"):
            raise ConfigError(f"resize must be 'squash', 'crop' or 'none', got {self.resize!r}")
        if self.filter not in _FILTERS:
            raise ConfigError(f"filter must be one of {', '.join(_FILTERS)}, got {self.filter!r}")
        for name in ("size", "short"):
            value = getattr(self, name)
            if (name, value) != ("short", None) and not (type(value) is int and 0 < value <= MAX_PIXELS):
                raise ConfigError(f"{name} must be a positive number of pixels, got {value!r}")
        if not 0 < self.crop_fraction <= 1:
            raise ConfigError(f"crop_fraction must lie in (0, 1], got {self.crop_fraction}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ConfigError(f"mean and std need three numbers, std above 0; got {self.mean} and {self.std}")

    @property
    def resized(self):
        """The side, or the short side, in pixels, before anything is cut off."""
        if self.short is not None:
            return self.short
        return int(self.size / self.crop_fraction) if self.resize == "crop" else self.size


PREPROCESSING = {
    "scenes": Preprocessing(),
    "timm": Preprocessing(224, resize="crop", crop_fraction=0.9),
    "hf-vit": Preprocessing(224, filter="bilinear"),
    "dinov2": Preprocessing(224, IMAGENET_MEAN, IMAGENET_STD, "crop", 224 / 256),
    "vjepa2": Preprocessing(256, IMAGENET_MEAN, IMAGENET_STD, "crop", 256 / 292, "bilinear"),
}


def load(source, size=64, mean=HALF, std=HALF, *, resize="squash", crop_fraction=1.0, filter="bicubic",
         max_pixels=MAX_PIXELS):
    """A picture as float32 (3, size, size), normalised: (value / 255 − mean) / std.

    ``source`` is a path, the bytes of a file, a PIL image, or an array: uint8 (H, W), (H, W, 3) or (H, W, 4), or
    floats in 0..1 of these shapes.  The EXIF orientation is applied, transparency is laid over white, an animation
    gives its first frame.  The other arguments are those of ``Preprocessing``.

    Raises FormatError, with the path, for a file that is missing, damaged, truncated, of a foreign format or
    larger than ``max_pixels``; ShapeError or DTypeError for an array that is no picture.
    """
    return prepare(source, Preprocessing(size, tuple(mean), tuple(std), resize, crop_fraction, filter), max_pixels)


def prepare(source, recipe, max_pixels=MAX_PIXELS):
    """A picture as float32 (3, size, size), as ``recipe`` (a Preprocessing) says.

    Sources and errors as in ``load``.
    """
    return normalise(fit(read_rgb(source, max_pixels), recipe, max_pixels), recipe.mean, recipe.std)


def read_rgb(source, max_pixels=MAX_PIXELS):
    """A picture as a PIL image in mode RGB, upright, alpha over white.  Sources and errors as in ``load``."""
    if isinstance(source, np.ndarray):
        return _over_white(_from_array(source, max_pixels))
    if isinstance(source, Image.Image):
        return _decode(source, None, max_pixels)
    if not isinstance(source, (str, os.PathLike, bytes)):
        raise DTypeError(f"a picture is a path, bytes, an array or a PIL image, got {type(source).__name__}")
    path = None if isinstance(source, bytes) else os.fspath(source)
    try:
        file = Image.open(io.BytesIO(source) if path is None else path, formats=FORMATS)
    except FileNotFoundError:
        raise FormatError("there is no such file", path) from None
    except IsADirectoryError:
        raise FormatError("this is a directory, not a picture", path) from None
    except Exception as error:       # decoders raise anything from OSError to struct.error on hostile bytes
        raise FormatError(f"not a picture that can be read ({_reason(error)})", path) from error
    with file:
        return _decode(file, path, max_pixels)


def fit(image, recipe, max_pixels=MAX_PIXELS):
    """An RGB PIL image brought to ``recipe.size`` square, as ``recipe`` (a Preprocessing) says."""
    size, width, height = recipe.size, *image.size
    target = image.size
    if recipe.resize == "squash":
        target = recipe.resized, recipe.resized
    elif recipe.resize == "crop":
        short, small = recipe.resized, min(width, height)
        target = tuple(short * side // small for side in (width, height))
    _check_pixels(target, max_pixels, None)      # a 1-pixel-high strip would grow without bound
    if image.size != target:
        image = image.resize(target, _FILTERS[recipe.filter])
    left, top = ((side - size) // 2 for side in target)
    return image if target == (size, size) else image.crop((left, top, left + size, top + size))


def normalise(image, mean=HALF, std=HALF):
    """An RGB image (PIL, or uint8 (…, H, W, 3)) as float32 (…, 3, H, W): (value / 255 − mean) / std."""
    values = np.asarray(image, np.float32)
    scale = 1 / (255 * np.asarray(std, np.float64))
    shift = np.asarray(mean, np.float64) / np.asarray(std, np.float64)
    values = values * scale.astype(np.float32) - shift.astype(np.float32)
    return np.ascontiguousarray(np.moveaxis(values, -1, -3))


def _check_pixels(size, max_pixels, path):
    width, height = size
    if width < 1 or height < 1:
        raise FormatError(f"the picture is empty ({width} × {height})", path)
    if width * height > max_pixels:
        raise FormatError(f"{width} × {height} pixels are more than the limit of {max_pixels}; "
                          f"shrink the picture or raise max_pixels", path)


def _decode(image, path, max_pixels):
    _check_pixels(image.size, max_pixels, path)
    try:
        image.load()
        return _over_white(ImageOps.exif_transpose(_to_eight_bits(image)))
    except Exception as error:       # as in read_rgb: the decoder's choice of exception says nothing
        raise FormatError(f"damaged or truncated picture ({_reason(error)})", path) from error


def _reason(error):
    text = str(error).split("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _to_eight_bits(image):
    """Pillow would clip 16-bit grey values at 255, that is, turn most of them white."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    values = values >> 8 if values.max(initial=0) > 255 else values
    result = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    result.info.update(image.info)
    return result


def _over_white(image):
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _from_array(array, max_pixels):
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ShapeError(f"a picture has shape (H, W), (H, W, 3) or (H, W, 4), got {array.shape}")
    _check_pixels(array.shape[1::-1], max_pixels, None)
    if array.dtype.kind == "f":
        if not (np.all(array >= 0) and np.all(array <= 1)):       # also catches NaN
            raise DTypeError("float pixels must lie in 0..1 and be finite; divide by 255 or pass uint8")
        array = np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise DTypeError(f"pixels must be uint8, or floats in 0..1, got {array.dtype}")
    return Image.fromarray(np.ascontiguousarray(array))
