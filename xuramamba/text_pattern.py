r"""Regular expressions with Unicode classes (``\p{L}``, ``\p{N}`` …), by Python's own ``re``.

A tokenizer cuts text by the general category of characters, which ``re`` does not know.  So the text is
first drawn in outline: ASCII stays, every other character becomes one that stands for its category.  Over
that alphabet of some 160 characters each Unicode class is a short list, the expression is an ordinary one,
and what it matches is cut from the text itself.
"""

import functools
import re
import unicodedata

from xuracore.errors import ConfigError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MAXIMUM_LENGTH = 1000

_CATEGORIES = (
    "Cc", "Cf", "Cn", "Co", "Cs", "Ll", "Lm", "Lo", "Lt", "Lu", "Mc", "Me", "Mn", "Nd", "Nl", "No",
    "Pc", "Pd", "Pe", "Pf", "Pi", "Po", "Ps", "Sc", "Sk", "Sm", "So", "Zl", "Zp", "Zs",
)  # fmt: skip
_STANDS_FOR = {category: chr(0xE000 + i) for i, category in enumerate(_CATEGORIES)}
_NEXT_LINE = chr(0xE000 + len(_CATEGORIES))  # U+0085 is a control character, and white space
_UNIVERSE = {chr(i): unicodedata.category(chr(i)) for i in range(128)}
_UNIVERSE |= {character: category for category, character in _STANDS_FOR.items()} | {_NEXT_LINE: "Cc"}
_SPACES = {"\t", "\n", "\v", "\f", "\r", " ", _NEXT_LINE, *(_STANDS_FOR[c] for c in ("Zs", "Zl", "Zp"))}
_ITEM = re.compile(r"\\([pP])\{(\^?)([A-Z][a-z]?)\}|\\(.)|(.)", re.DOTALL)
_REPEATED_GROUP = re.compile(r"(?<!\\)\)[*+{]")


class _Outline(dict):
    """str.translate's table, filled as characters come up."""

    def __missing__(self, code):
        if len(self) > 100_000:
            self.clear()
        if code < 128:
            character = chr(code)
        elif code == 0x85:
            character = _NEXT_LINE
        else:
            character = _STANDS_FOR[unicodedata.category(chr(code))]
        return self.setdefault(code, character)


_OUTLINE = _Outline()


@functools.lru_cache(64)
def compiled(pattern):
    """A function ``text → list of pieces``: what the pattern matches, and what lies between, in order.

    Raises ConfigError for an expression that ``re`` does not take, or whose time could explode.
    """
    matches = _expression(pattern).finditer

    def split(text):
        pieces, end = [], 0
        for match in matches(text if text.isascii() else text.translate(_OUTLINE)):
            if match.start() > end:
                pieces.append(text[end : match.start()])
            if match.end() > match.start():
                pieces.append(text[match.start() : match.end()])
            end = match.end()
        if end < len(text):
            pieces.append(text[end:])
        return pieces

    return split


def _expression(pattern):
    if len(pattern) > MAXIMUM_LENGTH or not pattern.isascii() or "[[" in pattern or "&&" in pattern:
        raise ConfigError(f"the pattern {pattern!r:.60} is too long, not ASCII, or uses nested classes")
    if _REPEATED_GROUP.search(pattern):
        raise ConfigError(f"the pattern {pattern!r:.60} repeats a group, whose time could explode")
    result, inside = [], False
    for match in _ITEM.finditer(pattern):
        kind, negated, category, escaped, plain = match.groups()
        if kind:
            result.append(_set(category, (kind == "P") != (negated == "^"), inside))
        elif escaped in ("s", "S", "d", "D"):
            result.append(_set({"s": None, "d": "Nd"}[escaped.lower()], escaped.isupper(), inside))
        elif escaped:
            if escaped.isalnum() and escaped not in "rntvf":
                raise ConfigError(f"the pattern {pattern!r:.60} uses \\{escaped}, which is not known here")
            result.append(f"\\{escaped}")
        else:
            inside = plain == "[" or inside and plain != "]"
            result.append(plain)
    try:
        return re.compile("".join(result))
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"the pattern {pattern!r:.60} is not understood: {error}") from None


def _set(category, negated, inside):
    """The characters of the outline in a category (None: white space), as a class or part of one."""
    if category is None:
        members = _SPACES
    else:
        members = {c for c, own in _UNIVERSE.items() if own.startswith(category)}
        if not members:
            raise ConfigError(f"there is no Unicode category {category!r}")
    listed = "".join(re.escape(c) for c in sorted(_UNIVERSE) if (c in members) != negated)
    return listed if inside else f"[{listed}]"
