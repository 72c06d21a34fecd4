"""Delayed recall: pairs of key and value are shown, many steps pass, and one key asks for its value.

Keys are random directions of each trial, so that nothing but a memory of this trial can answer.  A
shown pair comes with reward 1; the steps between show noise.  The answer is the value of largest output.
"""

from typing import NamedTuple

import numpy as np

from training.optim import Adam, clip_grad_norm
from xuracore import ops
from xuramamba.wavecore.parameters import flatten

KEY_DIM, KEY_LENGTH = 16, 2.5
LOW_LOSS, GROWTH = 0.4, 1.03  # below this loss, longer lags are drawn


class Trials(NamedTuple):
    """A batch of trials; the answer is asked for at the last step."""

    obs: np.ndarray  # (B, T, obs_dim): key, value (one of ``values``), whether it asks
    actions: np.ndarray  # (B, T, action_dim), zeros
    rewards: np.ndarray  # (B, T, 1)
    answer: np.ndarray  # (B)


def make_trials(rng, batch, lag, *, obs_dim=64, action_dim=7, pairs=4, values=7):
    """``batch`` trials of ``pairs`` pairs, the last shown ``lag`` steps before the question."""
    length = pairs + lag
    keys = rng.standard_normal((batch, length, KEY_DIM)).astype(np.float32)
    keys *= KEY_LENGTH / np.linalg.norm(keys, axis=-1, keepdims=True)
    obs = np.zeros((batch, length, obs_dim), np.float32)
    obs[:, :, :KEY_DIM] = 0.5 * keys  # noise, but for the pairs and the question
    shown = rng.integers(0, values, (batch, pairs))
    obs[:, :pairs, :KEY_DIM] = keys[:, :pairs]
    obs[:, :pairs, KEY_DIM : KEY_DIM + values] = np.eye(values, dtype=np.float32)[shown]
    asked, rows = rng.integers(0, pairs, batch), np.arange(batch)
    obs[:, -1, :KEY_DIM] = keys[rows, asked]
    obs[:, -1, KEY_DIM + values] = 1
    rewards = np.zeros((batch, length, 1), np.float32)
    rewards[:, :pairs] = 1
    return Trials(obs, np.zeros((batch, length, action_dim), np.float32), rewards, shown[rows, asked])


def answers(model, variables, trials, ablate=()):
    """The output (B, output_dim) at the question."""
    outputs, _ = model.sequence(variables, trials.obs, trials.actions, trials.rewards, ablate=ablate)
    return outputs[:, -1]


def accuracy(model, variables, lag, *, trials=256, seed=10_000, ablate=(), **sizes):
    """Share of right answers after ``lag`` steps; ``variables`` best plain arrays."""
    rng = np.random.default_rng((seed, lag))
    batch = make_trials(rng, trials, lag, obs_dim=model.obs_dim, action_dim=model.action_dim,
                        values=model.output_dim, **sizes)
    return float((np.asarray(answers(model, variables, batch, ablate)).argmax(1) == batch.answer).mean())


def train(model, params, *, steps, batch=32, lr=2e-3, seed=0, lags=(2, 100), ablate=(), report=None):
    """Train in place.  Lags are drawn below a reach that grows from lags[0] to lags[1] as long as the loss is low.

    report : called with (step, loss, reach) after each step.   Returns the running mean of the loss.
    """
    rng = np.random.default_rng(seed)
    optimizer = Adam(list(flatten(params).items()), lr=lr)
    reach, typical = float(lags[0]), float("inf")
    for step in range(steps):
        lag = int(np.exp(rng.uniform(0, np.log(reach + 1))))
        trials = make_trials(rng, batch, lag, obs_dim=model.obs_dim, action_dim=model.action_dim,
                             values=model.output_dim)
        loss = ops.cross_entropy(answers(model, params, trials, ablate), trials.answer)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm(optimizer.parameters(), 1.0)
        optimizer.step(lr * min(1.0, (step + 1) / 50, 0.1 + 3 * (1 - step / steps)))
        found = float(loss.data)
        typical = found if step == 0 else 0.95 * typical + 0.05 * found
        if typical < LOW_LOSS:
            reach = min(lags[1], reach * GROWTH)
        if report is not None:
            report(step, found, reach)
    return typical
