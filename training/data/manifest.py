"""Your own data: one JSON object per line, pictures by path beside it.

    {"id": "a1", "image": "pictures/cat.png", "query": "what is it?", "answer": "cat"}

Keys: ``id``, ``image`` (relative to the manifest, or null), ``query``, ``answer`` or ``answers`` (a list, the
first is trained on), ``choices``, ``caption``, ``type``, ``split``, ``tool`` ({"name", "arguments",
"result"}), ``confused`` (0 or 1), ``knowledge`` (a list of texts), ``meta``.  Accepted under other names:
``question`` for ``query``, ``text`` for ``caption`` (or the path of a .txt file that holds it), ``tool_used``
for the tool's name.  Any other key is kept in ``meta``.  A line needs a query with an answer, or a caption.

A manifest is data from outside: paths may not leave its folder, and a bad line is reported with its number,
not guessed at.
"""
import json
import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path

from xuracore.errors import FormatError
from xuracore.io.atomic import write_atomically

MAX_LINE_BYTES = 1_000_000
MAX_CAPTION_BYTES = 1_000_000
_SHOWN = 5
_ALIASES = {"question": "query", "text": "caption"}


@dataclass(frozen=True, slots=True)
class Sample:
    """One thing to learn from: a picture, a question and its answer, or a caption.

    ``image`` is a Path, a uint8 array (H, W, 3) or None; ``answer`` is the first of ``answers``.
    """

    id: str
    image: object = None
    query: str | None = None
    answer: str | None = None
    answers: tuple = ()
    choices: tuple = ()
    caption: str | None = None
    type: str | None = None
    split: str | None = None
    tool: dict | None = field(default=None, hash=False)
    confused: int | None = None
    knowledge: tuple = ()
    meta: dict = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class BadRow:
    """A line that was left out: its number, counted from 1, and why."""

    line: int
    reason: str


@dataclass(frozen=True)
class Manifest:
    """The good rows of a manifest, a tuple of Sample, and the bad ones, a tuple of BadRow."""

    path: Path
    samples: tuple
    bad: tuple

    def report(self):
        """The bad rows in words, ``path:line: reason`` each, or an empty string."""
        return "\n".join(f"{self.path}:{row.line}: {row.reason}" for row in self.bad)


class _Bad(ValueError):
    """Why one row is refused."""


def read_manifest(path, max_bad_fraction=0.0, check_files=True):
    """Read a JSONL manifest; a Manifest of its good rows, with absolute image paths, and its bad ones.

    ``check_files`` also asks that every picture exists.  Raises FormatError when the file is missing or
    empty, or when more than ``max_bad_fraction`` of its rows are bad (0: one is too many), naming the file
    and the line of the first few.
    """
    path = Path(path)
    root = path.parent.resolve()
    samples, bad, seen = [], [], set()
    for number, line in _lines(path):
        try:
            sample = _parse(line, number, root, check_files)
            if sample.id in seen:
                raise _Bad(f"the id {sample.id!r} is taken by an earlier line")
            seen.add(sample.id)
            samples.append(sample)
        except _Bad as error:
            bad.append(BadRow(number, str(error)))
    result = Manifest(path, tuple(samples), tuple(bad))
    total = len(samples) + len(bad)
    if total == 0:
        raise FormatError("the manifest has no rows", path)
    if len(bad) > max_bad_fraction * total:
        first = "\n".join(result.report().split("\n")[:_SHOWN])
        more = f"\n… and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise FormatError(f"{len(bad)} of {total} rows are bad, more than "
                          f"max_bad_fraction={max_bad_fraction} allows:\n{first}{more}", path)
    return result


def _lines(path):
    """(number, bytes) of every line that is not blank."""
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    while line and not line.endswith(b"\n"):
                        line = file.readline(MAX_LINE_BYTES)
                    yield number, None
                elif line.strip():
                    yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except FileNotFoundError:
        raise FormatError("there is no such file", path) from None
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror})", path) from error


def _parse(line, number, root, check_files):
    if line is None:
        raise _Bad(f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise _Bad(f"not UTF-8 (byte {error.start} of the line)") from None
    except json.JSONDecodeError as error:
        raise _Bad(f"not JSON: {error.msg} (column {error.colno})") from None
    except (RecursionError, ValueError) as error:      # nested too deep; a number of too many digits
        raise _Bad(f"not acceptable JSON: {str(error)[:120]}") from None
    if not isinstance(row, dict):
        raise _Bad(f"expected a JSON object, got {type(row).__name__}")
    return _sample(row, number, root, check_files)


def _refuse_constant(name):
    raise _Bad(f"{name} is not JSON")


def _sample(row, number, root, check_files):
    row = {key: value for key, value in row.items() if value is not None}
    for alias, key in _ALIASES.items():
        if alias in row:
            if key in row:
                raise _Bad(f"{alias!r} is another name for {key!r}; give one of them")
            row[key] = row.pop(alias)
    if isinstance(row.get("tool_used"), str):
        row.setdefault("tool", {"name": row.pop("tool_used")})
    meta = _checked(row, "meta", dict, {})
    known = {item.name for item in fields(Sample)}
    meta = {**{key: row[key] for key in row if key not in known}, **meta}

    answers = _texts(row, "answers")
    answer = _text(row, "answer", numbers=True)
    if answer is None and answers:
        answer = answers[0]
    elif answer is not None and not answers:
        answers = (answer,)
    sample = Sample(
        id=_text(row, "id", numbers=True) or f"line-{number}",
        image=_inside(root, _text(row, "image"), "image", check_files) if "image" in row else None,
        query=_text(row, "query"), answer=answer, answers=answers,
        choices=_texts(row, "choices"), caption=_caption(row, root), type=_text(row, "type"),
        split=_text(row, "split"), tool=_tool(row), confused=_flag(row, "confused"),
        knowledge=_texts(row, "knowledge"), meta=meta)
    if sample.query is None and sample.caption is None:
        raise _Bad("a row needs a 'query' with its answer, or a 'caption'")
    if sample.query is not None and sample.answer is None:
        raise _Bad("the query has neither 'answer' nor 'answers'")
    if sample.answer is not None and sample.answer not in sample.answers:
        raise _Bad(f"the answer {sample.answer!r} is not among the answers")
    if sample.choices and sample.answer is not None and sample.answer not in sample.choices:
        raise _Bad(f"the answer {sample.answer!r} is not among the choices")
    return sample


def _checked(row, key, kind, default=None):
    value = row.get(key, default)
    if value is not default and not isinstance(value, kind):
        names = {dict: "an object", list: "a list", str: "a string"}
        raise _Bad(f"{key!r} must be {names[kind]}, got {type(value).__name__}")
    return value


def _text(row, key, numbers=False):
    """A text that is not empty, or None; with ``numbers``, numbers become text as JSON writes them."""
    value = row.get(key)
    if numbers and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise _Bad(f"{key!r} is not a finite number")
        return json.dumps(value)
    value = _checked(row, key, str)
    if value is not None and not value.strip():
        raise _Bad(f"{key!r} is empty")
    if value is not None and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise _Bad(f"{key!r} holds half a surrogate pair, which is no character")
    return value


def _texts(row, key):
    values = _checked(row, key, list)
    if values is None:
        return ()
    if not values:
        raise _Bad(f"{key!r} is an empty list")
    return tuple(_text({key: value}, key, numbers=True) or _refuse_entry(key) for value in values)


def _refuse_entry(key):
    raise _Bad(f"{key!r} holds null")


def _flag(row, key):
    value = row.get(key)
    if value not in (None, 0, 1):
        raise _Bad(f"{key!r} must be 0 or 1, got {value!r}")
    return None if value is None else int(value)


def _tool(row):
    tool = _checked(row, "tool", dict)
    if tool is None:
        return None
    if unknown := set(tool) - {"name", "arguments", "result"}:
        raise _Bad(f"'tool' has an unknown key {sorted(unknown)[0]!r}; it takes name, arguments and result")
    if _text(tool, "name") is None:
        raise _Bad("'tool' needs a 'name'")
    _checked(tool, "arguments", dict)
    return tool


def _caption(row, root):
    caption = _text(row, "caption")
    if caption is None or not caption.endswith(".txt") or "\n" in caption:
        return caption
    path = _inside(root, caption, "text", must_exist=True)
    if path.stat().st_size > MAX_CAPTION_BYTES:
        raise _Bad(f"the text file {caption!r} is larger than {MAX_CAPTION_BYTES} bytes")
    try:
        content = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise _Bad(f"the text file {caption!r} cannot be read: {error}") from None
    if not content:
        raise _Bad(f"the text file {caption!r} is empty")
    return content


def _inside(root, name, what, must_exist):
    """The path of a file below ``root``; links are followed before judging where it lies."""
    if "\0" in name or "://" in name or "\\" in name:
        raise _Bad(f"the {what} path {name!r} must be a plain relative path with forward slashes")
    if os.path.isabs(name):
        raise _Bad(f"the {what} path {name!r} is absolute; give it relative to the manifest")
    path = root / name
    try:
        inside = path.resolve().is_relative_to(root)
        exists = path.is_file()
    except (OSError, RuntimeError) as error:           # a loop of links, a name too long
        raise _Bad(f"the {what} path {name[:80]!r} cannot be followed: {error}") from None
    if not inside:
        raise _Bad(f"the {what} path {name!r} leads out of the manifest's folder")
    if must_exist and not exists:
        raise _Bad(f"the {what} file {name!r} does not exist")
    return path


def write_manifest(path, samples):
    """Write samples as JSONL; an old manifest stays until the new one is whole.

    Images are None or paths, absolute or relative to the manifest's folder.  Raises FormatError for an image
    that is not a path inside that folder.
    """
    path = Path(path)
    lines = [json.dumps(_row(sample, path), ensure_ascii=False, allow_nan=False) for sample in samples]
    write_atomically(path, [(line + "\n").encode() for line in lines])


def _row(sample, path):
    row = {item.name: getattr(sample, item.name) for item in fields(sample)}
    if sample.image is not None:
        if not isinstance(sample.image, (str, os.PathLike)):
            raise FormatError("save the image to a file first: the manifest names its path", path, sample.id)
        place = path.parent / sample.image
        if not place.resolve().is_relative_to(path.parent.resolve()):
            raise FormatError(f"the image {sample.image} lies outside the manifest's folder", path, sample.id)
        row["image"] = os.path.relpath(place, path.parent).replace(os.sep, "/")
    if len(sample.answers) <= 1:
        del row["answers"]
    return {key: list(value) if isinstance(value, tuple) else value for key, value in row.items()
            if value is not None and value != () and value != {}}
