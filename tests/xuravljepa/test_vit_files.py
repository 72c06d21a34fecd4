"""What lies beside a vision model's weights: its preprocessing in all its spellings, and its licence."""

import json

import numpy as np
import pytest
from PIL import Image

from xuracore.errors import FormatError
from xuravljepa import image
from xuravljepa.cli import main
from xuravljepa.image import HALF, IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from xuravljepa.vit import VisionTransformer, VitConfig
from xuravljepa.vit_files import preprocessor_settings, read_licence, read_preprocessing, usual


def read(folder, data, name="preprocessor_config.json", family="vit", size=224):
    (folder / name).write_text(json.dumps(data))
    return read_preprocessing(folder, {}, family, size)


SQUARE = {"height": 224, "width": 224}
BIT = {"image_processor_type": "BitImageProcessor", "do_resize": True, "size": {"shortest_edge": 256}, "resample": 3,
       "do_center_crop": True, "crop_size": SQUARE, "do_rescale": True, "rescale_factor": 1 / 255,
       "do_normalize": True, "image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}
VIT = {"image_processor_type": "ViTImageProcessor", "do_resize": True, "size": SQUARE, "resample": 2,
       "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
DINO = Preprocessing(224, IMAGENET_MEAN, IMAGENET_STD, "crop", short=256)


@pytest.mark.parametrize("data, expected", [
    (BIT, DINO),
    (BIT | {"crop_size": 224, "size": 256, "resample": 2}, Preprocessing(224, IMAGENET_MEAN, IMAGENET_STD, "crop",
                                                                         filter="bilinear", short=256)),
    (VIT, Preprocessing(224, HALF, HALF, "squash", filter="bilinear")),
    ({"feature_extractor_type": "ViTFeatureExtractor", "size": 224, "resample": 2, "image_mean": [0.5] * 3,
      "image_std": [0.5] * 3}, Preprocessing(224, HALF, HALF, "squash", filter="bilinear")),
    (VIT | {"size": {"height": 256, "width": 256}, "do_center_crop": True, "crop_size": SQUARE},
     Preprocessing(224, HALF, HALF, "squash", filter="bilinear", short=256)),
    (VIT | {"do_resize": False, "crop_size": SQUARE}, Preprocessing(224, HALF, HALF, "none", filter="bilinear")),
    (VIT | {"do_normalize": False}, Preprocessing(224, (0.0,) * 3, (1.0,) * 3, "squash", filter="bilinear")),
    (VIT | {"resample": 1}, Preprocessing(224, HALF, HALF, "squash", filter="lanczos")),
    ({"image_processor": BIT}, DINO),
])  # fmt: skip
def test_the_spellings_of_a_processor(data, expected, tmp_path):
    assert read(tmp_path, data) == expected


def test_vjepa2_goes_by_its_crop(tmp_path):
    data = {"video_processor_type": "VJEPA2VideoProcessor", "size": {"shortest_edge": 292}, "crop_size": 384,
            "do_center_crop": True, "resample": 2, "image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}
    found = read(tmp_path, data, "video_preprocessor_config.json", "vjepa2", 384)
    assert found == Preprocessing(384, IMAGENET_MEAN, IMAGENET_STD, "crop", filter="bilinear", short=438)


def test_timm_settings(tmp_path):
    cfg = {"input_size": [3, 518, 518], "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center",
           "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD), "license": "apache-2.0"}
    found = read_preprocessing(tmp_path, {"pretrained_cfg": cfg}, "timm", 518)
    assert found == Preprocessing(518, IMAGENET_MEAN, IMAGENET_STD, "crop", short=518)
    cfg |= {"input_size": [3, 224, 224], "crop_pct": 0.9}
    assert read_preprocessing(tmp_path, {"pretrained_cfg": cfg}, "timm", 224).resized == 248
    with pytest.raises(FormatError, match="config.json: crop_mode is 'border'"):
        read_preprocessing(tmp_path, {"pretrained_cfg": cfg | {"crop_mode": "border"}}, "timm", 224)
    assert read_licence(tmp_path, {"pretrained_cfg": cfg}) == "apache-2.0"


def test_rescaling_is_folded_into_mean_and_deviation(tmp_path):
    """Values as the processor computes them: (value · factor - mean) / std."""
    value = np.full((8, 8, 3), 200, np.uint8)
    for change, factor in (({"rescale_factor": 1 / 127.5}, 1 / 127.5), ({"do_rescale": False}, 1.0)):
        recipe = read(tmp_path, VIT | {"size": {"height": 8, "width": 8}} | change)
        np.testing.assert_allclose(image.prepare(value, recipe), (200 * factor - 0.5) / 0.5, rtol=1e-5)


@pytest.mark.parametrize("change, message", [
    ({"do_center_crop": False}, "crops nothing"), ({"resample": 9}, "filter must be one of"),
    ({"image_std": [1, 2]}, "expected three numbers"), ({"image_std": [0, 1, 1]}, "std above 0"),
    ({"crop_size": {"height": 2, "width": 3}}, "crop_size is .*expected one side"),
    ({"image_mean": "x"}, "mean or std"),
    ({"crop_size": -4}, "size must be a positive"), ({"rescale_factor": 0}, "rescale_factor is 0"),
    ({"size": {"shortest_edge": "a"}}, "short must be a positive"), ({"image_std": [1, "a", 1]}, "could not convert"),
    ({"do_resize": False, "do_center_crop": False}, "neither resizes nor crops"), ({"resample": [3]}, "filter"),
])
def test_what_cannot_be_done_is_refused_with_the_file(change, message, tmp_path):
    with pytest.raises(FormatError, match=f"preprocessor_config.json: .*{message}"):
        read(tmp_path, BIT | change)
    (tmp_path / "preprocessor_config.json").write_text("[1]")
    with pytest.raises(FormatError, match="preprocessor_config.json: holds a list"):
        read_preprocessing(tmp_path, {}, "vit", 224)


def test_without_a_file_the_family_has_its_habit(tmp_path):
    assert read_preprocessing(tmp_path, {}, "vjepa2", 256).resized == 292
    assert read_preprocessing(tmp_path, {}, "timm", 224).resized == 248
    assert usual(64) == Preprocessing(64)


@pytest.mark.parametrize("recipe", [Preprocessing(), DINO, usual(224, "timm"), usual(256, "vjepa2"),
                                    Preprocessing(8, resize="none"), Preprocessing(8, short=12)])
def test_a_recipe_written_is_the_recipe_read(recipe, tmp_path):
    found = read(tmp_path, preprocessor_settings(recipe), family="xura", size=5)
    assert preprocessor_settings(found) == preprocessor_settings(recipe)
    picture = np.random.default_rng(0).integers(0, 256, (20, 31, 3), dtype=np.uint8)
    np.testing.assert_array_equal(image.prepare(picture, found), image.prepare(picture, recipe))


def test_a_crop_larger_than_the_picture_is_framed_in_black():
    white = Image.new("RGB", (4, 6), "white")
    framed = np.asarray(image.fit(white, Preprocessing(8, resize="none")))
    assert framed.shape == (8, 8, 3) and framed[1:7, 2:6].min() == 255 and framed.sum() == 255 * 3 * 24


def test_sides_are_rounded_down_exactly():
    """Integers all the way: 100 × 230 / 100 is 230, whatever floating point thinks."""
    for short, long in ((100, 230), (49, 98), (3, 29)):
        size = image.fit(Image.new("RGB", (long, short)), Preprocessing(short, resize="crop", short=short)).size
        assert size == (short, short)
    assert image.fit(Image.new("RGB", (300, 200)), DINO).size == (224, 224)


@pytest.mark.parametrize("card, expected", [
    ("---\nlicense: apache-2.0\ntags: [x]\n---\n# A model\nlicense: no\n", "apache-2.0"),
    ("---\r\ntags:\r\n- vision\r\nlicense: 'cc-by-nc-4.0' # note\r\n---\r\n", "cc-by-nc-4.0"),
    ("---\nlicense: other\nlicense_name: dinov3-license\n---\n", "other dinov3-license"),
    ("# A model\nlicense: mit\n", None), ("---\nlicense:\n- mit\n---\n", None), ("", None)])
def test_the_licence_of_a_model_card(card, expected, tmp_path):
    (tmp_path / "README.md").write_bytes(card.encode())
    assert read_licence(tmp_path, {}) == expected
    assert read_licence(tmp_path, {"license": "mit"}) == expected or expected is None


def test_inspect_prints_the_licence(tmp_path, capsys):
    VisionTransformer(VitConfig(image_size=8, patch_size=4, d_model=12, depth=1, n_heads=2)).save_pretrained(tmp_path)
    main(["inspect", str(tmp_path), "--summary"])
    assert "licence" not in capsys.readouterr().out
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    main(["inspect", str(tmp_path), "--summary"])
    assert "licence: mit" in capsys.readouterr().out
    main(["inspect", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out)["licence"] == "mit"
