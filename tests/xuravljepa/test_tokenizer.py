"""Bytes in, bytes out, and never a silent cut."""
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from xuracore.errors import DTypeError, ShapeError
from xuravljepa import tokenizer
from xuravljepa.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


def test_special_ids_are_the_contract():
    ids = [getattr(tokenizer, name) for name in tokenizer.SPECIAL_NAMES]
    assert ids == list(range(256, 264)) and ByteTokenizer.vocabulary_size == 264
    assert (tokenizer.PAD, tokenizer.EOS, tokenizer.READ) == (256, 258, 262)


@settings(max_examples=25, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_text_survives_the_round_trip(text):
    for special in (False, True):
        ids = TOKENIZER.encode(text, add_special=special)
        assert ids.dtype == np.int64 and TOKENIZER.decode(ids) == text


def test_special_tokens_frame_the_text_and_vanish_in_decoding():
    ids = TOKENIZER.encode("red", add_special=True)
    assert ids.tolist() == [tokenizer.BOS, *b"red", tokenizer.EOS]
    assert TOKENIZER.decode([tokenizer.TOOL, *b"17", tokenizer.SEP]) == "17"
    assert TOKENIZER.decode([*b"17", tokenizer.EOS, *b"garbage"]) == "17"


def test_a_batch_is_padded_on_the_right():
    ids = TOKENIZER.encode_batch(["red", "blue"], length=6)
    assert ids.tolist() == [[*b"red", 256, 256, 256], [*b"blue", 256, 256]]
    assert TOKENIZER.encode_batch(["a", "bcd"]).shape == (2, 3)
    assert TOKENIZER.encode_batch([]).shape == (0, 0)
    assert [TOKENIZER.decode(row) for row in ids] == ["red", "blue"]


def test_a_text_over_the_limit_is_an_error_that_names_text_length_and_limit():
    assert len(TOKENIZER.encode("triangle", max_length=8)) == 8
    with pytest.raises(ShapeError, match="10 tokens.*limit is 9.*'triangle'"):
        TOKENIZER.encode("triangle", max_length=9, add_special=True)
    with pytest.raises(ShapeError, match="limit is 3"):
        TOKENIZER.encode("ééé", max_length=3)            # six bytes
    with pytest.raises(ShapeError, match=r"xxx\.\.\."):
        TOKENIZER.encode("x" * 10_000, max_length=9)


def test_half_a_surrogate_pair_becomes_a_question_mark():
    assert TOKENIZER.decode(TOKENIZER.encode("a\ud800b")) == "a?b"


def test_broken_utf8_decodes_to_the_replacement_character():
    assert TOKENIZER.decode([0xC3, 0x28]) == "\ufffd("


def test_nonsense_is_refused():
    with pytest.raises(DTypeError, match="bytes"):
        TOKENIZER.encode(b"red")
    with pytest.raises(DTypeError, match="264"):
        TOKENIZER.decode([264])
    with pytest.raises(DTypeError, match="float"):
        TOKENIZER.decode([1.5])
    with pytest.raises(ShapeError, match=r"\(1, 2\)"):
        TOKENIZER.decode([[1, 2]])
