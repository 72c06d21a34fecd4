"""Scenes are the same everywhere, stay apart by split, and are drawn as described."""
import hashlib
from concurrent.futures import ThreadPoolExecutor

import re

import numpy as np
import pytest

from training.data import scenes
from training.data.rng import Draws
from training.data.scenes import HELD_OUT_PAIRS, SPLITS, caption, render, scene
from training.data.targets import scene_targets
from xuracore.errors import ConfigError

GOLDEN_PIXELS = {
    ("train", 0, 0): "790bb7f459ec85d8",
    ("val", 5, 1): "e5eebf1ea6681ad4",
    ("ood", 3, 0): "6a52307027cd289f",
    ("corrupt", 0, 0): "c1ff10615d60ec71",
    ("corrupt", 1, 0): "3f5c117f638f859c",
    ("corrupt", 2, 0): "56d60573ee15f2aa",
}


def pixel_hash(*name):
    return hashlib.sha256(render(scene(*name)).tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("name", GOLDEN_PIXELS, ids=str)
def test_pixels_are_the_same_on_every_machine_and_release(name):
    assert pixel_hash(*name) == GOLDEN_PIXELS[name]


def test_a_scene_does_not_depend_on_order_or_worker():
    in_order = [scene("train", i, 3) for i in range(60)]
    with ThreadPoolExecutor(4) as pool:
        shuffled = dict(pool.map(lambda i: (i, scene("train", i, 3)), reversed(range(60))))
    assert in_order == [shuffled[i] for i in range(60)]


def test_seeds_and_splits_give_different_scenes():
    seen = [scene(split, i, seed).objects for split in SPLITS if split != "corrupt"
            for seed in (0, 1) for i in range(300)]
    assert len(set(seen)) == len(seen)


def test_corrupt_scenes_are_test_scenes_seen_badly():
    for i in range(12):
        clean, spoiled = scene("test", i), scene("corrupt", i)
        assert clean.objects == spoiled.objects
        assert not np.array_equal(render(clean), render(spoiled))
    assert {scene("corrupt", i).corruption for i in range(3)} == set(scenes.CORRUPTIONS)


def test_held_out_pairs_appear_in_ood_alone_and_in_every_ood_scene():
    for split in SPLITS:
        for i in range(300):
            held_out = [o for o in scene(split, i).objects if (o.colour, o.shape) in HELD_OUT_PAIRS]
            assert bool(held_out) == (split == "ood")
    assert {(o.colour, o.shape) for i in range(200) for o in scene("ood", i).objects} >= set(HELD_OUT_PAIRS)


def test_all_other_pairs_are_seen_in_training():
    seen = {(o.colour, o.shape) for i in range(400) for o in scene("train", i).objects}
    assert len(seen) == 24 - len(HELD_OUT_PAIRS)


@pytest.mark.parametrize("split", SPLITS)
def test_objects_fit_keep_apart_and_have_their_own_colours(split):
    for i in range(200):
        objects = scene(split, i).objects
        assert 3 <= len(objects) <= 6
        assert len({o.colour for o in objects}) == len(objects)
        for k, a in enumerate(objects):
            assert a.radius in scenes.RADII[a.size]
            assert min(a.x, a.y) - a.radius >= 1 and max(a.x, a.y) + a.radius <= 62
            for b in objects[:k]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) - a.radius - b.radius - 1 >= scenes.OBJECT_GAP


def test_an_object_is_painted_where_the_scene_says():
    for i in range(50):
        this = scene("train", i)
        image = render(this)
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8
        assert tuple(image[0, 0]) == this.background
        for o in this.objects:
            assert tuple(image[o.y, o.x]) == scenes.COLOUR_RGB[o.colour]


@pytest.mark.parametrize("shape,area", [("circle", np.pi * 8.5 ** 2), ("square", 15 ** 2),
                                        ("triangle", 17 ** 2 / 2)])
def test_coverage_has_the_area_of_the_shape(shape, area):
    assert scenes._coverage(shape, 8).sum() / 16 == pytest.approx(area, rel=0.03)


def test_the_caption_names_every_object():
    this = scene("train", 4)
    assert len(re.split(", | and ", caption(this))) == len(this.objects)
    assert all(f"{o.size} {o.colour} {o.shape}" in caption(this) for o in this.objects)


def test_targets_describe_each_object_in_the_cell_of_its_centre():
    for i in range(100):
        this = scene("train", i)
        targets = scene_targets(this)
        assert targets["present"].sum() == len(this.objects)
        absent = targets["present"] == 0
        for name in ("colour", "shape", "size", "offset_x", "nearest_shape", "furthest_shape",
                     "same_shape_count"):
            assert targets[name].dtype == np.int64 and np.all(targets[name][absent] == -1)
        for row, column in np.argwhere(targets["present"]):
            x, y = column * 8 + targets["offset_x"][row, column], row * 8 + targets["offset_y"][row, column]
            (thing,) = [o for o in this.objects if (o.x, o.y) == (x, y)]
            assert scenes.COLOURS[targets["colour"][row, column]] == thing.colour
            assert scenes.SHAPES[targets["shape"][row, column]] == thing.shape
            assert scenes.SIZES[targets["size"][row, column]] == thing.size
            others = sum(o.shape == thing.shape for o in this.objects) - 1
            assert targets["same_shape_count"][row, column] == others
            near = targets["nearest_shape"][row, column]
            distances = sorted(((np.hypot(o.x - x, o.y - y), o) for o in this.objects if o is not thing),
                               key=lambda pair: pair[0])
            clear = distances[1][0] - distances[0][0] >= 3
            assert near == (scenes.SHAPES.index(distances[0][1].shape) if clear else -1)
        assert targets["shape_count"].sum() == targets["size_count"].sum() == len(this.objects)


def test_targets_refuse_a_grid_that_could_hold_two_centres_in_a_cell():
    with pytest.raises(ConfigError, match="grid"):
        scene_targets(scene("train", 0), grid=4)


def test_unknown_split_and_negative_index_are_named():
    with pytest.raises(ConfigError, match="'tain'.*train"):
        scene("tain", 0)
    with pytest.raises(ConfigError, match="-1"):
        scene("train", -1)


def test_draws_are_uniform_and_named_by_their_key():
    draws = Draws("test", 1)
    counts = np.bincount([draws.below(6) for _ in range(6000)], minlength=6)
    assert np.all(abs(counts - 1000) < 150)
    array = Draws("test", 2).integers(-3, 4, (4000,))
    assert array.min() == -3 and array.max() == 3 and abs(array.mean()) < 0.15
    assert Draws("a", 1).word() == Draws("a", 1).word() != Draws("a", 2).word()
    assert sorted(Draws("s").sample(range(10), 10)) == list(range(10))
