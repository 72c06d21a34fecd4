"""Generation: each prompt as if it were alone, states handed on, ends where it should."""

import signal

import numpy as np
import pytest

import xuracore as xc
from xuracore.errors import ConfigError, ShapeError
from xuramamba import LanguageModel, LanguageModelConfig
from xuramamba.bpe import ALPHABET, ByteLevelBPE
from xuramamba.byte_tokenizer import ByteTokenizer
from xuramamba.decode import Session
from xuramamba.generate import generate
from xuramamba.sampling import choose, filtered_probabilities, penalize_repetition

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6], [5, 3, 5], [8]]


@pytest.fixture(scope="module")
def model():
    fields = {"mamba1": {"d_state": 3}, "mamba3": {"d_state": 4, "headdim": 4}}
    config = LanguageModelConfig(13, 8, 2, mixer_fields=fields, layer_types=("mamba1", "mamba3"))
    model = LanguageModel(config, rng=np.random.default_rng(0))
    model.backbone.embedding.weight.data[:] = np.random.default_rng(1).standard_normal((13, 8))  # else it repeats
    return model


def alone(model, prompt, count, **options):
    return model.generate(np.array([prompt]), count, **options)[0]


# ------------------------------------------------------------------ prompts
def test_prompts_of_several_lengths_are_each_continued_as_if_alone(model):
    rows = model.generate(PROMPTS, 6)
    for row, prompt in zip(rows, PROMPTS, strict=True):
        np.testing.assert_array_equal(row, alone(model, prompt, 6))


def test_a_row_that_draws_from_its_own_generator_draws_what_it_would_alone(model):
    options = dict(temperature=1.3, top_k=9, top_p=0.95, repetition_penalty=1.2)
    rows = model.generate(PROMPTS, 6, rng=[np.random.default_rng(i) for i in range(4)], **options)
    for i, (row, prompt) in enumerate(zip(rows, PROMPTS)):
        np.testing.assert_array_equal(row, alone(model, prompt, 6, rng=i, **options))


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_a_prompt_is_read_in_pieces_of_any_size(model, chunk):
    seen = []
    out = model.generate(PROMPTS, 4, prefill_chunk=chunk, progress=lambda done, total: seen.append((done, total)))
    for row, whole in zip(out, model.generate(PROMPTS, 4)):
        np.testing.assert_array_equal(row, whole)
    assert seen[-1] == (12, 12) and sorted(seen) == seen


# ------------------------------------------------------------------ states
def test_a_state_goes_on_where_it_ended(model):
    first = model.generate(PROMPTS, 3, details=True)
    more = [[7, 7], [2], [11, 0, 1], [4]]
    second = model.generate(more, 3, state=first.state, details=True)
    for i in range(4):
        whole = alone(model, [*first.ids[i], *more[i]], 3)
        np.testing.assert_array_equal(second.ids[i], whole[-len(second.ids[i]) :])
    assert first.reasons == ("length",) * 4
    assert (first.prompt_tokens, first.new_tokens) == (12, 12) and first.decode_seconds > 0


def test_the_state_of_rows_that_ended_early_has_seen_their_text_and_no_more(model):
    free = model.generate(PROMPTS, 5)
    stop = int(free[1][6])  # the second new token of one row
    made = model.generate(PROMPTS, 5, stop=stop, details=True)
    assert "stop id" in made.reasons
    for i, row in enumerate(made.ids):
        np.testing.assert_array_equal(row, free[i][: len(row)])
        assert (row[len(PROMPTS[i]) :] == stop).sum() == (made.reasons[i] == "stop id")
        _, state = model(row[None])
        for mine, expected in zip(made.state, state):
            for a, b in zip(mine, expected):
                np.testing.assert_allclose(a.numpy()[i], b.numpy()[0], atol=1e-5)


def test_the_state_given_is_not_changed(model):
    state = model.generate([[1, 2]], 1, details=True).state
    before = [[part.numpy().copy() for part in layer] for layer in state]
    model.generate([[3]], 4, state=state)
    for layer, copies in zip(state, before):
        assert all((part.numpy() == copy).all() for part, copy in zip(layer, copies))


# ------------------------------------------------------------------ ends
def test_a_done_row_repeats_its_last_token_and_the_longest_goes_on(model):
    free = model.generate([[3, 1], [5, 3]], 8)
    stop = next(int(token) for token in free[0][2:] if token not in free[1][2:])
    end = 3 + free[0][2:].tolist().index(stop)
    out = model.generate([[3, 1], [5, 3]], 8, stop=[stop, 99])
    np.testing.assert_array_equal(out[1], free[1])
    assert (out[0][:end] == free[0][:end]).all() and (out[0][end:] == stop).all()
    np.testing.assert_array_equal(alone(model, [3, 1], 8, stop=stop), free[0][:end])


def test_the_models_own_end_counts_unless_none_is_wanted(model):
    free = alone(model, [3, 1], 6)
    config = model.config.replace(eos_token_ids=(int(free[3]),))
    again = LanguageModel(config)
    again.load_state_dict(model.state_dict())
    assert len(alone(again, [3, 1], 6)) == list(free[2:]).index(free[3]) + 3
    assert len(alone(again, [3, 1], 6, stop=())) == 8
    early = alone(again, [3, 1], 6, min_new_tokens=3)
    assert free[3] not in early[2:5]


def test_a_stop_string_ends_a_row_even_across_tokens(model):
    letters = {character: i for i, character in enumerate("abcdefghijklm")}
    tokenizer = ByteLevelBPE(letters, [])
    free = alone(model, [3, 1], 6)
    word = tokenizer.decode(free[3:5])
    made = model.generate([[3, 1]], 6, stop_strings=[word, "zzz"], tokenizer=tokenizer, details=True)
    text = tokenizer.decode(free[2:])
    assert made.reasons == ("stop string",) and len(made.ids[0]) == 2 + text.index(word) + len(word)
    assert all(character in ALPHABET.values() for character in letters)


def test_ctrl_c_returns_what_was_made_with_a_state_to_go_on_from(model):
    seen = []

    def stream(new):
        seen.append(new)
        if len(seen) == 3:
            raise KeyboardInterrupt

    made = model.generate([[3, 1]], 9, stream=stream, details=True)
    assert made.reasons == ("interrupted",) and made.ids.shape == (1, 5)
    rest = model.generate([[7]], 2, state=made.state)[0]
    np.testing.assert_array_equal(rest, alone(model, [*made.ids[0], 7], 2)[5:])


def test_ctrl_c_during_a_step_waits_for_its_end(model, monkeypatch, interruptible):
    step, seen = Session.step, []

    def interrupted(session, token_ids):
        seen.append(token_ids)
        if len(seen) == 2:
            signal.raise_signal(signal.SIGINT)
        return step(session, token_ids)

    monkeypatch.setattr(Session, "step", interrupted)
    made = model.generate([[3, 1]], 9, stop=(), details=True)
    assert made.reasons == ("interrupted",) and made.ids.shape == (1, 4) and len(seen) == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    rest = model.generate([[7]], 2, state=made.state)[0]
    np.testing.assert_array_equal(rest, alone(model, [*made.ids[0], 7], 2)[4:])


def test_no_new_tokens_is_the_prompt(model):
    made = model.generate([[3, 1]], 0, details=True)
    assert made.ids.tolist() == [[3, 1]] and made.new_tokens == 0
    rest = model.generate([[7]], 2, state=made.state)[0]
    np.testing.assert_array_equal(rest, alone(model, [3, 1, 7], 2)[2:])


def test_padding_of_the_vocabulary_is_never_chosen():
    config = LanguageModelConfig(5, 8, 1, "mamba1", {"d_state": 2}, pad_vocab_size_multiple=8)
    model = LanguageModel(config, rng=np.random.default_rng(0))
    with xc.no_grad():
        assert model(np.array([[1]]))[0].shape == (1, 1, 8)
    hidden = model.backbone(np.array([[1, 2]]))[0].numpy()[0, -1]
    model.backbone.embedding.weight.data[5:] = hidden * 100  # would win
    assert model.generate([[1, 2]], 5).max() < 5
    with pytest.raises(ShapeError, match="vocabulary has 5"):
        model(np.array([[5]]))


def test_impossible_requests_are_refused(model):
    for options in (
        {"max_new_tokens": -1}, {"min_new_tokens": -1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 2},
        {"repetition_penalty": 0}, {"stop_strings": ["x"]}, {"prefill_chunk": 0}, {"temperature": 1.0},
        {"temperature": 1.0, "rng": [np.random.default_rng(0)] * 3},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            generate(model, [[1, 2]], **options)
    for ids in (3, [], [[]], [[0.5]], [[1], 2], np.zeros((1, 1, 1), int)):
        with pytest.raises(ShapeError):
            generate(model, ids)


def test_bytes_generate_bytes(model):
    config = LanguageModelConfig(264, 8, 1, "mamba1", {"d_state": 2}, eos_token_ids=(258,))
    text = ByteTokenizer().encode("ab")
    assert LanguageModel(config).generate(text[None], 3).shape[1] <= 5


# ------------------------------------------------------------------ sampling
def test_equals_of_the_last_of_top_k_stay():
    logits = np.array([[1.0, 2.0, 1.0, 0.0]])
    np.testing.assert_allclose(filtered_probabilities(logits, top_k=2) > 0, [[True, True, True, False]])


def test_a_nucleus_is_the_same_however_much_is_sorted():
    logits = np.random.default_rng(0).standard_normal((1, 5000)) * 0.1  # flat: most of it is needed
    probability = filtered_probabilities(logits, top_p=0.9)
    full = filtered_probabilities(logits)
    ranked = np.sort(full[0])[::-1]
    assert (probability > 0).sum() == np.searchsorted(ranked.cumsum(), 0.9) + 1
    assert full[probability > 0].min() >= full[probability == 0].max()


def test_repetition_is_made_less_likely_on_both_sides_of_zero():
    logits = np.array([2.0, -2.0, 2.0])
    penalize_repetition(logits, np.array([0, 1]), 2.0)
    assert logits.tolist() == [1.0, -4.0, 2.0]


def test_logits_without_a_choice_are_refused():
    for row in ([np.nan, 1.0], [-np.inf, -np.inf]):
        for options in ({}, {"temperature": 1.0, "rng": np.random.default_rng(0)}):
            with pytest.raises(ConfigError, match="no token can be chosen"):
                choose(np.array([row]), **options)
