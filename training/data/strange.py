"""Pictures that no model was taught on: what it should admit that it cannot read, or reads less well.

Eight kinds, from noise to smooth landscapes of colour, whose statistics range over those of photographs
(power spectra falling as 1/f), drawings and screens.  Picture i of a seed is a pure function of (seed, i).
"""

import numpy as np

UNTAUGHT = ("dim", "coarse", "tinted")  # changes of a picture that no training shows, for evaluation alone
TAUGHT = ("specks", "lines", "gamma", "waves")  # changes of a picture on which the monitor is trained
KINDS = ("white noise", "1/f noise", "gradient", "stripes", "blocks", "landscape", "blobs", "text-like")


def strange_image(index, seed=0, size=64):
    """uint8 (size, size, 3); the kind is ``index`` modulo 8."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, 7, index))))
    draw = (_white, _pink, _gradient, _stripes, _blocks, _landscape, _blobs, _text)[index % len(KINDS)]
    return np.clip(draw(rng, size), 0, 255).astype(np.uint8)


def untaught(pixels, kind):
    """Normalised pictures (n, 3, S, S) with less contrast, in blocks of two pixels a side, or with less blue."""
    if kind == "dim":
        return (pixels * np.float32(0.6)).astype(np.float32)
    if kind == "coarse":
        n, channels, height, width = pixels.shape
        blocks = pixels.reshape(n, channels, height // 2, 2, width // 2, 2).mean(axis=(3, 5))
        return blocks.repeat(2, axis=2).repeat(2, axis=3).astype(np.float32)
    return pixels - np.array([0, 0, 0.35], np.float32)[:, None, None]


def changed(pixels, kind, rng):
    """Normalised pictures (n, 3, S, S) with specks or lines of random colour, another gamma, or rows that sway.

    How much is drawn for each picture; nothing moves by more than two pixels, so that answers stay.
    """
    pixels, size = pixels.copy(), pixels.shape[-1]
    for picture in pixels:
        if kind == "specks":
            spots = rng.random((size, size)) < rng.uniform(0.01, 0.08)
            picture[:, spots] = rng.uniform(-1, 1, (3, int(spots.sum())))
        elif kind == "lines":
            for _ in range(int(rng.integers(1, 5))):
                ends, along = rng.uniform(0, size - 1, (2, 2)), np.linspace(0, 1, 4 * size)[:, None]
                y, x = np.round(ends[0] * (1 - along) + ends[1] * along).astype(int).T
                picture[:, y, x] = rng.uniform(-1, 1, 3)[:, None]
        elif kind == "gamma":
            picture[:] = 2 * ((picture.clip(-1, 1) + 1) / 2) ** np.exp(rng.uniform(-0.7, 0.7)) - 1
        else:
            sway = rng.uniform(0.5, 2) * np.sin(np.arange(size) / rng.uniform(2, 6) + rng.uniform(0, 6))
            columns = np.clip(np.arange(size) + np.round(sway).astype(int)[:, None], 0, size - 1)
            picture[:] = picture[:, np.arange(size)[:, None], columns]
    return pixels


def _colour(rng):
    return rng.uniform(0, 255, 3)


def _white(rng, size):
    return rng.normal(rng.uniform(80, 200), rng.uniform(20, 80), (size, size, 3))


def _spectrum(rng, size, slope):
    """A smooth random field in [0, 1] with amplitude falling as frequency to the power of -slope."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    frequency[0, 0] = 1
    noise = np.fft.fft2(rng.standard_normal((size, size))) / frequency**slope
    noise[0, 0] = 0
    field = np.fft.ifft2(noise).real
    return (field - field.min()) / (np.ptp(field) + 1e-12)


def _pink(rng, size):
    slope = rng.uniform(0.7, 2.0)
    return np.stack([_spectrum(rng, size, slope) * rng.uniform(100, 255) for _ in range(3)], axis=-1)


def _gradient(rng, size):
    y, x = np.mgrid[:size, :size] / size
    along = np.cos(angle := rng.uniform(0, 2 * np.pi)) * x + np.sin(angle) * y
    along = ((along - along.min()) / np.ptp(along))[..., None]
    return _colour(rng) * (1 - along) + _colour(rng) * along


def _stripes(rng, size):
    y, x = np.mgrid[:size, :size]
    angle, period = rng.uniform(0, np.pi), rng.uniform(3, 20)
    wave = (np.sin((np.cos(angle) * x + np.sin(angle) * y) * 2 * np.pi / period) > 0)[..., None]
    return np.where(wave, _colour(rng), _colour(rng))


def _blocks(rng, size):
    cells = int(rng.integers(3, 12))
    grid = rng.uniform(0, 255, (cells, cells, 3))
    place = np.arange(size) * cells // size
    return grid[place][:, place]


def _landscape(rng, size):
    """Sky over ground with a rough horizon and shading, as a holiday photograph would have."""
    y = np.arange(size)[:, None] / size
    profile = _spectrum(rng, size, 1.5)[0] * 0.3 + rng.uniform(0.3, 0.6)
    ground = (y > profile[None, :])[..., None]
    shade = _spectrum(rng, size, 1.2)[..., None] * 80
    sky = _colour(rng) * (1 - y[..., None]) + _colour(rng) * y[..., None]
    return np.where(ground, _colour(rng) + shade - 40, sky + shade * 0.3)


def _blobs(rng, size):
    """Soft spots of colour: objects, but none with an edge or a shape."""
    y, x = np.mgrid[:size, :size]
    image = np.ones((size, size, 3)) * _colour(rng)
    for _ in range(int(rng.integers(3, 14))):
        centre, width = rng.uniform(0, size, 2), rng.uniform(3, 16)
        weight = np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * width**2))[..., None]
        image = image * (1 - weight) + _colour(rng) * weight
    return image


def _text(rng, size):
    """Dark marks in rows on paper."""
    image = np.full((size, size, 3), rng.uniform(200, 255))
    for top in range(4, size - 6, int(rng.integers(6, 10))):
        marks = rng.random((4, size)) < 0.5
        image[top : top + 4][marks] = rng.uniform(0, 90)
    return image
