"""What a user may say about a data set, and what several readers ask of its names."""

import re
from dataclasses import dataclass
from pathlib import Path

from xuravljepa.model import CAPTION_QUERY

PICTURES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm")  # those that image.py decodes
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
          "test": "test", "testing": "test"}
_WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True)
class Settings:
    """images : folder of the pictures, where they do not lie with the data set.   question : what is asked about
    a picture that has only a class.   image, caption, query, answer : columns of a table, or keys, where they do
    not have the usual names.   separator : of a table's columns; None: what its first line is separated by.
    """

    images: Path | None = None
    question: str = CAPTION_QUERY
    image: str | None = None
    caption: str | None = None
    query: str | None = None
    answer: str | None = None
    separator: str | None = None


def split_of(name):
    """"train", "val" or "test" where a file's or folder's name says so in one of its words, else None."""
    found = {SPLITS[word] for word in _WORD.findall(name.lower()) if word in SPLITS}
    return found.pop() if len(found) == 1 else None
