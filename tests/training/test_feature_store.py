"""A frozen encoder runs once: what a run has encoded, the next one finds on disk."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from training import options
from training.data import arguments
from training.data.dataset import Dataset
from training.data.scenes import render
from training.phases import jepa
from training.phases.common import FeatureStore, rows_at_once, some_tokens
from training.scripts import train_jepa
from xuracore import io
from xuracore.errors import ConfigError
from xuravljepa.decoder import DecoderConfig
from xuravljepa.image import IMAGENET_MEAN, IMAGENET_STD
from xuravljepa.model import VLJEPA
from xuravljepa.predictor import PredictorConfig
from xuravljepa.presets import VLJEPAConfig
from xuravljepa.text import TextEncoderConfig
from xuravljepa.vit import VisionTransformer, VitConfig

ROWS = Dataset.scenes("train", 6, types=("shape",)).rows


def model():
    predictor = PredictorConfig(d_model=16, n_layers=1, d_state=8, headdim=8, vision_dim=12, query_dim=8, embed_dim=8,
                                n_visual=17, n_salient=8, n_read=1, max_query=32)
    text = TextEncoderConfig(d_model=16, n_layers=1, d_state=8, headdim=8, max_length=32, embed_dim=8)
    decoder = DecoderConfig(d_model=16, n_layers=1, d_state=8, headdim=8, prefix_length=2, max_length=16, embed_dim=8)
    vision = VitConfig(image_size=16, patch_size=4, d_model=12, depth=1, n_heads=2)
    return VLJEPA(VLJEPAConfig(vision, predictor, text, decoder, ("circle", "square", "triangle")))


def counted(encoder):
    """A list that grows by the size of each batch that the encoder reads."""
    seen = []
    encoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    return seen


def test_the_second_epoch_and_the_second_run_do_not_run_the_encoder(tmp_path):
    ours = model()
    seen = counted(ours.x_encoder)
    features = FeatureStore(ours, ROWS, batch_size=4, cache=tmp_path)
    assert seen == [4, 2]
    batches = jepa.QuestionBatches(ours, ROWS, features, 3, turns=1, tool_share=0)
    epochs = [[batches.batch(step)["turns"][0]["visual"] for step in range(i, i + len(batches))] for i in (0, 2)]
    assert len(epochs[1]) == 2 and seen == [4, 2]
    again = FeatureStore(ours, ROWS, cache=tmp_path)
    assert seen == [4, 2]
    plain = FeatureStore(ours, ROWS)  # batches of another size: the same numbers to half precision
    np.testing.assert_allclose(again(ROWS), plain(ROWS), rtol=2**-9, atol=1e-4)
    np.testing.assert_array_equal(again(ROWS), features(ROWS))


def test_ranks_share_the_encoding_and_with_a_cache_one_does_it_for_all(tmp_path, on_ranks):
    ours = model()
    alone, seen = FeatureStore(ours, ROWS, batch_size=4)(ROWS), counted(ours.x_encoder)
    stores = on_ranks(2, lambda ranks: FeatureStore(ours, ROWS, batch_size=4, ranks=ranks)(ROWS))
    assert seen == [2, 2, 1, 1]
    stores += on_ranks(2, lambda ranks: FeatureStore(ours, ROWS, batch_size=4, cache=tmp_path, ranks=ranks)(ROWS))
    assert seen == [2, 2, 1, 1, 4, 2]
    for tokens in stores:
        np.testing.assert_allclose(tokens, alone, rtol=2**-9, atol=1e-4)


def test_a_run_that_was_killed_goes_on_and_equal_pictures_are_one(tmp_path):
    ours = model()
    seen = counted(ours.x_encoder)

    def killed(done, total, seconds):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FeatureStore(ours, ROWS, batch_size=4, report=killed, cache=tmp_path)
    before = sum(seen)
    FeatureStore(ours, ROWS, batch_size=4, cache=tmp_path)
    assert before == 4 and sum(seen) == 6
    ours.x_encoder.norm.bias.data += 1  # another encoder
    FeatureStore(ours, ROWS, cache=tmp_path)
    assert sum(seen) == 12


def dinov2_folder(folder):
    """An encoder with registers whose table is for 24 pixels, while its pictures have 16."""
    config = VitConfig(image_size=24, patch_size=4, d_model=12, depth=1, n_heads=2, registers=2, layer_scale=True)
    VisionTransformer(config).save_pretrained(folder)
    io.save_json(folder / "preprocessor_config.json", {
        "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 18}, "crop_size": 16, "resample": 2,
        "do_center_crop": True, "image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)})
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")


def test_a_foreign_encoder_brings_its_sizes_and_its_preprocessing(tmp_path):
    dinov2_folder(tmp_path)
    encoder = VisionTransformer.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"use encoder.at_size\(16\)"):
        VLJEPAConfig.tiny().with_encoder(encoder)
    config = VLJEPAConfig.tiny().with_encoder(encoder.at_size(16))
    assert config.preprocessing == encoder.preprocessing and config.predictor.n_visual == 1 + 2 + 16
    assert VLJEPAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_training_on_a_foreign_encoder_twice_encodes_once(tmp_path, capsys, monkeypatch):
    """By the script, on a manifest: the second run finds all tokens, and says whose weights they are."""
    dinov2_folder(tmp_path / "vit")
    (tmp_path / "data").mkdir()
    with open(tmp_path / "data" / "manifest.jsonl", "w") as file:
        for i, row in enumerate(ROWS):
            Image.fromarray(render(row.image)).save(tmp_path / "data" / f"{i}.png")
            file.write(json.dumps({"id": str(i), "image": f"{i}.png", "query": row.query, "answer": row.answer}) + "\n")
    calls = []
    tokens = VLJEPA.visual_tokens
    monkeypatch.setattr(VLJEPA, "visual_tokens", lambda self, pixels: calls.append(len(pixels)) or tokens(self, pixels))
    for run, seen in (("a", [6]), ("b", [6])):
        train_jepa.main(["--vit", str(tmp_path / "vit"), "--data-dir", str(tmp_path / "data"), "--steps", "1",
                         "--batch-size", "2", "--turns", "1", "--output-dir", str(tmp_path / run),
                         "--feature-cache", str(tmp_path / "cache")])
        assert calls == seen
        assert "licence: apache-2.0" in capsys.readouterr().err
    loaded = VLJEPA.from_pretrained(tmp_path / "a" / "model")
    assert loaded.pixels(render(ROWS[0].image)).shape == (1, 3, 16, 16)
    assert loaded.config.mean == IMAGENET_MEAN and loaded.config.short == 18


def test_a_large_encoders_tokens_are_kept_for_all_phases(tmp_path, monkeypatch, capsys, threads_of_its_own):
    monkeypatch.setattr(arguments, "LARGE", 0)
    run = ["--scenes", "3", "--steps", "1", "--batch-size", "2", "--turns", "1", "--threads", "1"]
    assert train_jepa.main([*run, "--output-dir", str(tmp_path / "a")]) == 0
    assert f"tokens are kept in {tmp_path / 'features'}" in capsys.readouterr().err
    encode, computed = VLJEPA.visual_tokens, []
    monkeypatch.setattr(VLJEPA, "visual_tokens", lambda *args: computed.append(args) or encode(*args))
    assert train_jepa.main([*run, "--output-dir", str(tmp_path / "b"), "--quiet"]) == 0
    assert not computed
    assert train_jepa.main([*run, "--output-dir", str(tmp_path / "c"), "--quiet", "--feature-cache", "none"]) == 0
    assert computed and {path.name for path in tmp_path.iterdir()} == {"a", "b", "c", "features"}


def test_statistics_and_readings_take_what_memory_holds():
    assert len(some_tokens(np.zeros((3000, 65, 96), np.float16))) == 2000
    assert len(some_tokens(np.broadcast_to(np.float16(0), (3000, 197, 1024)))) == 166
    tiny, base = (SimpleNamespace(config=VLJEPAConfig.preset(name)) for name in ("tiny", "base"))
    assert rows_at_once(tiny) == 256 and rows_at_once(base) == 20


def test_slow_work_says_how_long_it_takes(capsys, monkeypatch):
    clock = iter([0.0, 20.0, 40.0, 41.0, 80.0])
    monkeypatch.setattr(options, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    report = options.counter(SimpleNamespace(quiet=False), "pictures encoded")
    for done in (10, 20, 21, 40):
        report(done, 40)
    assert capsys.readouterr().err.splitlines() == ["pictures encoded 20/40, 40s left", "pictures encoded 40"]
    assert options.counter(SimpleNamespace(quiet=True), "x") is None
