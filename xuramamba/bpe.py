"""Byte-level byte-pair encoding (GPT-2, GPT-NeoX, Llama-3): text to ids and back, without loss.

Text is cut at added tokens, normalised, cut into words by a pattern; the bytes of a word are written in
GPT-2's alphabet of 256 printable characters, and neighbours are merged, the pair that was learned first
before all others (Sennrich et al. 2016, arXiv 1508.07909).
"""

import heapq
import re
import unicodedata
from typing import NamedTuple

import numpy as np

from xuracore.errors import ConfigError, DTypeError, FormatError, ShapeError
from xuramamba import text_pattern
from xuramamba.text_stream import TextStream

MAXIMUM_ID = 2**31 - 1
CACHED_WORDS, CACHED_LENGTH = 2**16, 64


def _alphabet():
    """GPT-2's character for each byte: itself where it is printable, otherwise one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


ALPHABET = _alphabet()
_BYTE_OF = {character: byte for byte, character in ALPHABET.items()}


class AddedToken(NamedTuple):
    """A piece of text that is one token wherever it stands."""

    id: int
    content: str
    special: bool = False  # left out of decoded text where that is asked for
    single_word: bool = False  # not inside a word
    lstrip: bool = False  # takes the blanks before it
    rstrip: bool = False  # takes the blanks behind it
    normalized: bool = False  # looked for after normalisation


def byte_level(add_prefix_space=False, pattern=text_pattern.GPT2):
    """A step that cuts by ``pattern`` (None: does not cut) and writes bytes in GPT-2's alphabet."""
    split = (lambda text: [text]) if pattern is None else text_pattern.compiled(pattern)

    def step(pieces):
        for text in pieces:
            if add_prefix_space and not text.startswith(" "):
                text = " " + text
            for piece in split(text):
                yield piece.encode("utf-8", errors="replace").decode("latin-1").translate(ALPHABET)

    return step


def cut(pattern):
    """A step that cuts by ``pattern``."""
    split = text_pattern.compiled(pattern)
    return lambda pieces: (piece for text in pieces for piece in split(text))


class ByteLevelBPE:
    """A vocabulary with its merges.

    vocabulary : {token in GPT-2's alphabet: id}; ids may have gaps.
    merges : (left, right) tokens, the first learned first; their join must be a token.
    added_tokens : :class:`AddedToken` each.
    steps : from text to words in GPT-2's alphabet, see :func:`byte_level` and :func:`cut`.
    normalization : "NFC" or another form of unicodedata.normalize, or None.
    ignore_merges : a word that is a token is taken whole, whatever the merges make of it.
    template : ids before and ids behind a text, put there with ``add_special``.

    Raises FormatError for a vocabulary or merges that contradict each other.
    """

    def __init__(
        self, vocabulary, merges, added_tokens=(), *, steps=None, normalization=None, ignore_merges=False,
        unknown=None, template=((), ()), path=None,
    ):  # fmt: skip
        self._steps = [byte_level()] if steps is None else list(steps)
        self._normalization, self._ignore_merges = normalization, ignore_merges
        self.template = tuple(map(tuple, template))
        self.added_tokens = tuple(added_tokens)
        self._ids = dict(vocabulary)
        self._bytes = {}
        for token, token_id in self._ids.items():
            _check_id(token_id, token, path)
            if token_id in self._bytes:
                raise FormatError(f"shares id {token_id} with another token", path, token)
            self._bytes[token_id] = _token_bytes(token)
        for token in self.added_tokens:
            _check_id(token.id, token.content, path)
            if not token.content:
                raise FormatError("an added token is empty", path)
            self._bytes[token.id] = token.content.encode("utf-8", errors="replace")
        self._special = {token.id for token in self.added_tokens if token.special}
        self._merges = self._ranked(merges, path)
        if unknown is not None and unknown not in self._ids:
            raise FormatError("the token of what is unknown is not in the vocabulary", path, unknown)
        self._unknown = self._ids.get(unknown)
        self._raw_tokens = _finder(token for token in self.added_tokens if not token.normalized)
        self._normal_tokens = _finder(
            token._replace(content=self._normalize(token.content))
            for token in self.added_tokens if token.normalized
        )  # fmt: skip
        self._cache = {}

    def _ranked(self, merges, path):
        """{(left id, right id): (rank, id of both)}."""
        ranked = {}
        for rank, (left, right) in enumerate(merges):
            try:
                pair, whole = (self._ids[left], self._ids[right]), self._ids[left + right]
            except KeyError as error:
                raise FormatError(f"merge {rank} needs the token {error}, which is not there", path) from None
            ranked.setdefault(pair, (rank, whole))
        return ranked

    @property
    def vocabulary_size(self):
        """The largest id and one: what a model's table must have at least."""
        return max(self._bytes, default=-1) + 1

    def __len__(self):
        return len(self._bytes)

    def id_of(self, token):
        """The id of an added token or of a token in GPT-2's alphabet, or None."""
        found = [added.id for added in self.added_tokens if added.content == token]
        return found[0] if found else self._ids.get(token)

    # ------------------------------------------------------------------ text to ids
    def encode(self, text, max_length=None, add_special=False):
        """Ids of a text, int64 (length,); with ``add_special``, the template's ids around them.

        Half a surrogate pair becomes "?".  Raises DTypeError when ``text`` is not a string, ShapeError
        when the ids would be more than ``max_length``: no text is cut in silence.
        """
        if not isinstance(text, str):
            raise DTypeError(f"expected a string to encode, got {type(text).__name__}")
        ids = list(self.template[0]) if add_special else []
        for piece, added in _cut_out(text, *self._raw_tokens):
            if added is not None:
                ids.append(added)
                continue
            for part, added in _cut_out(self._normalize(piece), *self._normal_tokens):
                if added is not None:
                    ids.append(added)
                else:
                    self._encode_plain(part, ids)
        if add_special:
            ids += self.template[1]
        if max_length is not None and len(ids) > max_length:
            shown = text if len(text) <= 60 else text[:57] + "..."
            raise ShapeError(
                f"the text needs {len(ids)} tokens, the limit is {max_length}: {shown!r}; shorten it or "
                "raise the limit"
            )
        return np.array(ids, np.int64)

    def _normalize(self, text):
        return unicodedata.normalize(self._normalization, text) if self._normalization else text

    def _encode_plain(self, text, ids):
        words = [text]
        for step in self._steps:
            words = step(words)
        cache = self._cache
        for word in words:
            known = cache.get(word)
            if known is None:
                known = self._encode_word(word)
                if len(word) <= CACHED_LENGTH:
                    if len(cache) >= CACHED_WORDS:
                        cache.clear()
                    cache[word] = known
            ids += known

    def _encode_word(self, word):
        """Ids of one word: merges by a queue of (rank, place), so that long words take n log n."""
        if self._ignore_merges and word in self._ids:
            return [self._ids[word]]
        ids = [self._ids.get(character, self._unknown) for character in word]
        if None in ids:
            byte = _BYTE_OF[word[ids.index(None)]]
            raise ConfigError(f"the vocabulary has no token for the byte {byte:#04x}, nor one for the unknown")
        after = [*range(1, len(ids)), -1]
        before = [*range(-1, len(ids) - 1)]
        queue, merges = [], self._merges
        for place, pair in enumerate(zip(ids, ids[1:])):
            if pair in merges:
                queue.append((merges[pair][0], place, pair))
        heapq.heapify(queue)
        while queue:
            _, left, pair = heapq.heappop(queue)
            right = after[left]
            if right < 0 or (ids[left], ids[right]) != pair:  # one of them was merged meanwhile
                continue
            ids[left], ids[right] = merges[pair][1], None
            after[left], behind = after[right], after[right]
            after[right] = -1
            if behind >= 0:
                before[behind] = left
            for first, second in ((before[left], left), (left, behind)):
                if first >= 0 and second >= 0:
                    pair = ids[first], ids[second]
                    if pair in merges:
                        heapq.heappush(queue, (merges[pair][0], first, pair))
        return [token for token in ids if token is not None]

    # ------------------------------------------------------------------ ids to text
    def token_bytes(self, token_id):
        """The bytes of UTF-8 that a token stands for; DTypeError for an id that no token has."""
        known = self._bytes.get(token_id)
        if known is None:
            raise DTypeError(f"no token has the id {token_id}; ids go up to {self.vocabulary_size - 1}")
        return known

    def decode(self, ids, skip_special=False):
        """The text of a sequence of ids; bytes that are not UTF-8 become U+FFFD.

        skip_special leaves out tokens such as <|endoftext|>.
        Raises ShapeError for ids that are not one row, DTypeError for ids that no token has.
        """
        ids = np.asarray(ids)
        if ids.ndim != 1:
            raise ShapeError(f"expected one row of ids, got shape {ids.shape}")
        if ids.size and ids.dtype.kind not in "iu":
            raise DTypeError(f"ids must be integers, got {ids.dtype}")
        skipped = self._special if skip_special else ()
        raw = b"".join(self.token_bytes(i) for i in ids.tolist() if i not in skipped)
        return raw.decode("utf-8", errors="replace")

    def stream(self, stop=()):
        """A :class:`~xuramamba.text_stream.TextStream`: text as its ids come, one by one."""
        return TextStream(self, stop)


def _check_id(token_id, token, path):
    if type(token_id) is not int or not 0 <= token_id <= MAXIMUM_ID:
        raise FormatError(f"its id is {token_id!r:.40}; expected a whole number", path, str(token)[:80])


def _token_bytes(token):
    """The bytes of a token; one that is not written in the alphabet is taken as it is."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode("utf-8", errors="replace")


def _finder(tokens):
    """(compiled alternatives, the longest first; {content: token}), or (None, {})."""
    by_content = {token.content: token for token in tokens}
    longest_first = sorted(by_content, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if by_content else None, by_content


_WORD_CHARACTER = re.compile(r"\w")


def _cut_out(text, finder, tokens):
    """(piece, None) for text between added tokens, (content, id) for these; nothing empty."""
    end = 0
    for match in finder.finditer(text) if finder else ():
        token, start, stop = tokens[match.group()], match.start(), match.end()
        if token.single_word and (
            start and _WORD_CHARACTER.match(text[start - 1]) or _WORD_CHARACTER.match(text[stop : stop + 1])
        ):
            continue
        if token.lstrip:
            start = max(end, len(text[:start].rstrip()))
        if token.rstrip:
            stop = len(text) - len(text[stop:].lstrip())
        if start > end:
            yield text[end:start], None
        yield text[start:stop], token.id
        end = stop
    if end < len(text):
        yield text[end:], None
