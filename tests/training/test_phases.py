"""Each phase learns, and resumed is bit for bit the same as uninterrupted."""

import numpy as np
import pytest

from training import optim, schedules
from training.checkpoint import digest
from training.data.dataset import Dataset
from training.data.strange import KINDS, strange_image
from training.loop import Trainer, TrainerConfig
from training.parallel import ALONE
from training.phases import agent, decoder, end_to_end, jepa, monitor, pretrain
from training.phases.common import FeatureStore, RowBatches
from training.phases.objective import Objective, ObjectiveConfig, Training
from training.progress import read_metrics
from xuravljepa.agent.heads import AgentConfig, AgentHeads
from xuravljepa.decoder import DecoderConfig
from xuravljepa.model import VLJEPA
from xuravljepa.predictor import PredictorConfig
from xuravljepa.presets import VLJEPAConfig
from xuravljepa.text import TextEncoderConfig
from xuravljepa.vit import VitConfig

ANSWERS = tuple(sorted({"circle", "square", "triangle", "small", "large", *map(str, range(31))}))
CARDS = {"calculator": "Work out a sum of numbers.", "lookup": "Look up what a thing costs at a shop."}


def config():
    return VLJEPAConfig(
        vision=VitConfig(image_size=64, patch_size=8, d_model=16, depth=1, n_heads=2),
        predictor=PredictorConfig(d_model=16, n_layers=2, d_state=8, headdim=8, vision_dim=16, query_dim=8, embed_dim=8,
                                  n_visual=65, n_salient=8, n_read=1, max_query=32),
        text=TextEncoderConfig(d_model=16, n_layers=1, d_state=8, headdim=8, max_length=32, embed_dim=8),
        decoder=DecoderConfig(d_model=16, n_layers=1, d_state=8, headdim=8, prefix_length=2, max_length=16, embed_dim=8),
        answers=ANSWERS,
    )


@pytest.fixture(scope="module")
def rows():
    return [*Dataset.scenes("train", 12, types=("shape", "size")).rows,
            *Dataset.tools("train", 12, pools=("known", "train")).rows]


def phase_0(rows, ranks=ALONE):
    model = pretrain.SceneReader(config().vision, rng=np.random.default_rng(0))
    return model, pretrain.loss_function, pretrain.SceneBatches(4, ranks=ranks)


def phase_1(rows, ranks=ALONE):
    model = VLJEPA(config(), rng=np.random.default_rng(0))
    model.x_encoder.requires_grad_(False)
    model.y_decoder.requires_grad_(False)
    features = FeatureStore(model, rows)
    model.predictor.fit_vision(features.tokens)
    training = Training(model, Objective(ObjectiveConfig(), model, ranks=ranks))
    return training, jepa.answer_loss(), jepa.QuestionBatches(model, rows, features, 4, turns=2, lesson=2,
                                                                    ranks=ranks)


def phase_1_end_to_end(rows, ranks=ALONE):
    sizes = config()
    model = VLJEPA(sizes.replace(predictor=sizes.predictor.replace(n_salient=0)), rng=np.random.default_rng(0))
    model.y_decoder.requires_grad_(False)
    training = Training(model, Objective(ObjectiveConfig(), model))
    batches = jepa.QuestionBatches(model, rows, end_to_end.PixelStore(model, rows), 4, turns=2, lesson=2, ranks=ranks)
    return training, end_to_end.answer_loss(), end_to_end.MovedBatches(batches, 0.5, 4, ranks=ranks)


def phase_2(rows, ranks=ALONE):
    model = VLJEPA(config(), rng=np.random.default_rng(0))
    model.requires_grad_(False)
    model.y_decoder.requires_grad_()
    predicted = model.encode_answers([row.answer for row in rows]).data
    return model, decoder.loss_function, decoder.AnswerBatches(model, rows, predicted, 4, ranks=ranks)


def phase_3_injection(rows, ranks=ALONE):
    model = VLJEPA(config(), rng=np.random.default_rng(0)).requires_grad_(False)
    heads = AgentHeads(AgentConfig.for_model(model.config, tuple(CARDS)), model.config.predictor)
    heads.monitor.requires_grad_(False)
    tools = [row for row in rows if row.tool]
    plain = [row for row in rows if not row.tool]
    batches = agent.InjectionBatches(model, tools, plain, FeatureStore(model, rows), 4, ranks=ranks)
    return heads, agent.injection_objective(model, CARDS), batches


def phase_3_monitor(rows, ranks=ALONE):
    model = VLJEPA(config(), rng=np.random.default_rng(0)).requires_grad_(False)
    heads = AgentHeads(AgentConfig.for_model(model.config, tuple(CARDS)), model.config.predictor)
    found = monitor.gather_readings(model, heads, rows)
    readings = monitor.Readings.of(found, rows, "tools")
    readings.wrong[::3] = 0  # of a random model every answer is wrong
    heads.monitor.fit_scale(readings.features)
    heads.injector.requires_grad_(False)
    heads.selector.requires_grad_(False)
    return heads, monitor.monitor_objective, monitor.ReadingBatches(readings, 8, heads.monitor.config.hidden)


PHASES = [phase_0, phase_1, phase_1_end_to_end, phase_2, phase_3_injection, phase_3_monitor]


def train(phase, rows, folder, steps=6, stop_at=None, resume=False, ranks=ALONE):
    model, loss_function, batches = phase(rows, ranks)
    optimizer = optim.AdamW(optim.parameter_groups(model, 0.01), lr=3e-3)
    settings = TrainerConfig(steps=steps, accumulate=2, ema_decay=0.9, log_every=1, prefetch=ranks.size == 1)
    trainer = Trainer(model, loss_function, optimizer, schedules.cosine(3e-3, steps, 1), batches, settings, folder,
                      stream=None, ranks=ranks)
    trainer.run(resume=resume, stop_at=stop_at)
    return digest({**model.state_dict(), **optimizer.state_dict(), **trainer.average.state_dict()})


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.__name__)
def test_resumed_equals_uninterrupted_bit_for_bit(phase, rows, tmp_path):
    whole = train(phase, rows, tmp_path / "whole")
    train(phase, rows, tmp_path / "parts", stop_at=3)
    assert train(phase, rows, tmp_path / "parts", resume=True) == whole


@pytest.mark.parametrize("phase", PHASES[1:], ids=lambda phase: phase.__name__)
def test_two_ranks_train_as_one_with_the_whole_batch(phase, rows, tmp_path, on_ranks):
    """In phase 0 too, but for labels that are missing more often on one rank than on the other."""
    train(phase, rows, tmp_path / "one", steps=3)
    one, other = on_ranks(2, lambda ranks: train(phase, rows, tmp_path / "two", steps=3, ranks=ranks))
    assert one == other
    losses = [[record["loss"] for record in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("one", "two")]
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.__name__)
def test_one_batch_can_be_learned(phase, rows):
    model, loss_function, batches = phase(rows)
    optimizer = optim.AdamW(optim.parameter_groups(model), lr=1e-2)
    batch = batches.batch(0)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss, _ = loss_function(model, batch, None)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.85 * losses[0]


def test_an_epoch_shows_every_row_once():
    batches = RowBatches(range(10), 4, seed=1)
    seen = [row for step in range(5) for row in batches.rows_of(step)]
    assert sorted(seen[:10]) == list(range(10)) == sorted(seen[10:20])
    assert seen[:10] != seen[10:20]


def test_the_lesson_comes_first(rows):
    model = VLJEPA(config())
    features = FeatureStore(model, rows)
    batches = jepa.QuestionBatches(model, rows, features, 4, turns=2, lesson=3, tool_share=1.0)
    assert all(turn["tool"] is None for step in range(3) for turn in batches.batch(step)["turns"])
    assert any(batches.batch(step)["turns"][0]["tool"] is not None for step in range(3, 12))


def test_a_tools_word_stands_in_the_sequence_or_the_answer_is_known(rows):
    model = VLJEPA(config())
    batches = jepa.QuestionBatches(model, rows, FeatureStore(model, rows), 4, turns=1, tool_share=1.0)
    rng = np.random.default_rng(0)
    for row in rows:
        example = batches._example(row, rng)
        if example.tool is None:
            assert example.answer == row.answer and (row.tool is None or row.meta["known"])
        else:
            assert example.answer == example.tool


def test_strange_pictures_are_reproducible_and_all_different():
    pictures = [strange_image(i, seed=3) for i in range(2 * len(KINDS))]
    assert all(p.shape == (64, 64, 3) and p.dtype == np.uint8 for p in pictures)
    assert len({p.tobytes() for p in pictures}) == len(pictures)
    np.testing.assert_array_equal(pictures[5], strange_image(5, seed=3))
