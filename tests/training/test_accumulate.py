"""Two passes over small batches give the gradient of one large batch."""

import numpy as np
import pytest

from training import optim, schedules
from training.accumulate import TwoPass
from training.checkpoint import module_generators
from training.loop import Trainer, TrainerConfig
from xuracore import nn, ops
from xuracore.nn import Parameter


class Towers(nn.Module):
    def __init__(self):
        rng = np.random.default_rng(0)
        self.left, self.right = nn.Linear(6, 5, rng=rng), nn.Linear(4, 5, rng=rng)
        self.dropout = nn.Dropout(0.3, rng=np.random.default_rng(1))
        self.log_scale = Parameter(np.array(1.0, np.float32))


def features(model, batch, rng):
    noise = (0.1 * rng.standard_normal(batch["x"].shape)).astype(np.float32)
    p = ops.l2_normalize(model.left(batch["x"] + noise))
    return p, ops.l2_normalize(model.right(model.dropout(batch["y"])))


def joint(model, found, batches):
    p, q = found
    assert len(p) == sum(len(batch["x"]) for batch in batches)
    return ops.info_nce(p, q, model.log_scale), {"rows": len(p)}


class Pairs:
    def batch(self, index):
        rng = np.random.default_rng(index)
        return {"x": rng.standard_normal((4, 6)).astype(np.float32),
                "y": rng.standard_normal((4, 4)).astype(np.float32)}  # fmt: skip


def own(model, found, batch, batches):
    """A part of a mean over all batches, weighted by the rows of each, that no other batch takes part in."""
    share = len(batch["x"]) / sum(len(each["x"]) for each in batches)
    loss = (found[0] * found[0] * model.log_scale).mean() * share
    return loss, {"own": loss.item()}


def rng_of(index):
    return lambda: np.random.default_rng([9, index])


def gradients(model):
    return {name: parameter.grad.copy() for name, parameter in model.named_parameters()}


def test_two_passes_are_one_large_batch():
    batches = [Pairs().batch(i) for i in range(3)]
    small, large = Towers(), Towers()
    loss, metrics = TwoPass(features, joint, own=own).accumulate(small, batches, [rng_of(i) for i in range(3)])

    parts = [features(large, batch, rng_of(i)()) for i, batch in enumerate(batches)]
    whole, _ = joint(large, tuple(ops.concatenate(*rows) for rows in zip(*parts)), batches)
    alone = (ops.concatenate(*(p for p, _ in parts)) ** 2 * large.log_scale).mean()
    (whole + alone).backward()
    assert loss == pytest.approx(whole.item() + alone.item(), rel=1e-6)
    assert metrics == {"rows": 12, "own": pytest.approx(alone.item())}
    for name, expected in gradients(large).items():
        np.testing.assert_allclose(gradients(small)[name], expected, rtol=1e-4, atol=1e-6)


def test_one_batch_in_one_pass_is_the_same_as_in_two():
    one, two = Towers(), Towers()
    batch, loss = Pairs().batch(0), TwoPass(features, joint, own=own)
    value, metrics = loss(one, batch, rng_of(0)())
    value.backward()
    again, told = loss.accumulate(two, [batch], [rng_of(0)])
    assert again == pytest.approx(value.item(), rel=1e-6) and told == metrics
    for name, expected in gradients(one).items():
        np.testing.assert_allclose(gradients(two)[name], expected, rtol=1e-5, atol=1e-7)


def test_dropout_goes_on_where_one_pass_would_have_left_it():
    one, two = Towers(), Towers()
    batch = Pairs().batch(0)
    TwoPass(features, joint).accumulate(two, [batch], [rng_of(0)])
    features(one, batch, rng_of(0)())
    (a,), (b,) = (module_generators(model).values() for model in (one, two))
    assert a.random() == b.random()


def test_the_trainer_shows_a_joint_loss_all_batches_of_a_step():
    model, seen = Towers(), []

    def counting(model, found, batches):
        seen.append(len(batches))
        return joint(model, found, batches)

    config = TrainerConfig(steps=2, accumulate=3, prefetch=False)
    optimizer, loss = optim.SGD(model, lr=0.1), TwoPass(features, counting)
    trainer = Trainer(model, loss, optimizer, schedules.constant(0.1), Pairs(), config, stream=None)
    before = model.left.weight.data.copy()
    assert trainer.run().step == 2 and seen == [3, 3]
    assert not np.array_equal(before, model.left.weight.data)


def test_a_frozen_tower_gets_no_gradient_and_no_second_pass():
    model = Towers()
    model.right.requires_grad_(False)
    batches = [Pairs().batch(0), Pairs().batch(1)]
    loss, _ = TwoPass(features, joint).accumulate(model, batches, [rng_of(0), rng_of(1)])
    assert np.isfinite(loss) and model.left.weight.grad is not None and model.right.weight.grad is None
