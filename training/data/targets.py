"""What is where in a scene, as integers: the dense targets that teach the X-Encoder to see (phase 0).

A vision transformer has one token per patch.  The patch that holds an object's centre is asked about that
object, its neighbours included, so that each visual token learns to carry its own facts and relations.
"""
import numpy as np

from training.data.questions import QUESTION_TYPES, SceneTables
from training.data.scenes import COLOURS, IMAGE_SIZE, SHAPES, SIZES
from xuracore.errors import ConfigError

ABSENT = -1            # the ignore_index of these targets
CELL_TARGETS = {       # name: number of classes (the offsets' depends on the grid)
    "present": 2, "colour": len(COLOURS), "shape": len(SHAPES), "size": len(SIZES),
    "nearest_colour": len(COLOURS), "nearest_shape": len(SHAPES), "nearest_size": len(SIZES),
    "furthest_shape": len(SHAPES), "same_shape_count": 6,
    "left_shape": len(SHAPES), "right_shape": len(SHAPES), "above_shape": len(SHAPES), "below_shape": len(SHAPES),
}
_SIDES = {"left of": "left_shape", "right of": "right_shape", "above": "above_shape", "below": "below_shape"}
SCENE_TARGETS = {"shape_count": len(SHAPES), "size_count": len(SIZES)}
_COLOUR, _SHAPE, _SIZE = ({name: i for i, name in enumerate(names)} for names in (COLOURS, SHAPES, SIZES))


def scene_targets(scene, grid=8):
    """Targets of a scene on a ``grid`` × ``grid`` board of patches, a dict of int64 arrays.

    Per cell, (grid, grid), indexed [row, column]; −1 where no object is centred in the cell or where the
    answer is too close a call (``MIN_GAP``): ``colour``, ``shape``, ``size`` (indices into COLOURS, SHAPES,
    SIZES), ``offset_x``, ``offset_y`` (the centre's pixel inside the patch), ``nearest_colour``,
    ``nearest_shape``, ``nearest_size``, ``furthest_shape``, ``same_shape_count`` (how many *other* objects
    share the shape), ``left_shape`` … ``below_shape`` (the shape of the only object on that side, where there
    is just one).  ``present`` is 0 or 1 everywhere.  Per scene: ``shape_count`` (3,),
    ``size_count`` (2,).

    Raises ConfigError unless ``grid`` divides 64 into patches of at most 8 pixels: larger ones could hold
    two centres.
    """
    if grid < 8 or IMAGE_SIZE % grid:
        raise ConfigError(f"grid must divide {IMAGE_SIZE} and be at least 8, got {grid}")
    patch = IMAGE_SIZE // grid
    cells = {name: np.full((grid, grid), ABSENT) for name in (*CELL_TARGETS, "offset_x", "offset_y")}
    cells["present"][:] = 0
    tables = SceneTables(scene)
    for i, thing in enumerate(scene.objects):
        at = thing.y // patch, thing.x // patch
        cells["present"][at] = 1
        cells["colour"][at] = _COLOUR[thing.colour]
        cells["shape"][at] = _SHAPE[thing.shape]
        cells["size"][at] = _SIZE[thing.size]
        cells["offset_x"][at] = thing.x % patch
        cells["offset_y"][at] = thing.y % patch
        cells["same_shape_count"][at] = len(tables.by_shape[thing.shape]) - 1
        nearest, furthest = tables.extreme(i, 1), tables.extreme(i, -1)
        if nearest is not None:
            near = scene.objects[nearest]
            cells["nearest_colour"][at] = _COLOUR[near.colour]
            cells["nearest_shape"][at] = _SHAPE[near.shape]
            cells["nearest_size"][at] = _SIZE[near.size]
        if furthest is not None:
            cells["furthest_shape"][at] = _SHAPE[scene.objects[furthest].shape]
    where = {thing.colour: (thing.y // patch, thing.x // patch) for thing in scene.objects}
    for (side, colour), shape, _ in QUESTION_TYPES["two_hop"].candidates(tables):
        cells[_SIDES[side]][where[colour]] = _SHAPE[shape]
    cells["shape_count"] = np.array([len(tables.by_shape[s]) for s in SHAPES])
    cells["size_count"] = np.array([len(tables.by_size[z]) for z in SIZES])
    return cells
