"""A picture that cannot be read costs its own rows, at their place in the data, and up to a limit nothing else."""

import json
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

from training.data.dataset import open_dataset
from training.phases.common import FeatureStore
from xuracore.errors import FormatError
from xuravljepa.decoder import DecoderConfig
from xuravljepa.model import VLJEPA
from xuravljepa.predictor import PredictorConfig
from xuravljepa.presets import VLJEPAConfig
from xuravljepa.text import TextEncoderConfig
from xuravljepa.vit import VitConfig

COUNT = 12


def model():
    sizes = {"d_model": 16, "n_layers": 1, "d_state": 8, "headdim": 8, "embed_dim": 8}
    return VLJEPA(VLJEPAConfig(VitConfig(image_size=16, patch_size=4, d_model=12, depth=1, n_heads=2),
                               PredictorConfig(**sizes, vision_dim=12, query_dim=8, n_visual=17, n_read=1),
                               TextEncoderConfig(**sizes), DecoderConfig(**sizes), ("cat", "dog")))


def bomb():
    """A PNG of a few bytes that says it has 100 million pixels."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures and two questions about each; four of the pictures are no good."""
    rng = np.random.default_rng(0)
    root = tmp_path / "data"
    root.mkdir()
    with open(root / "manifest.jsonl", "w") as file:
        for i in range(COUNT):
            Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(root / f"{i}.png")
            for query in ("what?", "which?"):
                file.write(json.dumps({"image": f"{i}.png", "query": query, "answer": "cat"}) + "\n")
    (root / "2.png").write_bytes((root / "2.png").read_bytes()[:300])
    (root / "3.png").write_bytes(b"no picture at all")
    (root / "4.png").write_bytes(bomb())
    (root / "5.png").write_bytes(b"")
    return root


WORDS = {2: "truncated", 3: "not a picture", 4: "100000000 pixels are more than the limit|DecompressionBomb",
         5: "not a picture"}


@pytest.mark.parametrize("cached", [False, True])
def test_bad_pictures_are_reported_by_line_and_left_out(folder, cached, tmp_path):
    data = open_dataset(folder, max_bad_fraction=0.5)
    store = FeatureStore(model(), data.rows, batch_size=4, bad=data.bad, cache=tmp_path / "c" if cached else None)
    kept = store.usable(data.rows)
    assert {int(row.image.stem) for row in kept} == set(range(COUNT)) - set(WORDS) and len(kept) == 2 * len(store.tokens)
    assert sorted((row.line - 1) // 2 for row in data.bad.rows) == sorted([*WORDS, *WORDS])
    for row in data.bad.rows:
        assert row.file == str(folder / "manifest.jsonl")
        assert any(word in row.reason for word in WORDS[(row.line - 1) // 2].split("|")), row
    alone = FeatureStore(model(), kept[:2])
    np.testing.assert_allclose(store(kept[:2]), alone(kept[:2]), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("cached", [False, True])
def test_more_than_was_allowed_stops_at_once(folder, cached, tmp_path):
    data = open_dataset(folder, max_bad_fraction=0.2)
    seen = []
    with pytest.raises(FormatError, match=r"6 of 24 rows are bad.*max_bad_fraction=0.2(.|\n)*manifest.jsonl:5: .*2.png"):
        FeatureStore(model(), data.rows, batch_size=2, bad=data.bad, report=lambda *a: seen.append(a),
                     cache=tmp_path / "c" if cached else None)
    assert len(seen) <= 2
    with pytest.raises(FormatError, match="2.png"):
        FeatureStore(model(), data.rows)


def test_the_number_of_threads_changes_nothing(folder):
    found = []
    for workers in (0, 1, 2, 4):
        data = open_dataset(folder, max_bad_fraction=0.5)
        store = FeatureStore(model(), data.rows, batch_size=3, bad=data.bad, workers=workers)
        found.append((store.tokens.tobytes(), data.bad.rows))
    assert all(one == found[0] for one in found)


def test_an_interruption_leaves_no_thread(folder):
    def interrupted(*_):
        raise KeyboardInterrupt

    data = open_dataset(folder, max_bad_fraction=0.5)
    with pytest.raises(KeyboardInterrupt):
        FeatureStore(model(), data.rows, batch_size=2, bad=data.bad, report=interrupted, workers=3)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_a_copy_of_a_bad_picture_is_bad_too(folder, tmp_path):
    (folder / "6.png").write_bytes((folder / "3.png").read_bytes())
    data = open_dataset(folder, max_bad_fraction=0.5)
    store = FeatureStore(model(), data.rows, bad=data.bad, cache=tmp_path / "c")
    assert {int(row.image.stem) for row in store.usable(data.rows)} == {0, 1, 7, 8, 9, 10, 11} and data.bad.count == 10
