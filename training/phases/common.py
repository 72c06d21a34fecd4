"""What the phases share: frozen visual tokens computed once, and batches of questions."""

import contextlib
import itertools
import time

import numpy as np

from training.data.prefetch import Prefetch
from training.data.readers.tar import TarPicture
from training.data.scenes import Scene, render
from training.parallel import ALONE, shared
from xuracore import get_num_threads
from xuracore.errors import ConfigError, FormatError
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
    """A row's picture: a path, an array, or the bytes of a file.  Raises FormatError for a path in an archive."""
    if isinstance(row.image, Scene):
        return render(row.image)
    return row.image.read() if isinstance(row.image, TarPicture) else row.image


class PictureStore:
    """The pictures of some rows, each once, and the rows whose picture cannot be read.

    bad : a BadRows that takes these; ``usable`` leaves them out.  Without it, the first such picture is a
    FormatError.   Pictures are read in ``workers`` threads (default: as many as kernels use), which changes no result.
    """

    def __init__(self, rows, bad=None, workers=None, ahead=64):
        self._workers, self._ahead = get_num_threads() if workers is None else workers, ahead
        self._faults, self._rows, self._bad, self._places = {}, {}, bad, {}
        for row in rows:
            if row.image is not None:
                self._rows.setdefault(image_key(row), []).append(row)
        self.pictures = [about[0] for about in self._rows.values()]

    def __len__(self):
        """Pictures that could be read."""
        return len(self._places)

    def usable(self, rows):
        """Those of ``rows`` whose picture could be read, or that have none."""
        return [row for row in rows if image_key(row) not in self._faults]

    def places(self, rows):
        """Where the pictures of rows stand among those that could be read.  ConfigError for a row without one."""
        if any(row.image is None for row in rows):
            raise ConfigError("a row without a picture cannot be batched with visual tokens")
        return [self._places[image_key(row)] for row in rows]

    def _keep(self, rows):
        """Say that the pictures of ``rows`` stand at the next places."""
        for row in rows:
            self._places[image_key(row)] = len(self._places)

    def _good(self, function, pictures):
        """(row, function(row)) of each row whose picture can be read; the others are bad."""
        with Prefetch(function, pictures, self._workers, self._ahead) as results:
            for row in pictures:
                try:
                    yield row, next(results)
                except FormatError as error:
                    self._refuse(row, error)

    def _refuse(self, row, error):
        if self._bad is None:
            raise error
        self._faults[image_key(row)] = error
        for about in self._rows[image_key(row)]:
            file, line = about.origin or (about.image, None)
            self._bad.add(file, line, error)
        self._bad.check(sum(map(len, self._rows.values())) - sum(len(self._rows[key]) for key in self._faults))


class FeatureStore(PictureStore):
    """Visual tokens of every picture of some rows, from the frozen X-Encoder, kept as float16.

    An X-Encoder forward pass costs as much as a predictor's training step, and many questions share a
    picture.  ``store(rows)`` → (B, n, d) float32.  report : called with (done, total, seconds).
    cache : a folder that keeps the tokens, memory-mapped, so that the next run does not encode again.
    bad, workers : as for a PictureStore.   ranks : those that share the encoding; with a cache the first one does
    it, and the others find it there.
    """

    def __init__(self, model, rows, batch_size=64, report=None, cache=None, bad=None, workers=None, ranks=ALONE):
        super().__init__(rows, bad, workers, ahead=batch_size)
        self._model, self._batch_size, self._report = model, batch_size, report
        self._tokens_of = shared(model.visual_tokens, ranks if cache is None else ALONE)
        if cache is None:
            self._encode_all()
        else:
            for _ in ranks.in_turn():
                self._take_from(FeatureCache(cache, model.x_encoder, model.config.preprocessing))

    def _encode(self, pictures):
        """(rows, their tokens) of each batch."""
        started, done, earlier = time.monotonic(), 0, len(self._faults)
        with contextlib.closing(self._good(lambda row: row_pixels(self._model, row), pictures)) as good:
            while part := list(itertools.islice(good, self._batch_size)):
                rows, pixels = zip(*part)
                yield rows, self._tokens_of(np.stack(pixels))
                done += len(part)
                if self._report is not None:
                    total = len(pictures) - (len(self._faults) - earlier)
                    self._report(done, total, time.monotonic() - started)

    def _encode_all(self):
        vision = self._model.config.vision
        tokens = np.empty((len(self.pictures), vision.n_tokens, vision.d_model), np.float16)
        with contextlib.closing(self._encode(self.pictures)) as encoded:
            for rows, found in encoded:
                tokens[len(self) : len(self) + len(rows)] = found
                self._keep(rows)
        self.tokens = tokens[: len(self)]

    def _take_from(self, cache):
        digests = {image_key(row): digest for row, digest in self._good(_row_digest, self.pictures)}
        first = {digest: row for row in reversed(self.pictures) if (digest := digests.get(image_key(row)))}
        missing = [first[digest] for digest in cache.missing(digests.values())]
        with contextlib.closing(self._encode(missing)) as encoded:
            for rows, tokens in encoded:
                cache.add([digests[image_key(row)] for row in rows], tokens)
        spoilt = {digests[key]: error for key, error in self._faults.items() if key in digests}
        for row in self.pictures:  # other files of the same bytes
            if digests.get(image_key(row)) in spoilt and image_key(row) not in self._faults:
                self._refuse(row, spoilt[digests[image_key(row)]])
        kept = self.usable(self.pictures)
        self.tokens = cache.tokens([digests[image_key(row)] for row in kept])
        self._keep(kept)

    def __call__(self, rows):
        return self.tokens[self.places(rows)].astype(np.float32)


def some_tokens(tokens, pictures=2000, numbers=2**25):
    """The tokens of the first pictures, which statistics are taken of: of so many, and of no more numbers than that."""
    return tokens[: max(1, min(pictures, numbers // (tokens.shape[1] * tokens.shape[2])))]


def rows_at_once(model, numbers=2**22):
    """How many rows to read together where no gradient is wanted: 256, and fewer of large predictors."""
    sizes = model.config.predictor
    return max(8, min(256, numbers // (sizes.n_visual * sizes.d_model)))


def _row_digest(row):
    try:
        return picture_digest(row_picture(row))
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror})", row.image) from error


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
