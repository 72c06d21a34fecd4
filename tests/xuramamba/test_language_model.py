"""Blocks, stacks and language models: state passing, generation, files."""

import numpy as np
import pytest

import xuracore as xc
from xuracore.errors import ConfigError, ShapeError
from xuramamba import LanguageModel, LanguageModelConfig, Stack, StackConfig
from xuramamba.sampling import choose, filtered_probabilities

CONFIGS = {
    "mamba1": LanguageModelConfig(13, 8, 2, "mamba1", {"d_state": 3}),
    "mamba3": LanguageModelConfig(13, 8, 2, "mamba3", {"d_state": 4, "headdim": 4}),
    "with mlp": LanguageModelConfig(
        13, 8, 2, "mamba3", {"d_state": 4, "headdim": 4},
        d_intermediate=5, mlp_multiple_of=4, tie_embeddings=False,
    ),  # fmt: skip
}


def build(name):
    return LanguageModel(CONFIGS[name], rng=np.random.default_rng(0))


def tokens(batch=2, length=7):
    return np.random.default_rng(1).integers(0, 13, (batch, length))


@pytest.mark.parametrize("name", CONFIGS)
def test_token_by_token_gives_the_logits_of_the_whole(name):
    model, ids, state, pieces = build(name), tokens(), None, []
    with xc.no_grad():
        whole, _ = model(ids)
        for t in range(ids.shape[1]):
            logits, state = model(ids[:, t : t + 1], state)
            pieces.append(logits.numpy())
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole.numpy(), atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_gets_a_gradient(name):
    model, ids = build(name), tokens()
    logits, _ = model(ids[:, :-1])
    xc.ops.cross_entropy(logits.reshape(-1, 13), ids[:, 1:].reshape(-1)).backward()
    assert all(np.abs(parameter.grad).max() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_model_is_the_same_model(name, tmp_path):
    model, ids = build(name), tokens()
    model.save_pretrained(tmp_path / "model")
    again = LanguageModel.from_pretrained(tmp_path / "model")
    assert again.config == model.config
    with xc.no_grad():
        np.testing.assert_array_equal(again(ids)[0].numpy(), model(ids)[0].numpy())


def test_greedy_generation_is_the_argmax_of_the_whole_each_time():
    model, ids = build("mamba3"), tokens()
    out = model.generate(ids, max_new_tokens=4)
    assert out.shape == (2, 11) and (out[:, :7] == ids).all()
    for t in range(7, 11):
        with xc.no_grad():
            logits, _ = model(out[:, :t])
        assert (logits.numpy()[:, -1].argmax(-1) == out[:, t]).all()


def test_the_same_seed_draws_the_same_text():
    model, ids = build("mamba3"), tokens()
    one, two = (
        model.generate(ids, 8, temperature=1.5, top_k=6, top_p=0.9, rng=np.random.default_rng(5))
        for _ in range(2)
    )
    assert (one == two).all()


def test_generation_ends_at_the_stop_token_and_by_the_callback():
    model, ids = build("mamba3"), tokens(batch=1)
    first = int(model.generate(ids, 1)[0, -1])
    assert model.generate(ids, 9, stop=first).shape[1] == 8
    seen = []
    model.generate(ids, 9, stream=lambda new: seen.append(int(new[0])) or len(seen) == 3)
    assert len(seen) == 3


def test_sampling_frequencies_follow_the_probabilities():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]])).repeat(20_000, axis=0)
    drawn = choose(logits, 1.0, rng=np.random.default_rng(0))
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 20_000, [0.5, 0.3, 0.15, 0.05], atol=0.015)


def test_top_k_and_top_p_keep_the_best():
    logits = np.log(np.array([[0.15, 0.5, 0.05, 0.3]]))
    np.testing.assert_allclose(filtered_probabilities(logits, top_k=2), [[0, 0.625, 0, 0.375]])
    np.testing.assert_allclose(filtered_probabilities(logits, top_p=0.7), [[0, 0.625, 0, 0.375]])
    np.testing.assert_allclose(filtered_probabilities(logits, top_p=0.5), [[0, 1, 0, 0]])
    np.testing.assert_allclose(filtered_probabilities(logits, top_p=1.0).sum(), 1)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1}, {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 0}, {"temperature": 1.0, "top_p": 0},
    ],  # fmt: skip
)
def test_sampling_refuses_what_makes_no_sense(options):
    given = {"rng": np.random.default_rng(0)} if "top_k" in options or "top_p" in options else {}
    with pytest.raises(ConfigError):
        choose(np.zeros((1, 3)), **options, **given)


@pytest.mark.parametrize("ids", [[[13]], [[-1]], [[]], [1], [[0.5]]])
def test_impossible_tokens_are_refused(ids):
    with pytest.raises(ShapeError):
        build("mamba3")(np.array(ids))


def test_padding_is_skipped_through_the_whole_stack():
    stack = Stack(StackConfig(8, 2, mixer_fields={"d_state": 4, "headdim": 4}), rng=np.random.default_rng(0))
    x = np.random.default_rng(1).standard_normal((1, 5, 8)).astype(np.float32)
    padded = np.concatenate([x, np.full((1, 3, 8), 9, np.float32)], axis=1)
    with xc.no_grad():
        short, _ = stack(xc.Tensor(x))
        long, _ = stack(xc.Tensor(padded), mask=np.arange(8)[None] < 5)
    np.testing.assert_allclose(long.numpy()[:, :5], short.numpy(), atol=1e-6)


@pytest.mark.parametrize("fields", [{"mixer": "mamba9"}, {"n_layer": 0}, {"d_intermediate": -1}])
def test_impossible_stacks_are_refused(fields):
    with pytest.raises(ConfigError):
        StackConfig(**{"d_model": 8, "n_layer": 1, **fields})


@pytest.mark.parametrize("name", CONFIGS)
def test_results_do_not_depend_on_whether_a_tape_is_kept(name):
    model, ids = build(name), np.random.default_rng(2).integers(0, 13, (1, 90))
    taped, _ = model(ids)
    with xc.no_grad():
        plain, _ = model(ids)
    np.testing.assert_array_equal(plain.numpy(), taped.numpy())


def test_every_kind_of_layer_lives_in_one_model(tmp_path):
    fields = {"s4": {"d_state": 4}, "s4d": {"d_state": 4}, "mamba1": {"d_state": 3}}
    fields |= {"mamba2": {"d_state": 4, "headdim": 8}, "mamba3": {"d_state": 4, "headdim": 4}}
    config = LanguageModelConfig(13, 8, 5, layer_types=tuple(fields), mixer_fields=fields, d_intermediate=5)
    model, ids = LanguageModel(config, rng=np.random.default_rng(0)), tokens()
    with xc.no_grad():
        whole, _ = model(ids)
        state, pieces = model.initial_state(2), []
        for start, end in ((0, 3), (3, 4), (4, 7)):
            logits, state = model(ids[:, start:end], state)
            pieces.append(logits.numpy())
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole.numpy(), atol=1e-5)
    model.save_pretrained(tmp_path)
    again = LanguageModel.from_pretrained(tmp_path)
    with xc.no_grad():
        np.testing.assert_array_equal(again(ids)[0].numpy(), whole.numpy())
    out = model.generate([[1, 2], [3, 4, 5]], 4)
    np.testing.assert_array_equal(out[1], model.generate([[3, 4, 5]], 4)[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_and_padded_rows_are_the_rows_alone(name):
    model, rng = build(name), np.random.default_rng(3)
    rows = [rng.integers(0, 13, length) for length in (3, 1, 5)]
    with xc.no_grad():
        alone = [model(row[None])[0].numpy()[0] for row in rows]
        packed = model(np.concatenate(rows)[None], cu_seqlens=np.array([0, 3, 4, 9]))[0].numpy()[0]
        padded = np.stack([np.pad(row, (5 - len(row), 0)) for row in rows])
        mask = np.arange(5) >= 5 - np.array([[3], [1], [5]])
        left = model(padded, mask=mask)[0].numpy()
    np.testing.assert_allclose(packed, np.concatenate(alone), atol=1e-5)
    np.testing.assert_allclose(left[mask], np.concatenate(alone), atol=1e-5)
