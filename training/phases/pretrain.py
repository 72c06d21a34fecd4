"""Phase 0: teach the X-Encoder to see, then freeze it.

Each visual token predicts what is centred in its patch: colour, shape, size, where exactly, and the
facts its neighbourhood gives it (attributes of the nearest object, the shape furthest away, the shape on
each side, how many share its shape).  The [CLS] token predicts the counts.  These dense labels come from
the generator; on a folder of real weights this phase is skipped.
"""

from dataclasses import dataclass

import numpy as np

from training.data.scenes import render, scene
from training.data.targets import ABSENT, CELL_TARGETS, SCENE_TARGETS, scene_targets
from training.parallel import ALONE
from xuracore import nn, ops
from xuravljepa import image
from xuravljepa.vit import VisionTransformer

MAX_COUNT = 6  # objects in a scene; counts are classes 0 … 6
OFFSETS = ("offset_x", "offset_y")


class SceneReader(nn.Module):
    """A ViT with one linear head per target."""

    def __init__(self, vit_config, *, rng):
        self.vit = VisionTransformer(vit_config, rng=rng)
        self._grid = vit_config.image_size // vit_config.patch_size
        widths = dict(CELL_TARGETS)
        widths.update({name: vit_config.patch_size for name in OFFSETS})
        self._cell_widths = widths
        self._scene_widths = {name: count * (MAX_COUNT + 1) for name, count in SCENE_TARGETS.items()}
        self.cell_head = nn.Linear(vit_config.d_model, sum(widths.values()), rng=rng)
        self.scene_head = nn.Linear(vit_config.d_model, sum(self._scene_widths.values()), rng=rng)

    def forward(self, pixels):
        """pixels (B, 3, H, W) → ({cell target: (B, n, classes)}, {scene target: (B, kinds, 7)})."""
        tokens = self.vit(pixels)
        cells = self.cell_head(tokens[:, 1:])
        whole = self.scene_head(tokens[:, 0])
        cell_parts = ops.split(cells, list(self._cell_widths.values()))
        scene_parts = ops.split(whole, list(self._scene_widths.values()))
        return (
            dict(zip(self._cell_widths, cell_parts)),
            {name: part.reshape(part.shape[0], -1, MAX_COUNT + 1)
             for name, part in zip(self._scene_widths, scene_parts)},
        )


@dataclass
class SceneBatches:
    """Fresh scenes for every step, a pure function of (seed, step), of which this rank gives its part."""

    batch_size: int
    seed: int = 0
    split: str = "train"
    patch_grid: int = 8
    ranks: object = ALONE

    def batch(self, step):
        """{"pixels": (B, 3, 64, 64), target: (B, …) int64}."""
        scenes = [scene(self.split, step * self.batch_size + i, self.seed)
                  for i in range(self.batch_size)[self.ranks.part(self.batch_size)]]
        pixels = np.stack([image.load(render(s)) for s in scenes])
        targets = [scene_targets(s, self.patch_grid) for s in scenes]
        stacked = {name: np.stack([t[name] for t in targets]) for name in targets[0]}
        return {"pixels": pixels, **stacked}


def loss_function(model, batch, rng=None):
    """Sum of cross-entropies over the targets; absent ones are ignored.  Returns (loss, {name: accuracy})."""
    cells, whole = model(batch["pixels"])
    total, metrics = None, {}
    for name, logits in {**cells, **whole}.items():
        target = batch[name].reshape(-1)
        flat = logits.reshape(-1, logits.shape[-1])
        part = ops.cross_entropy(flat, target, ignore_index=ABSENT)
        # an object is in few cells, so its presence is the easy part
        total = part if total is None else total + part
        known = target != ABSENT
        if known.any():
            metrics[name] = float((flat.data.argmax(axis=-1)[known] == target[known]).mean())
    return total, metrics
