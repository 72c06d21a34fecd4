"""What the phases share: frozen visual tokens computed once, and batches of questions."""

import time

import numpy as np

from training.data.scenes import Scene, render
from xuracore.errors import ConfigError
from xuravljepa import image as images
from xuravljepa.feature_cache import FeatureCache, picture_digest


def image_key(row):
    """What identifies a row's picture: the scene's name, or the file's path."""
    if isinstance(row.image, Scene):
        return row.image.split, row.image.seed, row.image.index
    return str(row.image)


def row_pixels(model, row):
    """(3, S, S) float32 of a row's picture, as the model wants it."""
    return images.prepare(row_picture(row), model.config.preprocessing)


def row_picture(row):
    """A row's picture: a path, or an array."""
    return render(row.image) if isinstance(row.image, Scene) else row.image


class FeatureStore:
    """Visual tokens of every picture of some rows, from the frozen X-Encoder, kept as float16.

    An X-Encoder forward pass costs as much as a predictor's training step, and many questions share a
    picture.  ``store(rows)`` → (B, n, d) float32.  report : called with (done, total, seconds).
    cache : a folder that keeps the tokens, memory-mapped, so that the next run does not encode again.
    """

    def __init__(self, model, rows, batch_size=64, report=None, cache=None):
        self._model, self._places, pictures = model, {}, []
        for row in rows:
            if row.image is not None and image_key(row) not in self._places:
                self._places[image_key(row)] = len(pictures)
                pictures.append(row)
        vision = model.config.vision
        if cache is None:
            self.tokens = np.empty((len(pictures), vision.n_tokens, vision.d_model), np.float16)
            for start, tokens in self._encode(pictures, batch_size, report):
                self.tokens[start : start + len(tokens)] = tokens
        else:
            self.tokens = self._cached(FeatureCache(cache, model.x_encoder, model.config.preprocessing), pictures,
                                       batch_size, report)

    def _encode(self, pictures, batch_size, report):
        """(where, tokens) of each batch of rows."""
        started = time.monotonic()
        for start in range(0, len(pictures), batch_size):
            pixels = np.stack([row_pixels(self._model, row) for row in pictures[start : start + batch_size]])
            yield start, self._model.visual_tokens(pixels)
            if report is not None:
                report(start + len(pixels), len(pictures), time.monotonic() - started)

    def _cached(self, cache, pictures, batch_size, report):
        digests = [picture_digest(row_picture(row)) for row in pictures]
        first = {digest: row for row, digest in zip(reversed(pictures), reversed(digests))}
        missing = cache.missing(digests)
        for start, tokens in self._encode([first[digest] for digest in missing], batch_size, report):
            cache.add(missing[start : start + len(tokens)], tokens)
        return cache.tokens(digests)

    def __call__(self, rows):
        if any(row.image is None for row in rows):
            raise ConfigError("a row without a picture cannot be batched with visual tokens")
        return self.tokens[[self._places[image_key(row)] for row in rows]].astype(np.float32)


def generator(*key):
    """A Generator that is a pure function of small integers: the same at each resume, for any worker."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


class RowBatches:
    """Rows in an order that is a function of (seed, epoch): ``rows_of(step)`` gives a batch.

    Every row comes once per epoch; the last incomplete batch of an epoch runs over into the next.
    """

    def __init__(self, rows, batch_size, seed=0):
        if not rows:
            raise ConfigError("the data set is empty")
        self.rows, self.batch_size, self.seed = list(rows), batch_size, seed
        self._order = (None, None)

    def _permutation(self, epoch):
        if self._order[0] != epoch:
            self._order = epoch, generator(self.seed, epoch).permutation(len(self.rows))
        return self._order[1]

    def rows_of(self, step):
        """The rows of batch number ``step``, counted from 0."""
        chosen = []
        for place in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, offset = divmod(place, len(self.rows))
            chosen.append(self.rows[self._permutation(epoch)[offset]])
        return chosen

    def __len__(self):
        """Batches per epoch, rounded up."""
        return -(-len(self.rows) // self.batch_size)
