"""Generated scenes: a few coloured shapes on a light background, drawn to the last bit the same everywhere.

A scene is 64 × 64 pixels with 3–6 objects.  No two objects share a colour, so a colour names an object.
Four of the 24 colour × shape pairs (``HELD_OUT_PAIRS``) appear in the ``ood`` split alone, where every
scene has at least one: the compositional test of CLEVR-CoGenT (Johnson et al. 2017).  ``corrupt`` is the
``test`` split seen through noise, blur or occlusion.

Coordinates are pixel indices: an object at ``(x, y)`` is centred on the middle of that pixel, so the
middle of the picture lies at 31.5.
"""
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from training.data.rng import Draws
from xuracore.errors import ConfigError

IMAGE_SIZE = 64
SPLITS = ("train", "val", "calib", "test", "ood", "corrupt")
SHAPES = ("circle", "square", "triangle")
SIZES = ("small", "large")
RADII = {"small": (4, 5), "large": (7, 8)}
COLOUR_RGB = {
    "red": (214, 39, 40), "green": (34, 150, 60), "blue": (36, 80, 200), "yellow": (240, 212, 36),
    "purple": (140, 50, 165), "orange": (245, 130, 20), "cyan": (50, 200, 215), "gray": (105, 105, 105),
}
COLOURS = tuple(COLOUR_RGB)
# Four different colours, so that each still shows two shapes in training.
HELD_OUT_PAIRS = (("red", "triangle"), ("cyan", "square"), ("yellow", "circle"), ("purple", "triangle"))
CORRUPTIONS = ("noise", "blur", "occlusion")
MIN_OBJECTS, MAX_OBJECTS = 3, 6
OBJECT_GAP = 2                 # free pixels between any two bounding boxes
MIDDLE = (IMAGE_SIZE - 1) / 2

ALLOWED_SHAPES = {c: tuple(s for s in SHAPES if (c, s) not in HELD_OUT_PAIRS) for c in COLOURS}
_PLACEMENT_TRIES = 30


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object: what it is, the pixel at its centre, and its radius in pixels."""

    colour: str
    shape: str
    size: str
    x: int
    y: int
    radius: int

    @property
    def held_out(self):
        """Whether this colour × shape pair is kept out of training."""
        return (self.colour, self.shape) in HELD_OUT_PAIRS


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything that is in one picture, and the name ``(split, index, seed)`` that generates it."""

    objects: tuple
    background: tuple
    split: str
    index: int
    seed: int
    corruption: str | None = None


def scene(split, index, seed=0):
    """The scene number ``index`` of ``split``; the same for every caller, order and worker count.

    Raises ConfigError for an unknown split or a negative index.
    """
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r}; the generated splits are {', '.join(SPLITS)}")
    if index < 0:
        raise ConfigError(f"a scene index cannot be negative, got {index}")
    drawn_from = "test" if split == "corrupt" else split
    draws = Draws("scene", seed, drawn_from, index)
    pairs = _draw_pairs(draws, ood=split == "ood")
    sizes, radii, places = _draw_places(draws, len(pairs))
    objects = tuple(SceneObject(colour, shape, size, x, y, radius) for (colour, shape), size, radius, (x, y)
                    in zip(pairs, sizes, radii, places))
    shade = draws.between(222, 242)
    background = tuple(shade + draws.between(-3, 3) for _ in range(3))
    corruption = CORRUPTIONS[index % len(CORRUPTIONS)] if split == "corrupt" else None
    return Scene(objects, background, split, index, seed, corruption)


def _draw_pairs(draws, ood):
    """(colour, shape) of each object: distinct colours, held-out pairs only where ``ood``."""
    count = draws.between(MIN_OBJECTS, MAX_OBJECTS)
    # Half the scenes favour one shape: without that, four or more of a kind would be too rare to ask about.
    favoured = draws.choice(SHAPES) if draws.below(2) else None
    colours = draws.sample(COLOURS, count)
    special = draws.choice(HELD_OUT_PAIRS) if ood else None
    if special is not None:
        if special[0] in colours:
            colours.remove(special[0])
        else:
            colours.pop()
        colours.insert(draws.below(count), special[0])
    pairs = []
    for colour in colours:
        shapes = SHAPES if ood else ALLOWED_SHAPES[colour]
        if special is not None and colour == special[0]:
            shape = special[1]
        elif favoured in shapes and draws.below(5) < 3:
            shape = favoured
        else:
            shape = draws.choice(shapes)
        pairs.append((colour, shape))
    return pairs


def _draw_places(draws, count):
    """Sizes, radii and non-overlapping centres; starts again when the large objects leave no room."""
    while True:
        sizes = [draws.choice(SIZES) for _ in range(count)]
        radii = [draws.choice(RADII[size]) for size in sizes]
        places = [None] * count
        for i in sorted(range(count), key=lambda i: -radii[i]):     # large first packs more often
            place = find_place(draws, radii[i], [(*places[j], radii[j]) for j in range(count) if places[j]])
            if place is None:
                break
            places[i] = place
        else:
            return sizes, radii, places


def find_place(draws, radius, taken, left=0, right=IMAGE_SIZE - 1):
    """A free centre for an object, or None after ``_PLACEMENT_TRIES`` draws.

    ``taken`` lists (x, y, radius); bounding boxes keep ``OBJECT_GAP`` pixels apart, and one pixel from
    the border.  ``left`` and ``right`` bound the centre's x, both included.
    """
    low, high = max(left, radius + 1), min(right, IMAGE_SIZE - 2 - radius)
    for _ in range(_PLACEMENT_TRIES):
        x, y = draws.between(low, high), draws.between(radius + 1, IMAGE_SIZE - 2 - radius)
        if all(max(abs(x - ox), abs(y - oy)) > radius + other + OBJECT_GAP for ox, oy, other in taken):
            return x, y
    return None


@lru_cache(maxsize=None)
def _coverage(shape, radius):
    """How many of 4 × 4 sub-pixels of each pixel the shape covers, (2r+1, 2r+1, 1) int64 of 0..16.

    Integer comparisons in eighths of a pixel: no rounding, so the same on every machine.
    """
    half = 8 * radius + 4
    steps = np.arange(4 * (2 * radius + 1)) * 2 + 1 - half
    v, u = np.meshgrid(steps, steps, indexing="ij")
    if shape == "circle":
        inside = u * u + v * v <= half * half
    elif shape == "square":
        inside = np.maximum(abs(u), abs(v)) <= half - 8      # one pixel less: areas closer to the circle's
    else:
        inside = 2 * abs(u) <= v + half                      # apex on top, the base fills the box
    side = 2 * radius + 1
    counts = inside.reshape(side, 4, side, 4).sum(axis=(1, 3))
    counts.flags.writeable = False
    return counts[:, :, None]


@lru_cache(maxsize=None)
def _paint(colour):
    return np.array(COLOUR_RGB[colour], np.int64)


def render(scene):
    """The picture of a scene, uint8 (64, 64, 3)."""
    background = np.array(scene.background, np.int64)
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    image[:] = background
    for thing in scene.objects:
        r, covered = thing.radius, _coverage(thing.shape, thing.radius)
        image[thing.y - r:thing.y + r + 1, thing.x - r:thing.x + r + 1] = (
            background + ((_paint(thing.colour) - background) * covered + 8 >> 4))
    if scene.corruption is not None:
        image = _CORRUPT[scene.corruption](image, Draws("corruption", scene.seed, scene.index))
    return image


def add_noise(image, draws, strength=24):
    """Independent noise on every channel: the sum of four uniforms, deviation ≈ ``strength`` of 255."""
    width = int(strength * 3 ** 0.5)
    noise = draws.integers(-width, width + 1, (4, *image.shape)).sum(axis=0) // 2
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def _blur(image, draws):
    """Two passes of a 3 × 3 box, in integers, edges repeated."""
    del draws
    wide = image.astype(np.int64)
    for _ in range(2):
        padded = np.pad(wide, ((1, 1), (1, 1), (0, 0)), mode="edge")
        rows = padded[:-2] + padded[1:-1] + padded[2:]
        wide = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4) // 9
    return wide.astype(np.uint8)


def _occlude(image, draws):
    """Two or three gray-brown patches of 6–12 pixels a side."""
    image = image.copy()
    for _ in range(draws.between(2, 3)):
        height, width = draws.between(6, 12), draws.between(6, 12)
        top, left = draws.below(IMAGE_SIZE - height), draws.below(IMAGE_SIZE - width)
        image[top:top + height, left:left + width] = (160, 150, 140)
    return image


_CORRUPT = {"noise": add_noise, "blur": _blur, "occlusion": _occlude}


def caption(scene, order="left"):
    """A sentence that names every object, from the ``left`` or from the ``top``.

    Of two that are level, the one that comes first in the other direction is named first.
    """
    if order not in ("left", "top"):
        raise ConfigError(f"captions go from the left or from the top, not from {order!r}")
    in_order = sorted(scene.objects, key=lambda thing: (thing.x, thing.y) if order == "left" else (thing.y, thing.x))
    return listed([f"a {thing.size} {thing.colour} {thing.shape}" for thing in in_order])


def listed(words):
    """``["a", "b", "c"]`` → "a, b and c"; nothing gives nothing."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
