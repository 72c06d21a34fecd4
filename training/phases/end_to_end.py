"""Phase 1 with the X-Encoder learning too: for small pictures of one's own, where no frozen encoder fits.

Pictures stay as pixels, moved a little at every step where asked for, and each step runs the X-Encoder forward and
back.  That costs as much again as the predictor, so it is for thousands of small pictures, not for millions.
"""

import numpy as np

from training.parallel import ALONE
from training.phases import jepa
from training.phases.common import PictureStore, generator, row_picture
from xuracore.errors import ConfigError
from xuravljepa import image as images

MAX_BYTES = 4_000_000_000
_TURN, _SCALE, _SHIFT = np.deg2rad(12), 0.1, 0.125  # radians, natural logarithm, share of the side


class PixelStore(PictureStore):
    """The pixels of every picture of some rows, as the model wants them: ``store(rows)`` → (B, 3, S, S) float32.

    Kept as uint8; ConfigError beyond ``MAX_BYTES``.  bad, workers : as for a PictureStore.
    """

    def __init__(self, model, rows, bad=None, workers=None):
        super().__init__(rows, bad, workers)
        self._recipe = recipe = model.config.preprocessing
        needed = len(self.pictures) * 3 * recipe.size**2
        if needed > MAX_BYTES:
            raise ConfigError(f"{len(self.pictures):,} pictures of {recipe.size} pixels take {needed:,} bytes in "
                              f"memory, more than {MAX_BYTES:,}: use a frozen X-Encoder, or smaller pictures")
        self._pixels = np.empty((len(self.pictures), recipe.size, recipe.size, 3), np.uint8)

        def pixels(row):
            return np.asarray(images.fit(images.read_rgb(row_picture(row)), recipe))

        for row, picture in self._good(pixels, self.pictures):
            self._pixels[len(self)] = picture
            self._keep([row])

    def __call__(self, rows):
        return images.normalise(self._pixels[self.places(rows)], self._recipe.mean, self._recipe.std)

    def tokens_of(self, model):
        """rows → tokens (B, n, d) of the X-Encoder as it is now: what evaluation takes for a FeatureStore."""
        return lambda rows: model.visual_tokens(self(rows))


class MovedBatches:
    """The batches of ``jepa.QuestionBatches`` over a PixelStore, each picture turned, scaled and shifted a little.

    With strength 1 by up to 12 degrees, a tenth, and an eighth of the side; anew for each step, as a pure function of
    (seed, step).  Nothing is mirrored: texts and digits, and many answers, would not survive it.   batch_size : of
    whole batches.   ranks : those that share them; what happens to a picture does not depend on who has it.
    """

    def __init__(self, batches, strength, batch_size, seed=0, ranks=ALONE):
        self._batches, self._strength, self._size, self._seed = batches, strength, batch_size, seed
        self._part = ranks.part(batch_size)

    def __len__(self):
        return len(self._batches)

    def batch(self, step):
        """As ``jepa.QuestionBatches`` gives it."""
        batch = self._batches.batch(step)
        moves = generator(self._seed, 3, step).uniform(-self._strength, self._strength, (4, self._size))[:, self._part]
        first, *later = batch["turns"]
        return {**batch, "turns": [{**first, "visual": moved(first["visual"], moves)}, *later]}


def answer_loss(gate_weight=0.01):
    """As ``jepa.answer_loss``, for batches whose "visual" are pixels."""
    loss = jepa.answer_loss(gate_weight)
    loss.features = features
    return loss


def features(training, batch, rng=None):
    """As ``jepa.features``: the X-Encoder reads the pixels of the first turn."""
    first, *later = batch["turns"]
    visual = training.model.x_encoder(first["visual"])
    return jepa.features(training, {**batch, "turns": [{**first, "visual": visual}, *later]}, rng)


def moved(pixels, moves):
    """Pictures (B, 3, S, S), each turned, scaled, and shifted down and right as ``moves`` (4, B) says, in -1 … 1.

    Bilinear; beyond the border stands what is on it.
    """
    height, width = pixels.shape[2:]
    angle, scale, down, right = (moves * np.array([[_TURN], [_SCALE], [_SHIFT], [_SHIFT]]))[:, :, None, None]
    y, x = np.meshgrid(np.arange(height) - (height - 1) / 2, np.arange(width) - (width - 1) / 2, indexing="ij")
    cosine, sine = np.cos(angle) * np.exp(-scale), np.sin(angle) * np.exp(-scale)
    rows = np.clip(cosine * y - sine * x + down * height + (height - 1) / 2, 0, height - 1)
    columns = np.clip(sine * y + cosine * x + right * width + (width - 1) / 2, 0, width - 1)
    top, left = (np.minimum(np.floor(at).astype(np.int64), side - 2) for at, side in ((rows, height), (columns, width)))
    below, beside = (part[:, None].astype(pixels.dtype) for part in (rows - top, columns - left))
    picture, channel = np.arange(len(pixels))[:, None, None, None], np.arange(3)[:, None, None]

    def at(i, j):
        return pixels[picture, channel, (top + i)[:, None], (left + j)[:, None]]

    upper = at(0, 0) * (1 - beside) + at(0, 1) * beside
    lower = at(1, 0) * (1 - beside) + at(1, 1) * beside
    return upper * (1 - below) + lower * below
