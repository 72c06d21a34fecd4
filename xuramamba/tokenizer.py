"""Tokenizers from files: ``tokenizer.json`` of byte-level BPE, read here; other kinds by an extra."""

from pathlib import Path

import numpy as np

from xuracore import io
from xuracore.errors import ConfigError, DTypeError, FormatError, MissingExtraError, ShapeError
from xuramamba.bpe import AddedToken, ByteLevelBPE, byte_level, cut
from xuramamba.byte_tokenizer import ByteTokenizer
from xuramamba.text_stream import TextStream

__all__ = ["AddedToken", "ByteLevelBPE", "ByteTokenizer", "ExternalTokenizer", "load_tokenizer", "read_tokenizer"]

MAXIMUM_BYTES = 64 * 2**20


class UnknownKindError(ConfigError):
    """A tokenizer.json that is whole, and of a kind that only the ``tokenizers`` package reads."""


def load_tokenizer(path):
    """The tokenizer of a model folder, or of a ``tokenizer.json``.

    Byte-level BPE is read here, from tokenizer.json or from vocab.json with merges.txt; every other
    kind by the package ``tokenizers``, with the same methods.
    Raises FormatError for a damaged file or a folder without tokenizer, MissingExtraError when another
    kind is met and the package is not installed.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "tokenizer.json").is_file() and (path / "vocab.json").is_file():
            return _read_pair(path / "vocab.json", path / "merges.txt")
        path = path / "tokenizer.json"
        if not path.is_file():
            raise FormatError("holds no tokenizer.json", path.parent)
    try:
        return read_tokenizer(path)
    except UnknownKindError as error:
        try:
            return ExternalTokenizer(path)
        except MissingExtraError as missing:
            raise missing from error


def read_tokenizer(path):
    """A :class:`ByteLevelBPE` from ``tokenizer.json``.

    Raises FormatError for what is damaged, ConfigError that names the part for another kind of tokenizer.
    """
    data = io.load_json(path, maximum_bytes=MAXIMUM_BYTES)
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise FormatError("is not a tokenizer.json: it has no object 'model'", path)
    model = data["model"]
    _check_model(model)
    steps, written = [], False
    for step in _flat(data.get("pre_tokenizer"), "pretokenizers"):
        steps.append(_step(step))
        written |= step["type"] == "ByteLevel"
    _support(written, "pre_tokenizer is not of the byte level")
    decoder = data.get("decoder")
    _support(decoder is None or decoder.get("type") == "ByteLevel", "decoder is not of the byte level")
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, dict):
        raise FormatError("model.vocab is not an object", path)
    return ByteLevelBPE(
        vocabulary, _merges(model.get("merges"), path), _added(data.get("added_tokens") or [], path),
        steps=steps, normalization=_normalization(data.get("normalizer")),
        ignore_merges=bool(model.get("ignore_merges")), unknown=model.get("unk_token"),
        template=_template(data.get("post_processor"), path), path=path,
    )  # fmt: skip


def _support(condition, reason):
    if not condition:
        raise UnknownKindError(f"tokenizer.json: {reason}; byte-level BPE is read here")


def _check_model(model):
    kind = model.get("type", "BPE" if "merges" in model else None)
    _support(kind == "BPE", f"the model is {kind!r}")
    _support(not model.get("byte_fallback"), "BPE falls back to bytes (SentencePiece)")
    _support(not model.get("dropout"), "BPE drops merges at random")
    for affix in ("continuing_subword_prefix", "end_of_word_suffix"):
        _support(not model.get(affix), f"BPE has a {affix}")


def _flat(node, inner):
    """The members of nested Sequences, in order."""
    if node is None:
        return []
    kind = node.get("type") if isinstance(node, dict) else None
    _support(kind is not None, f"{inner[:-1]} has no type")
    return [leaf for child in node.get(inner, ()) for leaf in _flat(child, inner)] if kind == "Sequence" else [node]


def _step(step):
    kind, behaviour = step["type"], step.get("behavior", "Isolated")
    if kind == "ByteLevel":
        pattern = {} if step.get("use_regex", True) else {"pattern": None}
        return byte_level(bool(step.get("add_prefix_space")), **pattern)
    if kind == "Digits":
        return cut(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
    if kind == "Punctuation" and behaviour in ("Isolated", "Contiguous"):
        return cut(r"[\p{P}$+<=>^`|~]" + "+" * (behaviour == "Contiguous"))
    pattern = step.get("pattern")
    pattern = pattern.get("Regex") if isinstance(pattern, dict) else None
    splits = kind == "Split" and behaviour == "Isolated" and not step.get("invert") and isinstance(pattern, str)
    _support(splits, f"pre_tokenizer {kind!r} ({behaviour})")
    try:
        return cut(pattern)
    except ConfigError as error:
        raise UnknownKindError(str(error)) from None


def _normalization(node):
    forms = [leaf["type"] for leaf in _flat(node, "normalizers")]
    _support(len(forms) <= 1 and set(forms) <= {"NFC", "NFD", "NFKC", "NFKD"}, f"normalizer {forms}")
    return forms[0] if forms else None


def _merges(merges, path):
    """Pairs, from ``"left right"`` or ``["left", "right"]``."""
    if not isinstance(merges, list):
        raise FormatError("model.merges is not a list", path)
    pairs = []
    for i, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise FormatError(f"merge {i} is not a pair of tokens", path)
        pairs.append(pair)
    return pairs


def _added(tokens, path):
    result = []
    for token in tokens:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise FormatError("an added token has no content", path)
        options = {name: bool(token.get(name)) for name in AddedToken._fields[2:]}
        result.append(AddedToken(token.get("id"), token["content"], **options))
    return result


def _template(node, path):
    """Ids before and ids behind a text."""
    before, behind, seen = [], [], False
    for leaf in _flat(node, "processors"):
        if leaf["type"] == "ByteLevel":
            continue
        _support(leaf["type"] == "TemplateProcessing", f"post_processor {leaf['type']!r}")
        try:
            for part in leaf["single"]:
                if "Sequence" in part:
                    seen = True
                else:
                    ids = leaf["special_tokens"][part["SpecialToken"]["id"]]["ids"]
                    (behind if seen else before).extend(map(int, ids))
        except (KeyError, TypeError, ValueError):
            raise FormatError("its template is not understood", path, "post_processor") from None
    return before, behind


def _read_pair(vocabulary_path, merges_path):
    """GPT-2's older files: vocab.json, and merges.txt with a pair a line."""
    vocabulary = io.load_json(vocabulary_path, maximum_bytes=MAXIMUM_BYTES)
    if not isinstance(vocabulary, dict):
        raise FormatError("is not an object", vocabulary_path)
    with open(merges_path, "rb") as file:
        raw = file.read(MAXIMUM_BYTES + 1)
    try:
        lines = raw.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        raise FormatError("is not UTF-8 text", merges_path) from None
    lines = [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]
    special = [AddedToken(vocabulary[word], word, special=True) for word in ("<|endoftext|>",) if word in vocabulary]
    return ByteLevelBPE(vocabulary, _merges(lines, merges_path), special, path=merges_path)


class ExternalTokenizer:
    """Any other ``tokenizer.json``, by the package ``tokenizers``; the methods are those of ByteLevelBPE.

    Raises MissingExtraError when the package is not installed, FormatError when it refuses the file.
    """

    def __init__(self, path):
        try:
            import tokenizers
        except ImportError:
            raise MissingExtraError("tokenizers", "tokenizers") from None
        try:
            self._inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises plain Exception
            raise FormatError(f"is not read by tokenizers: {str(error)[:200]}", path) from None

    @property
    def vocabulary_size(self):
        """The largest id and one."""
        return max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def id_of(self, token):
        """The id of a token, or None."""
        return self._inner.token_to_id(token)

    def encode(self, text, max_length=None, add_special=False):
        """As :meth:`ByteLevelBPE.encode`."""
        if not isinstance(text, str):
            raise DTypeError(f"expected a string to encode, got {type(text).__name__}")
        ids = self._inner.encode(text, add_special_tokens=add_special).ids
        if max_length is not None and len(ids) > max_length:
            raise ShapeError(f"the text needs {len(ids)} tokens, the limit is {max_length}")
        return np.array(ids, np.int64)

    def decode(self, ids, skip_special=False):
        """As :meth:`ByteLevelBPE.decode`."""
        return self._inner.decode(np.asarray(ids).tolist(), skip_special_tokens=skip_special)

    def stream(self, stop=()):
        """As :meth:`ByteLevelBPE.stream`."""
        return TextStream(_Growing(self), stop)


class _Growing:
    """Bytes of each further token, for decoders that look at the neighbours of a token."""

    def __init__(self, tokenizer):
        self._decode, self._ids, self._shown = tokenizer.decode, [], 0

    def token_bytes(self, token_id):
        self._ids.append(token_id)
        before, text = self._decode(self._ids[: self._shown]), self._decode(self._ids)
        if text.endswith("\ufffd"):  # not yet whole: it comes with the next token
            return b""
        self._ids = self._ids[self._shown :]  # what was shown last stays, as the neighbour of what comes
        self._shown = len(self._ids)
        return text[len(before) :].encode("utf-8", errors="replace")
