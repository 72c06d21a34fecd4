"""Training on episodes: truncated backpropagation with states and memory carried, and evaluation."""

import time

import numpy as np

from training.wavecore.episodes import TAIL, Streams, inputs_of
from training.wavecore.nested import NestedAdam
from xuracore import ops
from xuracore.config import require
from xuramamba.wavecore.model import inference_variables
from xuramamba.wavecore.parameters import flatten

COLUMNS = ("step", "loss", "elapsed_s", "mse_main", "mse_imagination_tail", "imagination_tail_dims")


def train(model, params, episodes, *, steps, batch=8, length=32, lr=1e-3, periods=None, rates=None, seed=0,
          sparsity_lambda=0.0, ablate=(), report=None, after_step=None):
    """Train ``params`` in place; returns a list of rows, one a step, keyed by COLUMNS.

    Each step goes through ``length`` moments of ``batch`` streams; states and memory go on to the next step, their
    gradient does not.  A stream begins anew where an episode does.
    sparsity_lambda : weight of the mean absolute parameter.
    report : called with each row.   after_step : called with (step, row) after the change.
    """
    require(steps > 0 and batch > 0 and length > 0, f"steps={steps}, batch={batch}, length={length}: must be positive")
    optimizer = NestedAdam(params, lr, periods, rates, model.config.gradient_clip)
    streams = iter(Streams(episodes, batch, length, np.random.default_rng(seed)))
    state, rows, begun = None, [], time.perf_counter()
    for step in range(1, steps + 1):
        moments = next(streams)
        outputs, state = model.sequence(params, moments.obs, moments.previous, moments.rewards, state, moments.resets,
                                        ablate)
        state = state.detach()
        loss = ops.mse_loss(outputs, moments.target)
        total = loss
        if sparsity_lambda:
            flat = flatten(params).values()
            size = sum(p.size for p in flat)
            total = loss + sum(ops.sum(ops.absolute(p)) for p in flat) * (sparsity_lambda / size)
        total.backward()
        warm, late = min(1.0, step / 20), step / steps
        optimizer.step(warm * (1 - 0.9 * max(0.0, 2 * late - 1)))
        error = (outputs.data - moments.target) ** 2
        tail = min(TAIL, error.shape[-1]) if error.shape[-1] > TAIL else 0
        row = dict(zip(COLUMNS, (
            step, float(loss.data), time.perf_counter() - begun,
            float(error[..., : error.shape[-1] - tail].mean()), float(error[..., error.shape[-1] - tail :].mean())
            if tail else 0.0, tail)))  # fmt: skip
        rows.append(row)
        if report is not None:
            report(row)
        if after_step is not None:
            after_step(step, row)
    return rows


def evaluate(model, variables, episodes, ablate=()):
    """Mean squared error of the actions over whole episodes, from an empty state each; without gradients."""
    variables = inference_variables(variables)
    total = count = 0
    by_length = {}
    for episode in episodes:
        by_length.setdefault(len(episode.rewards), []).append(inputs_of(episode))
    for batches in by_length.values():
        for start in range(0, len(batches), 32):
            some = batches[start : start + 32]
            obs, previous, rewards, target, resets = (np.concatenate(parts) for parts in zip(*some))
            outputs, _ = model.sequence(variables, obs, previous, rewards, resets=resets, ablate=ablate)
            total += float(((outputs - target) ** 2).sum(dtype=np.float64))
            count += target.size
    return total / count
