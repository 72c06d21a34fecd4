"""A folder of pictures: the class of each is its subfolder's name, or its caption is a .txt file beside it.

    pictures/cat/1.png                answer "cat" to "what is in the image?"
    pictures/train/cat/1.png          the same, of the split "train", where all folders are named so
    pictures/1.png  pictures/1.txt    a caption
"""

import os
from pathlib import Path

from training.data.bad import Refused
from training.data.manifest import Entry, Folder
from training.data.readers.settings import PICTURES, SPLITS

TITLE = "a folder of pictures"
ONE_ANSWER = True


def find(path):
    """The folder itself, if there is a picture in it or in a folder below."""
    if path.is_dir():
        for _, _, names in os.walk(path):
            if any(_is_picture(name) for name in names):
                return [path]
    return []


def _is_picture(name):
    return name.rpartition(".")[2].lower() in PICTURES and name[0] != "."


def entries(files, settings):
    """One Entry per picture, in the order of their paths; folders behind links are not entered."""
    (root,) = files
    folder = Folder(root)
    tops = [entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != "."]
    splits = bool(tops) and all(name.lower() in SPLITS for name in tops)
    for place, names in _walk(root):
        for name in names:
            path = place / name
            parts = path.relative_to(root).parts
            split = SPLITS[parts[0].lower()] if splits and len(parts) > 1 else None
            classes = parts[1:-1] if split else parts[:-1]
            try:
                row = _row("/".join(parts), path, classes, settings)
            except Refused as error:
                row = error
            else:
                row["split"] = split
            yield Entry(path, None, row, folder)


def _walk(root):
    for place, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        yield Path(place), sorted(filter(_is_picture, names))


def _row(name, path, classes, settings):
    row = {"id": name, "image": name}
    text = Path(name).with_suffix(".txt")
    if path.with_suffix(".txt").exists():
        row["caption"] = text.as_posix()
    elif not classes:
        raise Refused("lies in no subfolder that would be its class, and has no caption beside it")
    if classes:
        row |= {"query": settings.question, "answer": classes[-1]}
    return row
