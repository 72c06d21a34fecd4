"""Readers of common formats, one file each: all give the entries of a manifest.

A reader is a module with ``TITLE``; ``find(path)``, the files at ``path`` (a folder, a file, a pattern of archives)
that it would read, or an empty list; and ``entries(files, settings)``, a generator of manifest.Entry.  ``ONE_ANSWER``
is False where a question about a picture may well have several answers.
"""

from pathlib import Path

from training.data.readers import clevr, coco, csv_table, folder, jsonl, llava, vqa, webdataset
from xuracore.errors import ConfigError, FormatError

READERS = {"manifest": jsonl, "folder": folder, "csv": csv_table, "coco": coco, "vqav2": vqa, "llava": llava,
           "clevr": clevr, "webdataset": webdataset}
FORMATS = ("auto", *READERS)


def detect(path, format="auto"):
    """(name of the format, the files to read) for what lies at ``path``.

    A manifest counts before everything else, a folder of pictures after it.  Raises FormatError if nothing is
    recognised, ConfigError for an unknown format or where several are there.
    """
    if format not in FORMATS:
        raise ConfigError(f"there is no format {format!r}; choose one of {', '.join(FORMATS)}")
    path = Path(path)
    if not path.exists() and "{" not in str(path):
        raise FormatError("there is no such file or folder", path)
    if format != "auto":
        files = READERS[format].find(path) or ([] if path.is_dir() else [path])
        if not files:
            raise FormatError(f"there is no data set of the format {format!r} ({READERS[format].TITLE})", path)
        return format, files
    if files := jsonl.find(path):
        return "manifest", files
    found = {}
    for name, reader in READERS.items():
        if reader not in (jsonl, folder) and (files := reader.find(path)):
            found[name] = files
    if not found and (files := folder.find(path)):
        found["folder"] = files
    if not found:
        raise FormatError(f"holds no data set that is recognised: a manifest.jsonl, pictures in folders, or one of "
                          f"{', '.join(reader.TITLE for reader in READERS.values())}", path)
    if len(found) > 1:
        names = ", ".join(f"{name} ({files[0].name})" for name, files in found.items())
        raise ConfigError(f"{path} holds several data sets: {names}; choose one with --data-format")
    return next(iter(found.items()))
