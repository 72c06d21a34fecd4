"""Pictures load the way models expect them, and broken or hostile files are told apart by name."""
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from xuracore.errors import ConfigError, DTypeError, FormatError, ShapeError
from xuravljepa import image

RAW = {"mean": (0, 0, 0), "std": (1 / 255,) * 3}      # undoes the scaling: values come out as 0..255


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def test_path_array_and_pil_image_give_the_same_pixels(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "a.png")
    expected = np.moveaxis(picture / 255 * 2 - 1, -1, 0)
    path = tmp_path / "a.png"
    for source in (path, str(path), picture, Image.fromarray(picture), picture / 255):
        loaded = image.load(source, 64)
        assert loaded.shape == (3, 64, 64) and loaded.dtype == np.float32 and loaded.flags.c_contiguous
        np.testing.assert_allclose(loaded, expected, atol=1e-6)


def test_mean_and_std_are_applied_per_channel():
    grey = np.full((8, 8, 3), 128, np.uint8)
    loaded = image.load(grey, 8, image.IMAGENET_MEAN, image.IMAGENET_STD)
    expected = (128 / 255 - np.array(image.IMAGENET_MEAN)) / image.IMAGENET_STD
    np.testing.assert_allclose(loaded[:, 0, 0], expected, rtol=1e-5)


def test_exif_orientation_is_applied(tmp_path):
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6                                   # shown turned by a quarter, clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    upright = image.read_rgb(tmp_path / "turned.png")
    assert upright.size == (8, 16)
    assert np.asarray(upright)[0].min() == 255 and np.asarray(upright)[-1].max() == 0


def test_transparency_is_laid_over_white(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2, :, 3] = 255
    loaded = image.load(pixels, 4, **RAW)
    assert loaded[:, :2].max() == 0 and np.allclose(loaded[:, 2:], 255)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30] * 256)
    palette.save(tmp_path / "p.png", transparency=0)
    assert np.allclose(image.load(tmp_path / "p.png", 4, **RAW), 255)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16"])
def test_every_colour_mode_becomes_rgb(mode):
    assert image.load(Image.new(mode, (5, 7)), 6).shape == (3, 6, 6)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 32768], [65535, 256]], np.uint16)).save(tmp_path / "deep.png")
    assert image.load(tmp_path / "deep.png", 2, **RAW)[0].round().tolist() == [[0, 128], [255, 1]]


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert image.load(tmp_path / "a.gif", 8, **RAW)[:, 0, 0].round().tolist() == [255, 0, 0]


def test_crop_keeps_the_aspect_and_takes_the_middle():
    pixels = np.zeros((40, 120, 3), np.uint8)
    pixels[:, 40:80] = 255
    assert image.load(pixels, 40, resize="crop", **RAW).min() > 254.9
    assert image.load(pixels, 40, resize="squash", **RAW).min() < 1
    assert image.load(pixels, 36, resize="crop", crop_fraction=0.9, **RAW).shape == (3, 36, 36)


@pytest.mark.parametrize("name", image.PREPROCESSING)
def test_every_family_gives_its_size(name):
    recipe = image.PREPROCESSING[name]
    assert image.fit(Image.new("RGB", (300, 500)), recipe).size == (recipe.size, recipe.size)


def test_vjepa_resizes_the_short_side_to_292_for_a_crop_of_256():
    recipe = image.PREPROCESSING["vjepa2"]
    assert int(recipe.size / recipe.crop_fraction) == 292


# ----------------------------------------------------------------- hostile files

def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, body):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body)
            + png_chunk(b"IEND", b""))


HOSTILE = {
    "empty.png": b"",
    "text.jpg": b"this is not a picture",
    "header-only.png": b"\x89PNG\r\n\x1a\n",
    "no-data.png": png(8, 8, b""),
    "bad-zlib.png": png(8, 8, b"\xff" * 40),
    "zero-wide.png": png(0, 8, zlib.compress(b"")),
    "bomb.png": png(60_000, 60_000, zlib.compress(bytes(1000))),
    "postscript.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
    "short.bmp": b"BM" + b"\x00" * 20,
    "short.tiff": b"II*\x00\x08\x00\x00\x00\xff\xff",
    "short.gif": b"GIF89a\x08\x00\x08\x00",
    "short.webp": b"RIFF\x10\x00\x00\x00WEBPVP8 ",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_a_format_error_with_its_path(tmp_path, name):
    (tmp_path / name).write_bytes(HOSTILE[name])
    with pytest.raises(FormatError, match=name):
        image.load(tmp_path / name)


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "bmp", "tiff", "webp"])
def test_a_truncated_file_is_a_format_error_wherever_it_is_cut(tmp_path, picture, kind):
    whole = tmp_path / f"whole.{kind}"
    Image.fromarray(picture).save(whole)
    content = whole.read_bytes()
    for share in (0.1, 0.5, 0.9):
        cut = tmp_path / f"cut.{kind}"
        cut.write_bytes(content[:int(len(content) * share)])
        with pytest.raises(FormatError, match=f"cut.{kind}"):
            image.load(cut)


def test_flipped_bytes_give_a_picture_or_a_format_error(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "a.png")
    content, rng = (tmp_path / "a.png").read_bytes(), np.random.default_rng(1)
    for _ in range(40):
        broken = bytearray(content)
        for at in rng.integers(0, 200, 3):
            broken[at] = rng.integers(256)
        (tmp_path / "b.png").write_bytes(broken)
        try:
            assert image.load(tmp_path / "b.png").shape == (3, 64, 64)
        except FormatError as error:
            assert "b.png" in str(error)


def test_the_pixel_limit_holds_for_files_arrays_and_strips(tmp_path):
    Image.new("RGB", (100, 100)).save(tmp_path / "big.png")
    with pytest.raises(FormatError, match="100 × 100.*9999"):
        image.load(tmp_path / "big.png", max_pixels=9999)
    with pytest.raises(FormatError, match="limit"):
        image.load(np.zeros((100, 100, 3), np.uint8), max_pixels=9999)
    with pytest.raises(FormatError, match="limit"):
        image.load(np.zeros((1, 1_000_000, 3), np.uint8), 224, resize="crop")


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(FormatError, match="nothing.png.*no such file"):
        image.load(tmp_path / "nothing.png")
    with pytest.raises(FormatError, match="directory"):
        image.load(tmp_path)


@pytest.mark.parametrize("array,error", [
    (np.zeros((4, 4, 2), np.uint8), ShapeError), (np.zeros(4, np.uint8), ShapeError),
    (np.zeros((4, 4, 3), np.int64), DTypeError), (np.full((4, 4, 3), 2.0), DTypeError),
    (np.full((4, 4, 3), np.nan), DTypeError), (np.zeros((0, 4, 3), np.uint8), FormatError), (7, DTypeError)])
def test_arrays_that_are_no_picture_are_refused(array, error):
    with pytest.raises(error):
        image.load(array)


@pytest.mark.parametrize("wrong", [{"size": 0}, {"resize": "stretch"}, {"filter": "magic"},
                                   {"crop_fraction": 0}, {"std": (0, 1, 1)}, {"mean": (0.5,)}])
def test_a_wrong_setting_is_a_config_error(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        image.load(np.zeros((4, 4, 3), np.uint8), **wrong)
