"""One kind of data set for everything: generated scenes, tool questions, and manifests from disk.

``dataset[i]`` is a Sample.  Generated pictures are drawn when asked for, never stored: a million questions
need no disk.
"""
import hashlib
import json
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from training.data.bad import BadRows
from training.data.captions import captions
from training.data.manifest import Sample, samples
from training.data.questions import questions
from training.data.readers import READERS, detect
from training.data.readers.settings import Settings
from training.data.rng import GENERATOR_VERSION
from training.data.scenes import Scene, render, scene
from training.data.tools_data import TOOL_TYPES, tool_questions
from xuracore.errors import ConfigError

# Neighbouring questions share a picture; a few hundred cover a shuffled batch of neighbours.
_cached_render = lru_cache(maxsize=512)(render)


class Dataset:
    """A sequence of Sample.

    ``rows`` are the samples with their generated pictures not drawn yet (``image`` is a Scene): enough for
    whatever looks at texts alone, and much faster.  ``bad`` is a BadRows, what was left out.
    """

    def __init__(self, name, rows, bad=None):
        self.name, self.rows = name, tuple(rows)
        self.bad = BadRows(name) if bad is None else bad

    @classmethod
    def scenes(cls, split, count, seed=0, start=0, types=None, per_type=1, templates="plain"):
        """Questions about ``count`` scenes of a split from number ``start``; the rest as in ``questions``."""
        return cls(f"scenes/{split}", [
            row for index in range(start, start + count)
            for row in _question_rows(scene(split, index, seed), types, per_type, templates)])

    @classmethod
    def captions(cls, split, count, seed=0, start=0, types=("caption",), templates=None):
        """Pictures with texts about them, one row for each scene and each of the types of ``captions``.

        templates : how the questions are worded; None for captions without a question.
        """
        rows = []
        for index in range(start, start + count):
            this = scene(split, index, seed)
            for q in captions(this, types, templates or "plain"):
                rows.append(Sample(_name(this, q.type), this, q.query if templates else None, caption=q.answer,
                                   type=q.type, split=split))
        return cls(f"captions/{split}", rows)

    @classmethod
    def tools(cls, split, count, seed=0, start=0, pools=("known", "test"), types=TOOL_TYPES, per_type=1,
              templates="plain"):
        """Tool questions about scenes of a split; each scene takes the next of the given pools of keys."""
        if not pools:
            raise ConfigError("tool questions need at least one pool of keys")
        return cls(f"tools/{split}", [
            row for index in range(start, start + count)
            for row in _tool_rows(scene(split, index, seed), pools[index % len(pools)], types, per_type, templates)])

    @classmethod
    def manifest(cls, path, split=None, max_bad_fraction=0.0):
        """The rows of a JSONL manifest (a file, or a folder with ``manifest.jsonl``), or those of one split.

        Raises FormatError as ``read_manifest`` does, and ConfigError when no row has the split.
        """
        path = Path(path)
        path = path / "manifest.jsonl" if path.is_dir() else path
        return open_dataset(path, "manifest", split=split, max_bad_fraction=max_bad_fraction)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        return replace(row, image=_cached_render(row.image)) if isinstance(row.image, Scene) else row

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __repr__(self):
        return f"Dataset({self.name!r}, {len(self)} samples)"

    def answers(self):
        """The distinct answers, sorted: what a closed-set model chooses from."""
        return tuple(sorted({row.answer for row in self.rows if row.answer is not None}))

    def fingerprint(self):
        """SHA-256 of all texts and of what the pictures are (a generated scene, a file name), in hex."""
        digest = hashlib.sha256(GENERATOR_VERSION.encode())
        for row in self.rows:
            image = getattr(row.image, "name", None) or repr(row.image)  # no folder: data may be moved
            texts = [row.id, image, row.query, row.answers, row.caption, row.tool]
            digest.update(json.dumps(texts).encode())
        return digest.hexdigest()


def open_dataset(path, format="auto", *, split=None, max_bad_fraction=0.0, settings=Settings(), say=None, listing=None):
    """The Dataset that lies at ``path``: a folder, a file, or a pattern of archives.

    format : one of readers.FORMATS; "auto" looks at what is there.   split : rows of that split alone.
    settings : a readers.settings.Settings.   say : called with what was found, in words.
    listing : a file that gets the bad rows if there are too many.

    Raises FormatError for what cannot be read, or with more bad rows than ``max_bad_fraction`` of all; ConfigError
    where several formats are there, for columns that are not, and when no row has the split.
    """
    format, files = detect(path, format)
    bad = BadRows(path, max_bad_fraction, listing)
    found = tuple(samples(READERS[format].entries(files, settings), bad, READERS[format].ONE_ANSWER))
    if say is not None:
        say(f"{path}: {READERS[format].TITLE}, {_summary(found)}")
    bad.check(len(found))
    rows = [sample for sample in found if split is None or sample.split == split]
    if not rows:
        splits = sorted({str(sample.split) for sample in found})
        raise ConfigError(f"no row of {path} has the split {split!r}; it has {', '.join(splits)}")
    return Dataset(str(path), rows, bad)


def _summary(rows):
    """What there is, in words."""
    pictures = len({str(row.image) for row in rows if row.image is not None})
    asked = sum(row.query is not None for row in rows)
    answers = len({row.answer for row in rows if row.answer is not None})
    parts = [f"{pictures:,} pictures", f"{asked:,} questions with {answers:,} different answers" * bool(asked),
             f"{sum(row.caption is not None for row in rows):,} captions" * any(row.caption for row in rows)]
    splits = Counter(row.split or "no split" for row in rows)
    parts.append("splits " + ", ".join(f"{name} {count:,}" for name, count in sorted(splits.items())))
    return "; ".join(part for part in parts if part)


def _name(this, *parts):
    return "/".join(map(str, (this.split, this.seed, this.index, *parts)))


def _question_rows(this, types, per_type, templates):
    return [Sample(_name(this, i), this, q.query, q.answer, (q.answer,), type=q.type, split=this.split,
                   meta={"relational": q.relational, "family": q.family})
            for i, q in enumerate(questions(this, per_type, types, templates))]


def _tool_rows(this, pool, types, per_type, templates):
    return [Sample(_name(this, pool, i), this, q.query, q.answer, (q.answer,), type=q.type, split=this.split,
                   tool={"name": q.tool, "arguments": q.arguments, "result": q.result},
                   meta={"known": q.known, "key": q.key, "pool": pool})
            for i, q in enumerate(tool_questions(this, pool, types, per_type, templates))]
