"""The laws of the Y-Encoder: unit vectors that padding and neighbours do not change."""

import numpy as np
import pytest

import xuracore as xc
from xuracore.errors import ConfigError, DTypeError, ShapeError
from xuravljepa.text import TextEncoder, TextEncoderConfig
from xuravljepa.tokenizer import EOS, PAD

CONFIG = TextEncoderConfig(d_model=16, n_layers=2, d_state=8, headdim=8, max_length=20, embed_dim=6)
TEXTS = ["yes", "a large circle", "3", "", "blau-grün"]


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder(CONFIG, rng=np.random.default_rng(0))


def test_embeddings_have_unit_length_and_differ(encoder):
    vectors = encoder.encode(TEXTS).data
    assert vectors.shape == (5, 6) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    cosines = vectors @ vectors.T - 2 * np.eye(5)
    assert cosines.max() < 0.999


def test_a_text_is_its_bytes_then_eos(encoder):
    np.testing.assert_array_equal(encoder.tokens(["ab", ""]), [[97, 98, EOS], [EOS, PAD, PAD]])


@pytest.mark.parametrize("extra", [1, 9])
def test_padding_never_changes_an_embedding(encoder, extra):
    ids = encoder.tokens(TEXTS)
    padded = np.concatenate([ids, np.full((5, extra), PAD)], axis=1)
    np.testing.assert_allclose(encoder(padded).data, encoder(ids).data, atol=1e-5)


def test_neighbours_and_their_order_never_change_an_embedding(encoder):
    together, order = encoder.encode(TEXTS).data, [3, 0, 4, 2, 1]
    np.testing.assert_allclose(encoder.encode([TEXTS[i] for i in order]).data, together[order], atol=1e-5)
    for text, vector in zip(TEXTS, together):
        np.testing.assert_allclose(encoder.encode([text]).data[0], vector, atol=1e-5)


def test_padding_gets_no_gradient():
    encoder = TextEncoder(CONFIG, rng=np.random.default_rng(1))
    (encoder.encode(["yes", "no way"]) * np.ones(6)).sum().backward()
    used = {*b"yes", *b"no way", EOS}
    rows = np.abs(encoder.embedding.weight.grad).max(axis=1)
    assert {int(i) for i in np.flatnonzero(rows)} == used and PAD not in used


def test_gradients_in_float64():
    encoder = TextEncoder(CONFIG.replace(n_layers=1, d_model=8, d_state=4), rng=np.random.default_rng(0))
    encoder.to_dtype(np.float64)
    ids = encoder.tokens(["ab", "c"])

    def encode(table, projection):
        encoder.embedding.__dict__["weight"] = table
        encoder.projection.__dict__["weight"] = projection
        return encoder(ids)

    weights = [encoder.embedding.weight.data, encoder.projection.weight.data]
    assert xc.gradcheck(encode, weights, directions=3)


def test_what_cannot_be_encoded_is_named(encoder):
    encoder.encode(["x" * 19])
    with pytest.raises(ShapeError, match="needs 20 tokens .* the limit is 19"):
        encoder.encode(["fine", "x" * 20])
    with pytest.raises(ShapeError, match="no texts"):
        encoder.encode([])
    with pytest.raises(DTypeError, match="expected a string to encode, got int"):
        encoder.encode([3])
    for changes, message in (({"d_state": 0}, "d_state is 0"), ({"vocab_size": 10}, "vocab_size is 10")):
        with pytest.raises(ConfigError, match=message):
            CONFIG.replace(**changes)
