"""Text that grows token by token: whole characters only, and an end at a stop string."""

import codecs

from xuracore.errors import ConfigError


class TextStream:
    """Text as ids come: ``push(id)`` returns what can be shown, ``finish()`` the rest.

    A character whose bytes lie in two tokens is shown with the second; what may be the beginning of a
    stop string is held back until that is decided.  All pieces together are the decoded text, cut before
    the first stop string.

    tokenizer : has ``token_bytes(id)``.
    stop : strings; when one is complete, :attr:`stopped` is True and nothing more is shown.
    """

    def __init__(self, tokenizer, stop=()):
        self.stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(word, str) and word for word in self.stop):
            raise ConfigError(f"stop strings are {self.stop!r}; expected strings that are not empty")
        self.stopped = False
        self._bytes_of = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, token_id):
        """The text that one more token completes; often empty."""
        return self._show(self._decoder.decode(self._bytes_of(int(token_id))), final=False)

    def finish(self):
        """What was held back; a character that never became whole is U+FFFD."""
        return self._show(self._decoder.decode(b"", final=True), final=True)

    def _show(self, new, final):
        if self.stopped:
            return ""
        text = self._held + new
        found = [at for at in (text.find(word) for word in self.stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if final else max((_overlap(text, word) for word in self.stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text, word):
    """Length of the longest end of ``text`` with which ``word`` begins."""
    for length in range(min(len(word) - 1, len(text)), 0, -1):
        if text.endswith(word[:length]):
            return length
    return 0
