"""Which rows are measured: generated splits, or a person's own data; and what the question-only prior learns from."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Callable

from training.data.dataset import Dataset, open_dataset
from training.data.scenes import Scene
from training.phases.common import image_key, row_picture
from xuracore.errors import ConfigError
from xuravljepa.feature_cache import picture_digest

PRIOR_SCENES = 4000
MOST_TYPES = 50  # of a person's own questions
TEXT_SCENES = 100
TEXT_TYPES = ("caption_down", "colours", "shapes", "colours_of")


@dataclass(frozen=True)
class Material:
    """What to measure on.

    rows : questions with answers about pictures.   prior_rows() : rows of training, for the question-only prior.
    texts : rows with a question that is answered by a text of its own, their ``caption``.
    splits : {column: further rows} that are measured beside them.   captions : rows with a picture and a caption.
    notes : what a reader should know about the choice.   bad : a BadRows, what was left out of a person's own data.
    """

    name: str
    rows: tuple
    prior_rows: Callable
    captions: tuple = ()
    texts: tuple = ()
    splits: dict = field(default_factory=dict)
    generated: bool = False
    notes: tuple = ()
    bad: object = None

    def usable(self, features):
        """The same without the rows whose picture a FeatureStore could not read."""
        parts = {name: tuple(features.usable(getattr(self, name))) for name in ("rows", "captions", "texts")}
        return replace(self, **parts, splits={name: features.usable(rows) for name, rows in self.splits.items()})

    def every_row(self):
        """All rows whose pictures are needed."""
        return [*self.rows, *self.captions, *self.texts, *(row for rows in self.splits.values() for row in rows)]

    def sha256(self):
        """SHA-256 of all texts, of what the pictures are, and of the bytes of those that are files."""
        rows = self.every_row()
        digest = hashlib.sha256(Dataset(self.name, rows).fingerprint().encode())
        for _, row in sorted({str(row.image): row for row in rows if not isinstance(row.image, Scene)}.items()):
            picture = row_picture(row)  # a path, or the bytes of a file in an archive
            digest.update(hashlib.sha256(picture).digest() if isinstance(picture, bytes) else picture_digest(picture))
        return digest.hexdigest()


def generated(scenes, seed=0):
    """Held-out scenes; "paraphrase", "ood" and "corrupt" have half as many."""
    half = max(scenes // 2, 1)
    return Material(
        f"{scenes} generated scenes of the split 'test', seed {seed}",
        Dataset.scenes("test", scenes, seed).rows,
        lambda: Dataset.scenes("train", PRIOR_SCENES, seed).rows,
        Dataset.captions("test", scenes, seed).rows,
        Dataset.captions("test", min(scenes, TEXT_SCENES), seed, types=TEXT_TYPES, templates="plain").rows,
        {"paraphrase": Dataset.scenes("test", half, seed, templates="paraphrase").rows,
         "ood": Dataset.scenes("ood", half, seed).rows,
         "corrupt": Dataset.scenes("corrupt", half, seed).rows},
        generated=True)


def own(path, split=None, limit=None, data=None):
    """A person's own data: the split asked for; else test, else validation, else what training held out.

    split : a name, or "all".   limit : pictures at most, the first ones.   data : the Dataset at ``path``, if it is
    open already.
    Raises ConfigError where no row can be measured.
    """
    data = open_dataset(path) if data is None else data
    every = data.rows
    rows, chosen = [row for row in every if row.image is not None], split
    if split is None:
        found = {row.split for row in rows}
        chosen = next((name for name in ("test", "val", "validation") if name in found), None)
    notes = []
    if split == "all":
        picked = rows
    elif chosen is not None:
        picked = [row for row in rows if row.split == chosen]
    else:  # as training does: every tenth picture
        held = set(sorted({str(row.image) for row in rows})[::10])
        picked = [row for row in rows if str(row.image) in held]
        chosen = "every tenth picture, which training holds out"
    if not picked:
        names = ", ".join(sorted({str(row.split) for row in rows})) or "none"
        raise ConfigError(f"{path}: no row with a picture has the split {split!r}; there are: {names}")
    pictures = list(dict.fromkeys(image_key(row) for row in picked))
    if limit is not None and len(pictures) > limit:
        notes.append(f"the first {limit} of {len(pictures)} pictures, as --limit asks")
        kept = set(pictures[:limit])
        picked = [row for row in picked if image_key(row) in kept]
    asked = {id(row) for row in picked}
    prior = [row for row in rows if id(row) not in asked and row.query and row.split in (None, "train")]
    if not prior:
        prior = [row for row in picked if row.query]
        notes.append("there are no training rows here: the question-only prior was counted on the measured rows "
                     "themselves, which flatters it")
    common = Counter(row.type for row in picked if row.query)
    if len(common) > MOST_TYPES:
        notes.append(f"only the {MOST_TYPES} commonest of {len(common)} types are told apart")
        kept = dict(common.most_common(MOST_TYPES))
        picked, prior = ([row if row.type in kept else replace(row, type="other types") for row in part]
                         for part in (picked, prior))
    left = len(every) - len(rows)
    if left:
        notes.append(f"{left} rows without a picture were left out")
    return Material(f"{path}, {chosen or 'all rows'}", tuple(row for row in picked if row.query and row.answer),
                    lambda: prior, tuple(row for row in picked if row.caption and not _asks_for_text(row)),
                    tuple(row for row in picked if _asks_for_text(row)), notes=tuple(notes), bad=data.bad)


def _asks_for_text(row):
    return row.query is not None and row.answer is None and row.caption is not None
