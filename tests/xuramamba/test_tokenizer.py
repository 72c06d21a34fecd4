"""Byte-level BPE: the golden ids, no text lost, whole characters while streaming, nothing believed."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xuracore.errors import ConfigError, DTypeError, FormatError, MissingExtraError, ShapeError
from xuramamba import text_pattern
from xuramamba.bpe import ALPHABET, AddedToken, ByteLevelBPE, byte_level, cut
from xuramamba.byte_tokenizer import ByteTokenizer
from xuramamba.text_stream import TextStream
from xuramamba.tokenizer import load_tokenizer, read_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def golden(name):
    """(vocabulary, merges, texts, ids of each text)."""
    file = np.load(GOLDEN / f"{name}.npz")
    tokens, merges = (bytes(file[key]).decode().split("\n") for key in ("w.vocab_utf8", "w.merges_utf8"))
    vocabulary = dict(zip(filter(None, tokens), file["w.vocab_ids"].tolist()))
    raw, at, ids, id_at = (file[key] for key in ("in.text_utf8", "in.text_offsets", "out.ids", "out.id_offsets"))
    texts = [bytes(raw[i:j]).decode() for i, j in zip(at, at[1:])]
    return vocabulary, [line.split(" ") for line in merges if line], texts, np.split(ids, id_at[1:-1])


@pytest.fixture(scope="module")
def small():
    vocabulary, merges, _, _ = golden("bpe_small")
    return ByteLevelBPE(vocabulary, merges, [AddedToken(700, "<|endoftext|>", special=True)])


def document(**changes):
    """A tokenizer.json, as plain data, for the letters and two merges."""
    vocabulary = {character: i for i, character in enumerate(sorted(ALPHABET.values()))}
    vocabulary |= {"he": 256, "hel": 257}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocabulary, "merges": ["h e", ["he", "l"]], "dropout": None}
    return {
        "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": level,
        "post_processor": level, "decoder": level, "model": model,
    } | changes  # fmt: skip


def read(path, **changes):
    (path / "tokenizer.json").write_text(json.dumps(document(**changes)))
    return read_tokenizer(path / "tokenizer.json")


# ------------------------------------------------------------------ the golden ids
@pytest.mark.parametrize("name", ["bpe_gpt2_first6000", "bpe_small"])
def test_the_golden_ids(name):
    vocabulary, merges, texts, expected = golden(name)
    special = [AddedToken(700, "<|endoftext|>", special=True)] if name == "bpe_small" else []
    tokenizer = ByteLevelBPE(vocabulary, merges, special)
    for text, ids in zip(texts, expected, strict=True):
        np.testing.assert_array_equal(tokenizer.encode(text), ids, err_msg=repr(text))
        assert tokenizer.decode(ids) == text


def test_a_tokenizer_json_is_the_vocabulary_and_merges_in_it(tmp_path):
    vocabulary, merges, texts, expected = golden("bpe_small")
    added = [{"id": 700, "content": "<|endoftext|>", "special": True}]
    for written in (merges, [" ".join(pair) for pair in merges]):
        model = {"type": "BPE", "vocab": vocabulary, "merges": written}
        tokenizer = read(tmp_path, model=model, added_tokens=added)
        assert all(tokenizer.encode(text).tolist() == ids.tolist() for text, ids in zip(texts, expected))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (tmp_path / "old" / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    old = load_tokenizer(tmp_path / "old")
    assert old.encode(texts[0]).tolist() == expected[0].tolist()


# ------------------------------------------------------------------ laws
@given(anything)
def test_decoding_gives_the_text_back(small, text):
    ids = small.encode(text)
    assert ids.dtype == np.int64 and small.decode(ids) == text


@given(anything)
def test_streamed_text_is_the_decoded_text_in_whole_characters(small, text):
    stream, pieces = small.stream(), []
    for token in small.encode(text).tolist():
        pieces.append(stream.push(token))
        assert "\ufffd" not in pieces[-1] or "\ufffd" in text
    assert "".join([*pieces, stream.finish()]) == text


@given(st.lists(st.integers(0, 700), max_size=20))
def test_streaming_any_ids_is_decoding_them(small, ids):
    stream = small.stream()
    assert "".join([*map(stream.push, ids), stream.finish()]) == small.decode(ids)


@given(st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=3))
def test_a_stop_string_ends_the_stream_before_it(text, stop):
    stream = TextStream(ByteTokenizer(), stop)
    shown = "".join([*map(stream.push, text.encode()), stream.finish()])
    # The first to be complete counts; of two that are, the one that begins first.
    ends = [at for at in range(len(text) + 1) if any(text[:at].endswith(word) for word in stop)]
    if ends:
        whole = text[: ends[0]]
        assert stream.stopped and shown == whole[: min(whole.find(word) for word in stop if word in whole)]
    else:
        assert not stream.stopped and shown == text


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
@pytest.mark.parametrize("pattern", [text_pattern.GPT2, LLAMA3])
def test_a_pattern_cuts_and_loses_nothing(pattern, text):
    pieces = text_pattern.compiled(pattern)(text)
    assert "".join(pieces) == text and all(pieces)


def test_long_words_take_no_quadratic_time_and_merge_from_the_left(small):
    for text in ("e" * 50_001, " " * 50_000, "ab" * 25_000):
        assert small.decode(small.encode(text)) == text
    vocabulary = {character: i for i, character in enumerate(ALPHABET.values())} | {"aa": 300, "aaa": 301}
    tokenizer = ByteLevelBPE(vocabulary, [("a", "a"), ("aa", "a")])
    assert tokenizer.encode("aaaaa").tolist() == [300, 301]


# ------------------------------------------------------------------ cutting
def test_gpt2_cuts_words_numbers_marks_and_blanks():
    split = text_pattern.compiled(text_pattern.GPT2)
    assert split("Hello, I'm 42²  years\u2003old!\n\n ok") == [
        "Hello", ",", " I", "'m", " 42²", " ", " years", "\u2003", "old", "!", "\n\n", " ok"]  # fmt: skip
    assert split("naïve 漢字 ١٢ x\x1cy\x85") == ["naïve", " 漢字", " ١٢", " x", "\x1c", "y", "\x85"]


def test_llama3_cuts_numbers_by_three_and_takes_one_mark_with_a_word():
    split = text_pattern.compiled(LLAMA3)
    assert split("It'S 12345 (so)\r\n\n  x") == ["It", "'S", " ", "123", "45", " (", "so", ")\r\n\n", " ", " x"]


@pytest.mark.parametrize("pattern", ["(a+)+", r"\w+", "é", "[[:alpha:]]", r"\p{Zz}", "(", "a" * 1001, r"(?P<x>a)\1"])
def test_patterns_that_are_not_known_are_refused(pattern):
    with pytest.raises(ConfigError, match="pattern|category"):
        text_pattern.compiled(pattern)


def test_steps_follow_each_other():
    digits = [cut(r"\p{N}"), byte_level(add_prefix_space=True)]
    words = ["ab12"]
    for step in digits:
        words = list(step(words))
    assert words == ["Ġab", "Ġ1", "Ġ2"]


# ------------------------------------------------------------------ added tokens
def test_added_tokens_are_cut_out_first(tmp_path):
    added = [
        {"id": 300, "content": "<s>", "special": True}, {"id": 301, "content": "<s>x"},
        {"id": 302, "content": "[L]", "lstrip": True}, {"id": 303, "content": "[R]", "rstrip": True},
        {"id": 304, "content": "cat", "single_word": True}, {"id": 305, "content": "  ", "normalized": True},
    ]  # fmt: skip
    tokenizer = read(tmp_path, added_tokens=added, normalizer={"type": "NFC"})
    h, hel = tokenizer.id_of("h"), tokenizer.id_of("hel")
    assert tokenizer.encode("hel<s>xh").tolist() == [hel, 301, h]  # the longest
    assert tokenizer.encode("h \t[L] h").tolist() == [h, 302, tokenizer.id_of("Ġ"), h]
    assert tokenizer.encode("h[R]  h").tolist() == [h, 303, h]
    assert 304 not in tokenizer.encode("cats") and 304 in tokenizer.encode("a cat.")
    assert tokenizer.encode("h  h").tolist() == [h, 305, h]
    assert tokenizer.decode([300, h, 301], skip_special=True) == "h<s>x"
    assert tokenizer.encode("e\u0301").tolist() == tokenizer.encode("é").tolist()  # NFC
    assert tokenizer.vocabulary_size == 306 and tokenizer.id_of("<s>") == 300


def test_the_template_is_added_on_demand(tmp_path):
    template = {
        "type": "TemplateProcessing", "pair": [],
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [300], "tokens": ["<s>"]}},
    }  # fmt: skip
    both = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}
    tokenizer = read(tmp_path, post_processor=both, added_tokens=[{"id": 300, "content": "<s>"}])
    assert tokenizer.encode("h", add_special=True).tolist() == [300, *tokenizer.encode("h")]


def test_a_whole_word_comes_before_merges_where_they_are_ignored(tmp_path):
    model = document()["model"]
    model["vocab"]["lo"] = 258
    assert len(read(tmp_path, model=model).encode("lo")) == 2
    assert read(tmp_path, model=model | {"ignore_merges": True}).encode("lo").tolist() == [258]


# ------------------------------------------------------------------ what is refused
OTHER_KINDS = {
    "WordPiece": {"model": {"type": "WordPiece", "vocab": {}}},
    "falls back to bytes": {"model": {"type": "BPE", "vocab": {}, "merges": [], "byte_fallback": True}},
    "continuing_subword_prefix": {
        "model": {"type": "BPE", "vocab": {}, "merges": [], "continuing_subword_prefix": "##"}},
    "at random": {"model": {"type": "BPE", "vocab": {}, "merges": [], "dropout": 0.1}},
    "Metaspace": {"pre_tokenizer": {"type": "Metaspace"}},
    "not of the byte level": {"pre_tokenizer": None},
    "MergedWithPrevious": {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "MergedWithPrevious"}},
    "Lowercase": {"normalizer": {"type": "Lowercase"}},
    "BertProcessing": {"post_processor": {"type": "BertProcessing"}},
    "decoder": {"decoder": {"type": "WordPiece"}},
    "repeats a group": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "(a+)+"}, "behavior": "Isolated"}, {"type": "ByteLevel"}]}},
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_are_named_and_need_the_extra(tmp_path, kind, monkeypatch):
    with pytest.raises(ConfigError, match=kind):
        read(tmp_path, **OTHER_KINDS[kind])
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtraError, match=r"xura\[tokenizers\]"):
        load_tokenizer(tmp_path)


DAMAGED = {
    "no object 'model'": {"model": None},
    "vocab is not an object": {"model": {"type": "BPE", "vocab": [], "merges": []}},
    "merges is not a list": {"model": {"type": "BPE", "vocab": {}, "merges": None}},
    "not a pair": {"model": {"type": "BPE", "vocab": {}, "merges": ["a b c"]}},
    "merge 0 needs the token 'x'": {"model": {"type": "BPE", "vocab": {}, "merges": ["x y"]}},
    "shares id 0": {"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}},
    "its id is -1": {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
    "its id is 'x'": {"added_tokens": [{"content": "a", "id": "x"}]},
    "is empty": {"added_tokens": [{"content": "", "id": 1}]},
    "no content": {"added_tokens": [3]},
    "unknown is not in": {"model": {"type": "BPE", "vocab": {}, "merges": [], "unk_token": "?"}},
    "template": {"post_processor": {"type": "TemplateProcessing", "single": [{}]}},
}


@pytest.mark.parametrize("reason", DAMAGED)
def test_damaged_files_are_refused(tmp_path, reason):
    with pytest.raises(FormatError, match=reason):
        read(tmp_path, **DAMAGED[reason])
    with pytest.raises(FormatError, match="no tokenizer.json"):
        load_tokenizer(tmp_path / "..")


def test_nonsense_is_refused(small):
    with pytest.raises(DTypeError, match="expected a string"):
        small.encode(b"bytes")
    with pytest.raises(ShapeError, match="limit is 1"):
        small.encode("hello hello", max_length=1)
    with pytest.raises(DTypeError, match="no token has the id 9999"):
        small.decode([9999])
    with pytest.raises(DTypeError, match="integers"):
        small.decode([0.5])
    with pytest.raises(ShapeError, match="one row"):
        small.decode([[1]])
    with pytest.raises(ConfigError, match="stop strings"):
        small.stream([""])
    with pytest.raises(ConfigError, match="no token for the byte 0x61"):
        ByteLevelBPE({"b": 0}, []).encode("ba")
    assert ByteLevelBPE({"b": 0, "?": 1}, [], unknown="?").encode("ba").tolist() == [0, 1]
    assert small.decode(small.encode("a\ud800b")) == "a?b"


def test_bytes_stream_as_they_decode():
    tokenizer = ByteTokenizer()
    stream = tokenizer.stream()
    text = "".join([*map(stream.push, tokenizer.encode("héé", add_special=True)), stream.finish()])
    assert text == "héé"
    cutoff = tokenizer.stream()
    assert [cutoff.push(0xC3), cutoff.finish()] == ["", "\ufffd"]
