"""One kind of data set for everything: generated scenes, tool questions, and manifests from disk.

``dataset[i]`` is a Sample.  Generated pictures are drawn when asked for, never stored: a million questions
need no disk.
"""
import hashlib
import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from training.data.captions import captions
from training.data.manifest import Sample, read_manifest
from training.data.questions import questions
from training.data.rng import GENERATOR_VERSION
from training.data.scenes import Scene, render, scene
from training.data.tools_data import TOOL_TYPES, tool_questions
from xuracore.errors import ConfigError

# Neighbouring questions share a picture; a few hundred cover a shuffled batch of neighbours.
_cached_render = lru_cache(maxsize=512)(render)


class Dataset:
    """A sequence of Sample.

    ``rows`` are the samples with their generated pictures not drawn yet (``image`` is a Scene): enough for
    whatever looks at texts alone, and much faster.
    """

    def __init__(self, name, rows):
        self.name, self.rows = name, tuple(rows)

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
        samples = read_manifest(path, max_bad_fraction).samples
        rows = [sample for sample in samples if split is None or sample.split == split]
        if not rows:
            found = sorted({str(sample.split) for sample in samples})
            raise ConfigError(f"no row of {path} has the split {split!r}; it has {', '.join(found)}")
        return cls(str(path), rows)

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
            image = row.image.name if isinstance(row.image, Path) else repr(row.image)
            texts = [row.id, image, row.query, row.answers, row.caption, row.tool]
            digest.update(json.dumps(texts).encode())
        return digest.hexdigest()


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
