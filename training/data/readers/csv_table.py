"""CSV and TSV: a column of pictures, and one of captions, or of questions and answers.

    filepath,title                        image,question,answer
    pictures/1.jpg,a cat on a mat         pictures/1.jpg,how many cats?,2

The first line names the columns.  Other columns of a manifest (id, split, type) count as such, the rest is kept in
``meta``.
"""

import csv

from training.data.bad import Refused
from training.data.manifest import MAX_LINE_BYTES, Entry, Folder, lines
from training.data.readers.settings import split_of
from xuracore.errors import ConfigError, FormatError

TITLE = "CSV"
ONE_ANSWER = True
_NAMES = {  # usual names of the columns, the first that is there counts
    "image": ("image", "filepath", "file_name", "filename", "file", "path", "img", "picture", "url"),
    "caption": ("caption", "title", "text"),
    "query": ("query", "question"),
    "answer": ("answer", "label", "class"),
}
_SEPARATORS = "\t,;|"


def find(path):
    """The tables of a folder, or the one that the path names."""
    if path.is_dir():
        return sorted([*path.glob("*.csv"), *path.glob("*.tsv")])
    return [path] if path.suffix in (".csv", ".tsv") else []


def entries(files, settings):
    """One Entry per row; its line is the one that the row ends in."""
    for file in files:
        yield from _table(file, Folder(settings.images or file.parent), split_of(file.stem), settings)


def _table(file, folder, split, settings):
    source = lines(file)
    first = next(source, (1, b""))[1]
    if isinstance(first, Refused):
        raise FormatError(str(first), f"{file}:1")
    separator = settings.separator or _separator(_text(first))
    if len(separator) != 1:
        raise ConfigError(f"the separator of a table is one character, got {separator!r}")
    numbers = [1]  # of the line read last

    def texts():
        yield _text(first)
        for number, line in source:
            numbers[0] = number
            yield "\0\n" if isinstance(line, Refused) else _text(line)

    table = csv.reader(texts(), delimiter=separator, strict=True)
    try:
        header = [name.strip() for name in next(table, [])]
    except csv.Error as error:
        raise FormatError(f"the first line names no columns: {error}", f"{file}:1") from None
    columns = _columns(header, file, settings)
    while True:
        try:
            cells = next(table, None)
            if cells is None:
                return
            row = _row(cells, header, columns, settings)
            if split is not None:
                row.setdefault("split", split)
        except (csv.Error, Refused) as error:
            row = error if isinstance(error, Refused) else Refused(f"not a row of a table: {error}")
        yield Entry(file, numbers[0], row, folder)


def _text(line):
    return line.decode("utf-8", "surrogateescape")


def _separator(line):
    """What the line is separated by: of tab, comma, semicolon and bar the one that occurs most."""
    return max(_SEPARATORS, key=line.count)


def _columns(header, file, settings):
    """{key of a manifest: index of its column}.  Raises ConfigError, FormatError."""
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise FormatError(f"the column {twice!r} is there twice", f"{file}:1")
    found = {}
    for key, usual in _NAMES.items():
        wanted = getattr(settings, key)
        if wanted is not None and wanted not in header:
            raise ConfigError(f"{file} has no column {wanted!r}; it has {', '.join(header)}")
        for name in usual if wanted is None else (wanted,):
            if name in header and key not in found:
                found[key] = header.index(name)
    if "image" not in found or not {"caption", "query", "answer"} & set(found):
        raise FormatError(f"needs a column of pictures and one of captions or answers; it has {', '.join(header)} "
                          f"(give their names: --csv-img-key, --csv-caption-key, …)", f"{file}:1")
    return found


def _row(cells, header, columns, settings):
    if any("\0" in cell for cell in cells):
        raise Refused(f"the line is longer than {MAX_LINE_BYTES} bytes, or holds a zero byte")
    if len(cells) != len(header):
        raise Refused(f"has {len(cells)} cells; the first line names {len(header)} columns")
    if any("\ud800" <= letter <= "\udfff" for cell in cells if not cell.isascii() for letter in cell):
        raise Refused("not UTF-8")
    used = set(columns.values())
    row = {name: cell for i, (name, cell) in enumerate(zip(header, cells)) if i not in used and cell}
    meta = {name: row.pop(name) for name in list(row) if name not in ("id", "split", "type")}
    row |= {key: cells[i] for key, i in columns.items() if cells[i] or key == "image"}
    if "answer" in row and "query" not in columns:
        row["query"] = settings.question
    return row | {"meta": meta}
