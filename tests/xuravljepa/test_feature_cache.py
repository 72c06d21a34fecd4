"""Tokens on disk: found by content, kept across runs and crashes, computed again where the disk lied."""

import numpy as np
import pytest

from xuracore.errors import ConfigError, DTypeError, ShapeError
from xuravljepa.feature_cache import FeatureCache, fingerprint, picture_digest
from xuravljepa.image import Preprocessing
from xuravljepa.vit import VisionTransformer, VitConfig

ENCODER = VisionTransformer(VitConfig(image_size=8, patch_size=4, d_model=12, depth=1, n_heads=2))
RECIPE = Preprocessing(8)
DIGESTS = [bytes([i]) * 32 for i in range(6)]
TOKENS = np.random.default_rng(0).standard_normal((6, 5, 12)).astype(np.float32)


def opened(folder, encoder=ENCODER, recipe=RECIPE):
    return FeatureCache(folder, encoder, recipe)


def filled(folder):
    cache = opened(folder)
    cache.add(DIGESTS[:4], TOKENS[:4])
    return cache


def test_what_was_added_is_there_in_another_run(tmp_path):
    filled(tmp_path)
    cache = opened(tmp_path)
    assert len(cache) == 4 and cache.missing([DIGESTS[5], *DIGESTS, DIGESTS[5]]) == [DIGESTS[5], DIGESTS[4]]
    tokens = cache.tokens([DIGESTS[3], DIGESTS[0], DIGESTS[3]])
    assert tokens.shape == (3, 5, 12) and len(tokens) == 3 and tokens.dtype == tokens[0].dtype == np.float16
    np.testing.assert_array_equal(tokens[:], TOKENS[[3, 0, 3]].astype(np.float16))
    np.testing.assert_array_equal(tokens[[1, 2]], TOKENS[[0, 3]].astype(np.float16))
    np.testing.assert_array_equal(tokens[1], TOKENS[0].astype(np.float16))
    with pytest.raises(ConfigError, match="is not in the cache"):
        cache.tokens([DIGESTS[5]])


def test_the_tokens_are_a_map_and_not_a_copy(tmp_path):
    tokens = filled(tmp_path).tokens(DIGESTS[:4])
    assert isinstance(tokens._map, np.memmap) and not tokens._map.flags.writeable


def test_another_encoder_or_preprocessing_is_another_cache(tmp_path):
    filled(tmp_path)
    other = VisionTransformer(ENCODER.config, rng=np.random.default_rng(9))
    assert len(opened(tmp_path, other)) == len(opened(tmp_path, recipe=Preprocessing(8, resize="crop"))) == 0
    eps = VisionTransformer(ENCODER.config.replace(norm_eps=1e-5))
    eps.load_state_dict(ENCODER.state_dict())
    assert len({fingerprint(e, RECIPE) for e in (ENCODER, other, eps)}) == 3
    assert len(opened(tmp_path)) == 4


@pytest.mark.parametrize("file, at", [("tokens.f16", 2 * 120 + 7), ("index.bin", 2 * 48 + 40), ("index.bin", 2 * 48)])
def test_a_damaged_entry_is_missing_and_repaired(file, at, tmp_path):
    """A flipped bit in the tokens, in their digest, or in the picture's: only that entry is computed again."""
    path = filled(tmp_path).path
    content = bytearray((path / file).read_bytes())
    content[at] ^= 4
    (path / file).write_bytes(content)
    cache = opened(tmp_path)
    assert cache.missing(DIGESTS[:4]) == [DIGESTS[2]]
    cache.add([DIGESTS[2]], TOKENS[2:3])
    for again in (cache, opened(tmp_path)):
        assert again.missing(DIGESTS[:4]) == []
        np.testing.assert_array_equal(again.tokens(DIGESTS[:4])[:], TOKENS[:4].astype(np.float16))


@pytest.mark.parametrize("file, lost", [("tokens.f16", 1), ("tokens.f16", 130), ("index.bin", 3), ("index.bin", 60)])
def test_a_file_cut_short_keeps_its_whole_entries(file, lost, tmp_path):
    path = filled(tmp_path).path
    content = (path / file).read_bytes()
    (path / file).write_bytes(content[:-lost])
    cache = opened(tmp_path)
    kept = 3 if lost <= 120 and (file, lost) != ("index.bin", 60) else 2
    assert cache.missing(DIGESTS[:4]) == DIGESTS[kept:4]
    cache.add(DIGESTS[kept:], TOKENS[kept:])
    np.testing.assert_array_equal(opened(tmp_path).tokens(DIGESTS)[:], TOKENS.astype(np.float16))


def test_two_runs_share_a_folder(tmp_path):
    first, second = opened(tmp_path), opened(tmp_path)
    first.add(DIGESTS[:2], TOKENS[:2])
    second.add(DIGESTS[1:4], TOKENS[1:4])  # one of them is there already
    first.add(DIGESTS[4:], TOKENS[4:])
    assert len(first) == len(opened(tmp_path)) == 6
    for cache in (first, second, opened(tmp_path)):
        np.testing.assert_array_equal(cache.tokens(DIGESTS)[:], TOKENS.astype(np.float16))


def test_what_cannot_be_kept_is_named(tmp_path):
    cache = opened(tmp_path)
    with pytest.raises(ShapeError, match=r"tokens are \(1, 4, 12\); expected \(1, 5, 12\)"):
        cache.add(DIGESTS[:1], TOKENS[:1, :4])
    with pytest.raises(DTypeError, match="do not fit float16"):
        cache.add(DIGESTS[:1], TOKENS[:1] * 1e6)
    with pytest.raises(DTypeError, match="a path or an array, got int"):
        picture_digest(7)


def test_pictures_are_known_by_their_bytes(tmp_path):
    picture = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert picture_digest(picture) == picture_digest(picture.copy()) != picture_digest(picture[::-1])
    assert picture_digest(picture) != picture_digest(picture.reshape(1, 4, 3))
    for name in "ab":
        (tmp_path / name).write_bytes(b"the same bytes")
    assert picture_digest(tmp_path / "a") == picture_digest(str(tmp_path / "b"))
