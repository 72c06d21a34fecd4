"""The larger presets train, from their pictures to their answers."""

import numpy as np
import pytest

from training import optim, options
from training.data.captions import TEMPLATES
from training.data.dataset import Dataset
from training.phases import jepa
from training.phases.common import FeatureStore
from training.phases.objective import Objective, ObjectiveConfig, Training
from training.scripts import train_jepa
from xuravljepa.model import VLJEPA
from xuravljepa.presets import PRESETS, VLJEPAConfig


def shorter(name, image_size=32):
    """A preset with all its widths and depths, on smaller pictures."""
    config = VLJEPAConfig.preset(name)
    vision = config.vision.replace(image_size=image_size)
    return config.replace(vision=vision, predictor=config.predictor.replace(n_visual=vision.n_tokens))


@pytest.mark.parametrize("name", ["small", pytest.param("base", marks=pytest.mark.slow)])
def test_a_larger_preset_learns_a_batch(name):
    rows = Dataset.scenes("train", 2, types=("shape", "existence")).rows
    model = VLJEPA(shorter(name).replace(answers=("circle", "no", "square", "triangle", "yes")))
    model.x_encoder.requires_grad_(False)
    model.y_decoder.requires_grad_(False)
    features = FeatureStore(model, rows)
    model.predictor.fit_vision(features.tokens)
    training = Training(model, Objective(ObjectiveConfig(), model))
    batch = jepa.QuestionBatches(model, rows, features, batch_size=2, turns=2).batch(0)
    optimizer, loss_function, losses = optim.AdamW(optim.parameter_groups(training), lr=3e-4), jepa.answer_loss(), []
    for _ in range(2):
        optimizer.zero_grad()
        loss, _ = loss_function(training, batch, None)
        loss.backward()
        optimizer.step()
        training.after_step()
        losses.append(loss.item())
    assert np.isfinite(losses).all() and losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_room_for_what_is_generated(name):
    config = VLJEPAConfig.preset(name)
    rows = Dataset.captions("train", 300, types=tuple(TEMPLATES), templates="wide").rows
    longest = max(len(row.caption.encode()) for row in rows)
    assert longest <= min(config.decoder.max_length - 2, config.text.max_length - 1)


def test_a_larger_preset_has_a_batch_and_a_rate_of_its_own(threads_of_its_own):
    for flags, batch, rate in (([], 32, 2e-3), (["--preset", "small"], 16, 5e-4), (["--preset", "base"], 4, 2e-4),
                               (["--preset", "base", "--batch-size", "2", "--lr", "1e-3"], 2, 1e-3)):
        parser = options.training_parser("", "", steps=1, batch_size=32, lr=2e-3, warmup=0, weight_decay=0.0,
                                         output_dir="x", presets=train_jepa.LARGER)
        args = parser.parse_args(flags)
        options.prepare(args)
        assert (args.batch_size, args.lr) == (batch, rate)
    assert "4 with --preset base" in " ".join(parser.format_help().split())
