"""The manifest: see training/data/manifest.py."""

from training.data import manifest

TITLE = "manifest"
ONE_ANSWER = True


def find(path):
    """manifest.jsonl of a folder, or the .jsonl file that the path names."""
    if path.is_dir():
        path = path / "manifest.jsonl"
    return [path] if path.suffix == ".jsonl" and path.is_file() else []


def entries(files, settings):
    """One Entry per line."""
    for file in files:
        yield from manifest.entries(file, root=settings.images)
