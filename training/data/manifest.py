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
from typing import NamedTuple

from training.data.bad import BadRows, Refused
from training.data.json_rows import Decoder
from xuracore.errors import FormatError
from xuracore.io.atomic import write_atomically

MAX_LINE_BYTES = 1_000_000
MAX_CAPTION_BYTES = 1_000_000
_ALIASES = {"question": "query", "text": "caption"}


@dataclass(frozen=True, slots=True)
class Sample:
    """One thing to learn from: a picture, a question and its answer, or a caption.

    ``image`` is a Path, a picture in an archive (readers.tar.TarPicture), a uint8 array (H, W, 3) or None;
    ``answer`` is the first of ``answers``.  ``origin`` is the file and the line or member it was read from.
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
    origin: tuple | None = field(default=None, compare=False, repr=False)


_KEYS = tuple(item.name for item in fields(Sample) if item.name != "origin")


@dataclass(frozen=True)
class Manifest:
    """The good rows of a manifest, a tuple of Sample, and the bad ones, a tuple of BadRow."""

    path: Path
    samples: tuple
    bad: tuple

    def report(self):
        """The bad rows in words, ``path:line: reason`` each, or an empty string."""
        return "\n".join(map(str, self.bad))


class Entry(NamedTuple):
    """What a reader found at one place: ``row`` has the keys of a manifest, or is the Refused that says why not."""

    file: object
    line: int | str | None
    row: object
    folder: object


def read_manifest(path, max_bad_fraction=0.0, check_files=True):
    """Read a JSONL manifest; a Manifest of its good rows, with absolute image paths, and its bad ones.

    ``check_files`` also asks that every picture exists.  Raises FormatError when the file is missing or
    empty, or when more than ``max_bad_fraction`` of its rows are bad (0: one is too many), naming the file
    and the line of the first few.
    """
    path, bad = Path(path), BadRows(path, max_bad_fraction)
    good = tuple(samples(entries(path, check_files), bad))
    bad.check(len(good))
    return Manifest(path, good, tuple(bad.rows))


def entries(path, check_files=True, root=None):
    """The Entry of every line of a manifest that is not blank.   root : of the pictures (default: beside it)."""
    path = Path(path)
    folder, decoder = Folder(root or path.parent, check_files), Decoder()
    for number, line in lines(path):
        try:
            yield Entry(path, number, _decode(line, decoder), folder)
        except Refused as error:
            yield Entry(path, number, error, folder)


def samples(found, bad, one_answer=True):
    """The Sample of each good Entry; the others go to ``bad``, a BadRows.

    Refused are rows that break a rule of the manifest, ids that are taken, and, where ``one_answer``, a second
    answer to the same question about the same picture of a split, none of whose answers is the first one's.
    """
    ids, asked = {}, {}
    for entry in found:
        try:
            if isinstance(entry.row, Refused):
                raise entry.row
            sample = sample_of(entry)
            if sample.id in ids:
                raise Refused(f"the id {sample.id!r} is taken by {_place(ids[sample.id])}")
            if one_answer and sample.query is not None:
                _agree(sample, asked)
            ids[sample.id] = sample.origin
            yield sample
        except Refused as error:
            bad.add(entry.file, entry.line, error)


def _agree(sample, asked):
    tool = json.dumps(sample.tool, sort_keys=True) if sample.tool else None
    key = str(sample.image), " ".join(sample.query.lower().split()), sample.split, tool
    answers, origin = asked.setdefault(key, (sample.answers, sample.origin))
    if sample.answer not in answers and answers[0] not in sample.answers:
        raise Refused(f"the answer {sample.answer!r} contradicts {answers[0]!r}, given for the same picture and "
                      f"question in {_place(origin)}")


def _place(origin):
    file, line = origin
    return os.path.basename(file) + ("" if line is None else f":{line}")


def lines(path, limit=MAX_LINE_BYTES):
    """(number, bytes) of every line that is not blank; a line of more than ``limit`` bytes comes as a Refused."""
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(limit + 1):
                number += 1
                if len(line) > limit:
                    while line and not line.endswith(b"\n"):
                        line = file.readline(limit)
                    yield number, Refused(f"the line is longer than {limit} bytes")
                elif line.strip():
                    yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except FileNotFoundError:
        raise FormatError("there is no such file", path) from None
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror})", path) from error


def _decode(line, decoder):
    if isinstance(line, Refused):
        raise line
    try:
        row = decoder.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Refused(f"not UTF-8 (byte {error.start} of the line)") from None
    if not isinstance(row, dict):
        raise Refused(f"expected a JSON object, got {type(row).__name__}")
    return row


def sample_of(entry):
    """The Sample of an Entry whose row is a dict.  Raises Refused for one that breaks a rule."""
    row = {key: value for key, value in entry.row.items() if value is not None}
    for alias, key in _ALIASES.items():
        if alias in row:
            if key in row:
                raise Refused(f"{alias!r} is another name for {key!r}; give one of them")
            row[key] = row.pop(alias)
    if isinstance(row.get("tool_used"), str):
        row.setdefault("tool", {"name": row.pop("tool_used")})
    meta = _checked(row, "meta", dict, {})
    meta = {**{key: row[key] for key in row if key not in _KEYS}, **meta}

    answers = _texts(row, "answers")
    answer = _text(row, "answer", numbers=True)
    if answer is None and answers:
        answer = answers[0]
    elif answer is not None and not answers:
        answers = (answer,)
    sample = Sample(
        id=_text(row, "id", numbers=True) or f"line-{entry.line}",
        image=_image(row, entry.folder), query=_text(row, "query"), answer=answer, answers=answers,
        choices=_texts(row, "choices"), caption=_caption(row, entry.folder), type=_text(row, "type"),
        split=_text(row, "split"), tool=_tool(row), confused=_flag(row, "confused"),
        knowledge=_texts(row, "knowledge"), meta=meta, origin=(str(entry.file), entry.line))
    if sample.query is None and sample.caption is None:
        raise Refused("a row needs a 'query' with its answer, or a 'caption'")
    if sample.query is not None and sample.answer is None:
        raise Refused("the query has neither 'answer' nor 'answers'")
    if sample.answer is not None and sample.answer not in sample.answers:
        raise Refused(f"the answer {sample.answer!r} is not among the answers")
    if sample.choices and sample.answer is not None and sample.answer not in sample.choices:
        raise Refused(f"the answer {sample.answer!r} is not among the choices")
    return sample


def _checked(row, key, kind, default=None):
    value = row.get(key, default)
    if value is not default and not isinstance(value, kind):
        names = {dict: "an object", list: "a list", str: "a string"}
        raise Refused(f"{key!r} must be {names[kind]}, got {type(value).__name__}")
    return value


def _text(row, key, numbers=False):
    """A text that is not empty, or None; with ``numbers``, numbers become text as JSON writes them."""
    value = row.get(key)
    if numbers and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise Refused(f"{key!r} is not a finite number")
        return json.dumps(value)
    value = _checked(row, key, str)
    if value is not None and not value.strip():
        raise Refused(f"{key!r} is empty")
    if value is not None and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise Refused(f"{key!r} holds half a surrogate pair, which is no character")
    return value


def _texts(row, key):
    values = _checked(row, key, list)
    if values is None:
        return ()
    if not values:
        raise Refused(f"{key!r} is an empty list")
    return tuple(_text({key: value}, key, numbers=True) or _refuse_entry(key) for value in values)


def _refuse_entry(key):
    raise Refused(f"{key!r} holds null")


def _flag(row, key):
    value = row.get(key)
    if value not in (None, 0, 1):
        raise Refused(f"{key!r} must be 0 or 1, got {value!r}")
    return None if value is None else int(value)


def _tool(row):
    tool = _checked(row, "tool", dict)
    if tool is None:
        return None
    if unknown := set(tool) - {"name", "arguments", "result"}:
        raise Refused(f"'tool' has an unknown key {sorted(unknown)[0]!r}; it takes name, arguments and result")
    if _text(tool, "name") is None:
        raise Refused("'tool' needs a 'name'")
    _checked(tool, "arguments", dict)
    return tool


def _image(row, folder):
    image = row.get("image")
    if image is None or hasattr(image, "read"):  # no JSON value has that: a picture that a reader found
        return image
    return folder.file(_text(row, "image"), "image")


def _caption(row, folder):
    caption = _text(row, "caption")
    if caption is None or not caption.endswith(".txt") or "\n" in caption:
        return caption
    path = folder.file(caption, "text", must_exist=True)
    if path.stat().st_size > MAX_CAPTION_BYTES:
        raise Refused(f"the text file {caption!r} is larger than {MAX_CAPTION_BYTES} bytes")
    try:
        content = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"the text file {caption!r} cannot be read: {error}") from None
    if not content:
        raise Refused(f"the text file {caption!r} is empty")
    return content


class Folder:
    """Files below a folder by their relative names; links are followed before judging where they lie.

    within : where to look, below the folder, one after the other.   check_files : whether a file has to exist.
    """

    def __init__(self, root, check_files=True, within=("",)):
        self.root, self._check, self._within, self._known = Path(root).resolve(), check_files, within, {}

    def file(self, name, what, must_exist=None):
        """The absolute path of the file ``name``.  Raises Refused."""
        if name not in self._known:  # many questions are about one picture
            self._known[name] = self._find(name, what, self._check if must_exist is None else must_exist)
        return self._known[name]

    def _find(self, name, what, must_exist):
        if "\0" in name or "://" in name or "\\" in name:
            raise Refused(f"the {what} path {name!r} must be a plain relative path with forward slashes")
        if os.path.isabs(name):
            raise Refused(f"the {what} path {name!r} is absolute; give it relative to {self.root.name}/")
        for path in (self.root / place / name for place in self._within):
            try:
                inside = path.resolve().is_relative_to(self.root)
                exists = path.is_file()
            except (OSError, RuntimeError) as error:  # a loop of links, a name too long
                raise Refused(f"the {what} path {name[:80]!r} cannot be followed: {error}") from None
            if not inside:
                raise Refused(f"the {what} path {name!r} leads out of the folder {self.root.name}/")
            if exists or not must_exist:
                return path
        where = ", ".join(f"{self.root.name}/{place}" for place in self._within)
        raise Refused(f"the {what} file {name!r} does not exist in {where}")


def write_manifest(path, samples):
    """Write samples as JSONL; an old manifest stays until the new one is whole.

    Images are None or paths, absolute or relative to the manifest's folder.  Raises FormatError for an image
    that is not a path inside that folder.
    """
    path = Path(path)
    lines = [json.dumps(_row(sample, path), ensure_ascii=False, allow_nan=False) for sample in samples]
    write_atomically(path, [(line + "\n").encode() for line in lines])


def _row(sample, path):
    row = {name: getattr(sample, name) for name in _KEYS}
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
