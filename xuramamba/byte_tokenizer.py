"""Text as bytes: no vocabulary to train, no word it cannot spell.

Ids 0–255 are the bytes of UTF-8; the special tokens follow, and ``UNUSED`` pads the table to a multiple of
eight rows.
"""

import numpy as np

from xuracore.errors import DTypeError, ShapeError
from xuramamba.text_stream import TextStream

PAD, BOS, EOS, SEP, IMG, TOOL, READ, UNUSED = range(256, 264)
VOCABULARY_SIZE = 264
SPECIAL_NAMES = ("PAD", "BOS", "EOS", "SEP", "IMG", "TOOL", "READ", "UNUSED")


def pad_rows(rows, width=None):
    """Lists of ids → int64 (len(rows), width), padded with PAD; width defaults to the longest."""
    width = max(map(len, rows), default=0) if width is None else width
    ids = np.full((len(rows), width), PAD, np.int64)
    for row, line in zip(rows, ids):
        line[: len(row)] = row
    return ids


class ByteTokenizer:
    """Turns text into byte ids and back.

    >>> ByteTokenizer().encode("red").tolist()
    [114, 101, 100]
    """

    vocabulary_size = VOCABULARY_SIZE
    pad, bos, eos, sep, img, tool, read = PAD, BOS, EOS, SEP, IMG, TOOL, READ

    def encode(self, text, max_length=None, add_special=False):
        """Ids of a text, int64 (length,); with ``add_special``, BOS before and EOS after.

        Half a surrogate pair becomes "?".  Raises DTypeError when ``text`` is not
        a string, ShapeError when the ids would be more than ``max_length``: no text is cut in silence.
        """
        if not isinstance(text, str):
            raise DTypeError(f"expected a string to encode, got {type(text).__name__}")
        ids = list(text.encode("utf-8", errors="replace"))
        if add_special:
            ids = [BOS, *ids, EOS]
        if max_length is not None and len(ids) > max_length:
            shown = text if len(text) <= 60 else text[:57] + "..."
            extra = ", BOS and EOS" if add_special else ""
            raise ShapeError(
                f"the text needs {len(ids)} tokens (one per byte{extra}), the limit is "
                f"{max_length}: {shown!r}; shorten it or raise the limit"
            )
        return np.array(ids, np.int64)

    def encode_batch(self, texts, length=None, add_special=False):
        """Ids of several texts, int64 (count, length), padded on the right with PAD.

        ``length`` defaults to the longest text.  Raises as ``encode`` does.
        """
        return pad_rows([self.encode(text, length, add_special) for text in texts], length)

    def token_bytes(self, token_id):
        """The byte of an id, nothing for a special token."""
        return bytes([token_id]) if token_id < 256 else b""

    def stream(self, stop=()):
        """A :class:`~xuramamba.text_stream.TextStream`: text as its ids come, one by one."""
        return TextStream(self, stop)

    def decode(self, ids):
        """The text of a sequence of ids, up to the first EOS; other special tokens are left out.

        Bytes that are not UTF-8 become U+FFFD.  Raises ShapeError for ids that are not one row,
        DTypeError for ids outside the vocabulary.
        """
        ids = np.asarray(ids)
        if ids.ndim != 1:
            raise ShapeError(f"expected one row of ids, got shape {ids.shape}")
        if ids.size and (ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= VOCABULARY_SIZE):
            raise DTypeError(
                f"ids must be integers in 0..{VOCABULARY_SIZE - 1}, got {ids.dtype} "
                f"from {ids.min()} to {ids.max()}"
            )
        ends = np.flatnonzero(ids == EOS)
        if len(ends):
            ids = ids[: ends[0]]
        return bytes(ids[ids < 256].astype(np.uint8)).decode("utf-8", errors="replace")
