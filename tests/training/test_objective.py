"""Each objective learns what it says, stands still where it must, and remembers what it needs."""

import numpy as np
import pytest

import xuracore as xc
from training import optim, schedules
from training.checkpoint import digest
from training.loop import Trainer, TrainerConfig
from training.phases.objective import LOSSES, NEGATIVES, Objective, ObjectiveConfig, Training
from xuracore import ops
from xuracore.errors import ConfigError
from xuravljepa.decoder import DecoderConfig
from xuravljepa.model import VLJEPA
from xuravljepa.predictor import PredictorConfig
from xuravljepa.presets import VLJEPAConfig
from xuravljepa.text import TextEncoderConfig
from xuravljepa.vit import VitConfig

SIZES = {"d_model": 16, "n_layers": 1, "d_state": 8, "headdim": 8, "embed_dim": 8}
CONFIG = VLJEPAConfig(
    vision=VitConfig(image_size=16, patch_size=8, d_model=12, depth=1, n_heads=3),
    predictor=PredictorConfig(**SIZES, vision_dim=12, query_dim=10, n_visual=5, n_read=2, max_query=8),
    text=TextEncoderConfig(**SIZES, max_length=20),
    decoder=DecoderConfig(**SIZES, prefix_length=2, max_length=20),
    answers=("circle", "no", "square", "yes"),
)
ANSWERS = ["yes", "no", "yes", "circle", "blue"]  # the last is not among the known ones


def model(seed=0):
    return VLJEPA(CONFIG, rng=np.random.default_rng(seed))


def training(**settings):
    made = model()
    made.requires_grad_(False)
    made.predictor.requires_grad_()
    made.log_scale.requires_grad_()
    made.y_encoder.requires_grad_(settings.get("target") != "frozen")
    return Training(made, Objective(ObjectiveConfig(**settings), made, ANSWERS))


def predictions(count=len(ANSWERS), seed=3):
    rows = np.random.default_rng(seed).standard_normal((count, 8)).astype(np.float32)
    return xc.Tensor(rows / np.linalg.norm(rows, axis=1, keepdims=True), requires_grad=True)


def loss_of(trained, embedding=None, answers=ANSWERS):
    return trained.objective(trained.model, predictions() if embedding is None else embedding, answers)


SETTINGS = [{"loss": loss, "target": "frozen" if loss in ("cosine", "l1", "l2") else "online"} for loss in LOSSES]
SETTINGS += [{"loss": loss, "target": "ema", "steps": 6} for loss in ("nce", "sigmoid", "vicreg")]
SETTINGS += [{"negatives": "bank", "bank_every": 4}, {"negatives": "bank", "target": "ema", "bank_every": 2},
             {"negatives": "batch", "uniformity": 0.1, "prior_correct": True}, {"loss": "cosine", "uniformity": 0.5}]


# ---------------------------------------------------------------------- what is compared with what
def test_equal_answers_are_one_target():
    trained = training()
    perfect = xc.Tensor(trained.model.encode_answers(ANSWERS).data)
    loss, metrics = loss_of(trained, perfect)
    assert metrics["hits"].all() and loss.requires_grad
    assert not loss_of(trained, xc.Tensor(perfect.data[[1, 0, 2, 3, 4]]))[1]["hits"][:2].any()
    texts = sorted({*ANSWERS, *CONFIG.answers})
    targets = trained.model.encode_answers(texts)
    expected = ops.multi_positive_info_nce(perfect, targets, np.array([texts.index(a) for a in ANSWERS]),
                                           trained.model.log_scale)
    assert loss.item() == expected.item()


def test_negatives_come_from_all_known_answers_from_a_bank_or_from_the_batch():
    losses = {kind: loss_of(training(negatives=kind)) for kind in NEGATIVES}
    values = {kind: loss.item() for kind, (loss, _) in losses.items()}
    assert values["bank"] == pytest.approx(values["all"], rel=1e-6) and values["batch"] < values["all"]
    for kind, learns in (("all", True), ("bank", False)):
        trained = training(negatives=kind)
        loss_of(trained, answers=["yes"] * 5)[0].backward()
        whole = trained.model.y_encoder.embedding.weight.grad[ord("q")]  # "square" is no answer of this batch
        assert whole.any() == learns


def test_a_bank_is_encoded_again_when_its_time_has_come():
    trained = training(negatives="bank", bank_every=2)
    before = trained.objective.bank.copy()
    trained.model.y_encoder.projection.bias.data += 1
    trained.after_step()
    np.testing.assert_array_equal(trained.objective.bank, before)
    trained.after_step()
    np.testing.assert_allclose(trained.objective.bank, trained.model.encode_answers(CONFIG.answers).data, atol=1e-6)


def test_the_prior_is_that_of_the_training_answers():
    texts = ["blue", "circle", "no", "square", "yes"]
    trained = training(prior_correct=True)
    np.testing.assert_allclose(np.exp(trained.objective._log_prior(texts)), np.array([2, 2, 2, 1, 3]) / 9)
    assert loss_of(trained)[0].item() != loss_of(training())[0].item()


# ---------------------------------------------------------------------- who moves
def gradients(trained):
    loss_of(trained)[0].backward()
    return {name for name, p in trained.named_parameters() if p.grad is not None and p.grad.any()}


def test_a_frozen_target_gives_the_y_encoder_no_gradient():
    assert gradients(training(loss="cosine", target="frozen")) == set()
    assert "model.y_encoder.projection.weight" in gradients(training(loss="cosine", uniformity=0.1))


def test_with_an_average_both_sides_learn_and_it_follows_slowly():
    trained = training(target="ema", tau=0.9, steps=2)
    p = predictions()
    loss, _ = loss_of(trained, p)
    loss.backward()
    assert p.grad.any() and trained.model.y_encoder.projection.weight.grad.any()
    assert not any(parameter.requires_grad for parameter in trained.objective.average.parameters())
    slow, fast = trained.objective.average.projection.bias, trained.model.y_encoder.projection.bias
    expected = slow.data.copy()
    for tau in (0.9, 0.95, 1.0, 1.0):  # over two steps up to 1
        fast.data += 1
        trained.after_step()
        expected += (1 - tau) * (fast.data - expected)
        np.testing.assert_allclose(slow.data, expected, rtol=1e-5)


def test_the_sigmoid_loss_learns_its_bias():
    trained = training(loss="sigmoid")
    assert trained.objective.bias.item() == -10 and "objective.bias" in gradients(trained)


# ---------------------------------------------------------------------- a run
class Batches:
    """What the predictor's last layer might see: a direction for each answer, and noise."""

    def batch(self, step):
        rng = np.random.default_rng(step)
        rows = rng.integers(len(CONFIG.answers), size=6)
        pooled = np.eye(16)[rows] + 0.1 * rng.standard_normal((6, 16))
        return {"answers": [CONFIG.answers[i] for i in rows], "pooled": pooled.astype(np.float32)}


def loss_function(trained, batch, rng):
    embedding = ops.l2_normalize(trained.model.predictor.pred_head(batch["pooled"]))
    loss, metrics = trained.objective(trained.model, embedding, batch["answers"])
    return loss, {"hits": metrics["hits"].mean()}


def run(settings, folder=None, steps=6, stop_at=None, resume=False, lr=3e-3, factor=1.0):
    trained = training(**settings)
    groups = optim.parameter_groups(trained, 0.01, {"model.y_encoder": factor})
    trainer = Trainer(trained, loss_function, optim.AdamW(groups, lr=lr), schedules.constant(lr), Batches(),
                      TrainerConfig(steps=steps, log_every=1), folder,
                      after_step=lambda t: t.after_step(), stream=None)
    trainer.run(resume=resume, stop_at=stop_at)
    return trained


@pytest.mark.parametrize("settings", [{"loss": "sigmoid"}, {"loss": "vicreg", "target": "ema", "steps": 6},
                                      {"negatives": "bank", "bank_every": 2, "target": "ema", "steps": 6}], ids=str)
def test_resumed_equals_uninterrupted_bit_for_bit(settings, tmp_path):
    whole = run(settings, tmp_path / "whole")
    run(settings, tmp_path / "parts", stop_at=3)
    assert digest(run(settings, tmp_path / "parts", resume=True).state_dict()) == digest(whole.state_dict())


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_objective_learns(settings):
    start, batch = training(**settings), Batches().batch(99)
    trained = run(settings, steps=40, lr=3e-2)

    def hits(of):
        with xc.no_grad():
            return loss_function(of, batch, None)[1]["hits"]

    assert hits(trained) == 1 > hits(start)


def test_the_rate_of_the_y_encoder_is_multiplied():
    """With Adam, a first step is as long as the rate: 20 times shorter at 0.05, none at 0."""
    start = model().state_dict()

    def moved(factor):
        state = run({}, steps=1, factor=factor).model.state_dict()
        return {part: max(abs(state[name] - start[name]).max() for name in start if name.startswith(part))
                for part in ("predictor", "y_encoder")}

    full, slow, none = moved(1.0), moved(0.05), moved(0.0)
    assert slow["y_encoder"] == pytest.approx(0.05 * full["y_encoder"], rel=0.05)
    assert none["y_encoder"] == 0 and full["predictor"] == slow["predictor"] == none["predictor"] > 0


# ---------------------------------------------------------------------- refusals
@pytest.mark.parametrize("settings, message", [
    ({"loss": "l1"}, "collapses"),
    ({"loss": "cosine", "target": "ema"}, "collapses"),
    ({"loss": "triplet"}, "nce, paired"),
    ({"loss": "sigmoid", "prior_correct": True}, "prior_correct is for nce"),
    ({"bank_every": 0}, "at least 1"),
    ({"tau": 1.5}, "tau is 1.5"),
    ({"uniformity": -1.0}, "uniformity is -1"),
    ({"negatives": "none"}, "all, bank, batch"),
])
def test_what_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ObjectiveConfig(**settings)


def test_a_regression_whose_targets_learn_does_collapse():
    """Why it is refused: what cannot be predicted is made equal."""
    settings = ObjectiveConfig(loss="cosine", target="frozen")
    object.__setattr__(settings, "target", "online")
    made = model()
    trained = Training(made, Objective(settings, made))
    optimizer = optim.AdamW(optim.parameter_groups(made), lr=1e-2)
    for step in range(40):
        optimizer.zero_grad()
        batch = Batches().batch(step)
        loss_function(trained, {**batch, "pooled": np.ones_like(batch["pooled"])}, None)[0].backward()
        optimizer.step()
    cosines = np.triu(made.answer_bank()[1] @ made.answer_bank()[1].T, 1)
    assert cosines[cosines != 0].mean() > 0.9
