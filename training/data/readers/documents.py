"""What the formats that are JSON documents share: telling them apart, and where their pictures lie."""

import functools
import re
from pathlib import Path

from training.data.bad import Refused
from training.data.json_rows import elements
from training.data.manifest import Folder
from xuracore.errors import FormatError

LOOKED_AT = 3  # of the first elements of an array that could tell


def find_documents(path, kind):
    """The documents of a kind among the .json files of a folder (and its annotations/, questions/), or the one named.

    kind : "coco", "vqav2", "llava" or "clevr".
    """
    if path.is_dir():
        places = [path, path / "annotations", path / "questions"]
        files = sorted(file for place in places if place.is_dir() for file in place.glob("*.json"))
    else:
        files = [path] if path.suffix == ".json" and path.is_file() else []
    return [file for file in files if _kind_of(file, file.stat().st_mtime_ns, file.stat().st_size) == kind]


@functools.lru_cache(maxsize=64)
def _kind_of(file, *_):
    """What a document's first elements show it to be, or None."""
    seen = 0
    try:
        for key, _, value in elements(file):
            if key not in (None, "questions", "annotations"):
                continue
            seen += 1
            if isinstance(value, dict):
                for kind, belongs in _KINDS.items():
                    if belongs(key, value):
                        return kind
            if seen >= LOOKED_AT:
                return None
    except FormatError:
        return None  # whoever is told to read it says what is wrong with it
    return None


_KINDS = {
    "llava": lambda key, value: key is None and "conversations" in value,
    "clevr": lambda key, value: key == "questions" and "image_filename" in value,
    "vqav2": lambda key, value: key is not None and "question_id" in value,
    "coco": lambda key, value: key == "annotations" and "caption" in value,
}


def element(value):
    """An element of a document that is an object.  Raises Refused for others."""
    if isinstance(value, Refused):
        raise value
    if not isinstance(value, dict):
        raise Refused(f"expected a JSON object, got {type(value).__name__}")
    return value


def pictures_of(file, settings, *names):
    """The Folder where a document's pictures are looked for: images/ and the folders that it is named after."""
    places = ["", "images/", *(f"{name}/" for name in names), *(f"images/{name}/" for name in names)]
    home = file.parent.parent if file.parent.name in ("annotations", "questions") else file.parent
    return Folder(Path(settings.images) if settings.images else home, within=tuple(dict.fromkeys(places)))


def subset_of(name):
    """"train2017" of captions_train2017, "train" of CLEVR_train_questions, or None."""
    found = re.search(r"(?<![a-z])(train|val|test|dev)(\d{4})?(?![a-z0-9])", name)
    return found[0] if found else None
