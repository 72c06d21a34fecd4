"""The table of formats in training/README.md is true: what it shows is recognised and read."""

import io
import re
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from training.data.dataset import open_dataset
from training.data.readers import FORMATS, detect

PAGE = (Path(__file__).parents[2] / "training" / "README.md").read_text("utf-8")
ROWS = re.findall(r"^\| `(\w+)` \| (`.*`) \|$", PAGE.partition("## Your own pictures")[2].partition("### ")[0],
                  re.MULTILINE)
CONTENT = {"txt": b"a cat", "json": b'{"caption": "a cat"}'}


def content_of(name):
    if name.endswith((".png", ".jpg")):
        file = io.BytesIO()
        Image.new("RGB", (3, 3)).save(file, "PNG")
        return file.getvalue()
    return CONTENT[name.rpartition(".")[2]]


def write_tar(path, names):
    with tarfile.open(path, "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(content_of(name))
            archive.addfile(member, io.BytesIO(content_of(name)))


def test_every_format_is_in_the_table():
    assert {name for name, _ in ROWS} | {"auto"} == set(FORMATS)


@pytest.mark.parametrize("name,example", ROWS, ids=[f"{i}-{name}" for i, (name, _) in enumerate(ROWS)])
def test_the_lines_shown_are_a_data_set(name, example, tmp_path):
    for line in re.findall(r"`([^`]+)`", example):
        file, _, content = line.partition(": ")
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if file.endswith(".tar"):
            write_tar(path, content.split(", "))
        elif content:
            with open(path, "a", encoding="utf-8") as written:
                written.write(content + "\n")
        else:
            path.write_bytes(content_of(file))
    assert detect(tmp_path)[0] == name
    rows = open_dataset(tmp_path).rows
    assert rows and all(row.image is not None and (row.answer or row.caption) for row in rows)
