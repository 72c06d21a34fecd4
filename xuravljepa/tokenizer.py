"""The byte tokenizer of :mod:`xuramamba`, which can also give a text word by word."""
import re

from xuracore.errors import DTypeError, ShapeError
from xuramamba import byte_tokenizer
from xuramamba.byte_tokenizer import (
    BOS,
    EOS,
    IMG,
    PAD,
    READ,
    SEP,
    SPECIAL_NAMES,
    TOOL,
    UNUSED,
    VOCABULARY_SIZE,
    pad_rows,
)

__all__ = ["BOS", "EOS", "IMG", "PAD", "READ", "SEP", "SPECIAL_NAMES", "TOOL", "UNUSED", "VOCABULARY_SIZE",
           "WORD_BYTES", "ByteTokenizer", "pad_rows"]

WORD_BYTES = 12  # bytes of a word that become one token
_WORD = re.compile(r"\w+|[^\w\s]")


class ByteTokenizer(byte_tokenizer.ByteTokenizer):
    """Turns text into byte ids and back.

    >>> ByteTokenizer().encode("red").tolist()
    [114, 101, 100]
    """

    def words(self, text, max_words=None, width=WORD_BYTES):
        """The bytes of a text word by word, int64 (words, width), each row padded with PAD.

        A word is a run of letters and digits, or one other mark; blanks separate.  One longer than ``width``
        bytes takes several rows.  Raises DTypeError when ``text`` is not a string, ShapeError when there are
        more than ``max_words`` rows.
        """
        if not isinstance(text, str):
            raise DTypeError(f"expected a string to encode, got {type(text).__name__}")
        rows = []
        for word in _WORD.findall(text):
            ids = list(word.encode("utf-8", errors="replace"))
            rows += [ids[start:start + width] for start in range(0, len(ids), width)]
        if max_words is not None and len(rows) > max_words:
            shown = text if len(text) <= 60 else text[:57] + "..."
            raise ShapeError(f"the text has {len(rows)} words and marks, the limit is {max_words}: {shown!r}"
                             "; shorten it or raise the limit")
        return pad_rows(rows, width)
