"""WebDataset: tar archives whose members with one name up to the first dot are one sample.

    000001.jpg  000001.txt       a picture and its caption
    000002.png  000002.json      a picture and {"caption": …}, or the keys of a manifest's row
    000003.jpg  000003.cls       a picture and its class, answer to "what is in the image?"

``path`` may be an archive, a folder of them, or a pattern such as ``train-{000..015}.tar`` or ``{a,b}.tar``.
"""

import itertools
import re
from pathlib import Path

from training.data.bad import Refused
from training.data.json_rows import Decoder
from training.data.manifest import Entry
from training.data.readers.settings import PICTURES, split_of
from training.data.readers.tar import MAX_PICTURE, MAX_TEXT, Member, TarPicture, members, read_part
from xuracore.errors import ConfigError, FormatError

TITLE = "WebDataset"
ONE_ANSWER = True
MAX_SHARDS = 100_000
_TEXTS = ("txt", "text", "caption", "json", "cls")


def find(path):
    """The archives that a path, a folder or a pattern with braces names."""
    if "{" in str(path):
        return [Path(name) for name in expand(str(path))]
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    return [path] if path.suffix == ".tar" else []


def expand(pattern):
    """The names that a pattern with braces stands for: ``{00..12}`` counts, ``{a,b}`` lists.

    Raises ConfigError for a pattern that is neither, or that stands for more than ``MAX_SHARDS`` names.
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)
    if "{" in "".join(parts[::2]) or "}" in "".join(parts[::2]):
        raise ConfigError(f"the braces of {pattern!r} do not match")
    choices, total = [], 1
    for i, part in enumerate(parts):
        found = re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", part) if i % 2 else None
        if found and int(found[1]) <= int(found[2]):
            first, last, width = int(found[1]), int(found[2]), len(found[1])
            names = [f"{n:0{width}d}" for n in range(first, min(last, first + MAX_SHARDS) + 1)]
        elif i % 2 and "," not in part:
            raise ConfigError(f"{{{part}}} in {pattern!r} is neither a range such as {{000..015}} nor a list")
        else:
            names = part.split(",") if i % 2 else [part]
        total *= len(names)
        if total > MAX_SHARDS:
            raise ConfigError(f"{pattern!r} stands for more than {MAX_SHARDS} archives")
        choices.append(names)
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def entries(files, settings):
    """One Entry per sample; its line is the name of the member to blame, or of the picture.

    A damaged archive is one bad entry, after those before the damage.
    """
    decoder = Decoder()
    for file in files:
        split = split_of(file.name)
        for key, group in itertools.groupby(_members(file), lambda member: _key(member.name)):
            for place, row in _rows(str(file), key, list(group), settings, decoder):
                if isinstance(row, dict) and split is not None:
                    row.setdefault("split", split)
                yield Entry(file, place or None, row, None)


def _members(file):
    try:
        yield from members(file)
    except FormatError as error:
        yield Member("", 0, 0, Refused(error.reason))


def _key(name):
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _rows(file, key, group, settings, decoder):
    """(place, row or Refused) of one sample, or nothing for a group that is none."""
    by_kind = {}
    for member in group:
        kind = member.name[len(key) + 1 :].lower()
        if member.refused is not None:
            yield member.name, member.refused
            return
        by_kind.setdefault(kind, member)
    pictures = [member for kind, member in by_kind.items() if kind.rpartition(".")[2] in PICTURES]
    texts = {kind: member for kind, member in by_kind.items() if kind in _TEXTS}
    if not pictures and not texts:  # an index, a README
        return
    row, place = {}, group[0].name
    try:
        for kind, member in texts.items():
            place = member.name
            row |= _text(file, kind, member, settings, decoder)
        place = group[0].name
        if len(pictures) != 1:
            raise Refused(f"has {len(pictures) or 'no'} pictures; a sample has one")
        (picture,), place = pictures, pictures[0].name
        row.setdefault("id", key)
        if picture.size > MAX_PICTURE:
            raise Refused(f"a picture of {picture.size} bytes; the limit is {MAX_PICTURE}")
        row["image"] = TarPicture(file, picture.name, picture.offset, picture.size)
        yield place, row
    except Refused as error:
        yield place, error


def _text(file, kind, member, settings, decoder):
    """What a text says about the sample, as keys of a row."""
    if member.size > MAX_TEXT:
        raise Refused(f"a text of {member.size} bytes; the limit is {MAX_TEXT}")
    try:
        text = read_part(file, member.offset, member.size, member.name).decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise Refused(f"not UTF-8 (byte {error.start})") from None
    if kind == "cls":
        return {"query": settings.question, "answer": text}
    if kind != "json":
        return {"caption": text}
    row = decoder.decode(text)
    if not isinstance(row, dict):
        raise Refused(f"expected a JSON object, got {type(row).__name__}")
    row.pop("image", None)  # the picture is the member, whatever is said about where it came from
    key = settings.caption
    if key and key != "caption" and key in row:
        row["caption"] = row.pop(key)
    return row
