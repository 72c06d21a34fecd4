"""The laws of the Y-Decoder: causal, the same step by step, and within its allowed texts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import xuracore as xc
from training import optim
from xuracore import ops
from xuracore.errors import ConfigError, ShapeError
from xuravljepa.decoder import Decoder, DecoderConfig
from xuravljepa.predictor import Sight
from xuravljepa.tokenizer import BOS, EOS, PAD, ByteTokenizer, pad_rows

CONFIG = DecoderConfig(d_model=16, n_layers=2, d_state=8, headdim=8, prefix_length=3, max_length=12,
                       embed_dim=6)


def decoder(seed=0):
    return Decoder(CONFIG, rng=np.random.default_rng(seed))


def tokens(texts):
    return pad_rows([[BOS, *ByteTokenizer().encode(text), EOS] for text in texts])


def embeddings(count, seed=1):
    x = np.random.default_rng(seed).standard_normal((count, 6)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


# ---------------------------------------------------------------------- forward
@xc.no_grad()
def test_step_by_step_is_forward():
    model, embedding, ids = decoder(), embeddings(2), tokens(["circle", "square"])
    together = model(embedding, ids).data
    _, states = model._run(model.prefix(embedding), None)
    for t in range(ids.shape[1]):
        h, states = model._run(model.token_embedding(ids[:, t : t + 1]), states)
        np.testing.assert_allclose(model._logits(h).data[:, 0], together[:, t], atol=2e-5)


def test_later_tokens_do_not_change_earlier_logits():
    model, embedding, ids = decoder(), embeddings(1), tokens(["circle"])
    other = ids.copy()
    other[:, 4:] = ord("x")
    first, second = model(embedding, ids).data, model(embedding, other).data
    np.testing.assert_allclose(first[:, :4], second[:, :4], atol=1e-6)
    assert abs(first[:, 4:] - second[:, 4:]).max() > 1e-3


def test_logits_depend_on_the_embedding():
    model, ids = decoder(), tokens(["yes"])
    assert abs(model(embeddings(1), ids).data - model(embeddings(1, seed=2), ids).data).max() > 1e-3


def test_the_loss_is_the_mean_over_real_tokens():
    model, embedding, texts = decoder(), embeddings(3), ["yes", "circle", ""]
    ids = tokens(texts)
    loss = model.loss(embedding, ids).item()
    padded = np.concatenate([ids, np.full((3, 4), PAD)], axis=1)
    assert model.loss(embedding, padded).item() == pytest.approx(loss, rel=1e-5)
    total = 0.0
    for i, text in enumerate(texts):
        total += model.loss(embedding[i : i + 1], tokens([text])).item() * (len(text) + 1)
    assert total / sum(len(text) + 1 for text in texts) == pytest.approx(loss, rel=1e-5)
    assert loss == pytest.approx(np.log(264), rel=0.2)  # untrained: near indifference


def test_head_and_embedding_are_one_table():
    model = decoder()
    names = [name for name, p in model.named_parameters() if p.shape == (264, 16)]
    assert names == ["token_embedding.weight"]
    model.loss(embeddings(1), tokens(["yes"])).backward()
    assert np.abs(model.token_embedding.weight.grad).max(axis=1).all()  # the head reaches every row


# ---------------------------------------------------------------------- generation
@given(
    st.lists(st.text("abcé", max_size=5), min_size=1, max_size=6), st.integers(0, 5), st.integers(0, 3),
)
def test_constrained_decoding_yields_allowed_texts_only(allowed, seed, weights):
    text, score = decoder(weights).generate(embeddings(1, seed)[0], allowed=allowed)
    assert text in allowed and score < 0


def test_constrained_decoding_follows_the_most_likely_branch():
    """The first letter decides; the score is the mean log-probability of the tokens taken, EOS included."""
    model, embedding = decoder(), embeddings(1)
    text, score = model.generate(embedding, allowed=["left", "right"])
    logits = ops.log_softmax(model(embedding, tokens([text])), axis=-1).data[0]
    first = {"left": logits[0, ord("l")], "right": logits[0, ord("r")]}
    assert text == max(first, key=first.get)
    path = [*text.encode(), EOS]
    assert score == pytest.approx(np.mean([logits[t, token] for t, token in enumerate(path)]), abs=1e-4)


def test_free_decoding_takes_the_likeliest_byte_and_stops_in_time():
    model, embedding = decoder(), embeddings(1)
    text, _ = model.generate(embedding)
    assert len(text.encode()) <= CONFIG.max_length - 1
    loud = np.zeros((1, 1, 264))
    loud[..., [PAD, BOS, ord("a")]] = 100, 90, 50  # special tokens are not text, however likely
    model._logits = lambda h: xc.Tensor(loud)
    assert model.generate(embedding)[0] == "a" * (CONFIG.max_length - 1)
    assert model.generate(embedding, max_length=4)[0] == "aaa"
    loud[..., EOS] = 60
    assert model.generate(embedding)[0] == ""


@given(st.integers(0, 5), st.integers(0, 3), st.integers(1, 3))
def test_enough_beams_find_the_likeliest_of_the_allowed_texts(seed, weights, letters):
    allowed = [a + b for a in "abc"[:letters] for b in ("", "x", "yz")]
    model, embedding = decoder(weights), embeddings(1, seed)[0]
    text, score = model.generate(embedding, allowed=allowed, beams=9)
    found = model.log_probability(embedding, allowed)
    assert text == allowed[found.argmax()] and score * (len(text) + 1) == pytest.approx(found.max(), abs=1e-4)
    assert model.log_probability(embedding, [model.generate(embedding, allowed=allowed)[0]]) <= found.max() + 1e-6


def test_all_at_once_is_one_by_one():
    model, given = decoder(), embeddings(5)
    model.token_embedding.weight.data[EOS] += 0.3  # so that some end early
    assert model.write(given) == [model.generate(x)[0] for x in given]
    assert model.write(given, max_length=4) == [model.generate(x, max_length=4)[0] for x in given]


def test_the_probability_of_a_text_is_that_of_its_bytes_and_the_end():
    model, embedding, texts = decoder(), embeddings(1), ["left", "right", ""]
    found = model.log_probability(embedding[0], texts)
    for text, value in zip(texts, found):
        chosen, score = model.generate(embedding, allowed=[text])
        assert chosen == text and value == pytest.approx(score * (len(text) + 1), abs=1e-4)
    with pytest.raises(ShapeError, match="no texts"):
        model.log_probability(embedding, [])


def test_a_tensor_an_array_and_a_row_are_one_embedding():
    model, embedding = decoder(), embeddings(1)
    forms = embedding, embedding[0], xc.Tensor(embedding), list(embedding[0])
    answers = {model.generate(x)[0] for x in forms}
    assert len(answers) == 1
    assert model.generate(embedding.astype(np.float64))[0] in answers


def test_it_learns_to_say_what_it_was_told():
    model, embedding, texts = decoder(), embeddings(4), ["circle", "yes", "17", "left"]
    optimizer = optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        loss = model.loss(embedding, tokens(texts))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1
    assert [model.generate(x)[0] for x in embedding] == texts
    assert [model.generate(x, allowed=["no", *texts])[0] for x in embedding] == texts


def test_what_cannot_be_generated_is_named():
    model, embedding = decoder(), embeddings(1)
    assert model.generate(embedding, allowed=["x" * 10])[0] == "x" * 10
    with pytest.raises(ShapeError, match="needs 11 tokens .* the limit is 10"):
        model.generate(embedding, allowed=["fine", "x" * 11])
    with pytest.raises(ShapeError, match="no texts are allowed"):
        model.generate(embedding, allowed=[])
    with pytest.raises(ShapeError, match="max_length is 1"):
        model.generate(embedding, max_length=1)
    with pytest.raises(ShapeError, match="beams is 0"):
        model.generate(embedding, beams=0)
    with pytest.raises(ShapeError, match="linear"):
        model.generate(np.ones(5, np.float32))
    for changes, message in (
        ({"prefix_length": 0}, "prefix_length is 0"), ({"max_length": 1}, "max_length is 1"),
        ({"vocab_size": 256}, "vocab_size is 256"),
    ):
        with pytest.raises(ConfigError, match=message):
            CONFIG.replace(**changes)


# ---------------------------------------------------------------------- looking at the picture
SEEING = CONFIG.replace(look_dim=5, look_places=10)


def sights(count, seed=2):
    rng = np.random.default_rng(seed)
    return Sight(rng.standard_normal((count, 4, 5)).astype(np.float32), rng.integers(0, 10, (count, 4)))


def looking(seed=0):
    """A decoder whose looks add something."""
    model, rng = Decoder(SEEING, rng=np.random.default_rng(seed)), np.random.default_rng(seed + 9)
    for look in model.looks:
        look.attention.out_proj.weight.data[:] = rng.standard_normal((16, 16))
    return model


@xc.no_grad()
def test_at_first_and_without_a_picture_nothing_is_added():
    model, ids = Decoder(SEEING, rng=np.random.default_rng(0)), tokens(["circle", "no"])
    bare = model(embeddings(2), ids).data
    np.testing.assert_array_equal(model(embeddings(2), ids, sights(2)).data, bare)
    model = looking()
    bare, seen = model(embeddings(2), ids).data, model(embeddings(2), ids, sights(2)).data
    assert abs(seen - bare).max() > 1e-2
    moved = Sight(sights(2).tokens, sights(2).places[:, ::-1])
    assert abs(model(embeddings(2), ids, moved).data - seen).max() > 1e-3  # places count
    assert np.isfinite(model(embeddings(2), ids, moved._replace(places=None)).data).all()


@xc.no_grad()
def test_every_way_to_write_looks_at_its_own_picture():
    model, given, pictures = looking(), embeddings(3), sights(3)
    said = model.write(given, sight=pictures)
    for i, text in enumerate(said):
        own = Sight(pictures.tokens[i : i + 1], pictures.places[i : i + 1])
        assert model.generate(given[i], sight=own)[0] == text
        allowed = ["circle", "square", "yes"]
        scores = model.log_probability(given[i], allowed, own)
        ids = model.tokens(allowed[:1])
        expected = xc.ops.log_softmax(model(given[i : i + 1], ids[:, :-1], own), axis=-1).data[0]
        assert scores[0] == pytest.approx(expected[np.arange(len(ids[0]) - 1), ids[0, 1:]].sum(), rel=1e-4)
        assert model.generate(given[i], allowed=allowed, sight=own, beams=9)[0] == allowed[int(scores.argmax())]


def test_the_place_of_a_token_is_learned_and_the_gradient_reaches_the_look():
    model = looking()
    model.loss(embeddings(2), tokens(["yes", "no"]), sight=sights(2)).backward()
    assert all(np.abs(p.grad).max() > 0 for name, p in model.named_parameters() if name.startswith("look"))


def test_sizes_of_a_look_are_checked():
    with pytest.raises(ConfigError, match="look_dim is -1"):
        CONFIG.replace(look_dim=-1)
    with pytest.raises(ConfigError, match="not a multiple of 3 heads"):
        DecoderConfig(d_model=16, expand=3, headdim=16, look_dim=4, look_places=4)
